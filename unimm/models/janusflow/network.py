"""JanusFlow's network: a causal decoder; a vision encoder for understanding; two U-ViTs around it for generating.

A noised latent enters through a shallow U-ViT as one row for the time and a row for each token, is causal behind the
prompt, and leaves through another as a velocity. arXiv 2411.07975, section 3.

Timesteps are 1 at noise and 0 at data, as everywhere in this package. The original's time runs from noise at 0 to data
at 1, in thousandths: it is converted in `encode_latents` and `decode_velocity`, and nowhere else.

Axes: N packed rows, B images or branches of them, n tokens of an image, D model, C channels, H W sides of a latent, h w
of its grid of tokens, p patch (latents a token, along each side).
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from unimm.encoders.timm_vit import TimmVisionEncoder
from unimm.generation.flow import add_noise
from unimm.generation.noise import gaussian_noise
from unimm.kernels import attention
from unimm.models.common.deepseek_chat import DeepseekNetwork
from unimm.models.janusflow.config import TIME_SCALE, JanusFlowConfig
from unimm.models.janusflow.processor import noised_part
from unimm.models.janusflow.uvit import ShallowUViTDecoder, ShallowUViTEncoder
from unimm.nn.decoder import AttentionFn, Decoder, ExpertRouting, RowsByExpert
from unimm.nn.layers import RMSNorm
from unimm.nn.patches import patchify
from unimm.sequence.packing import ImageTokens, PackedBatch
from unimm.sequence.parts import Part
from unimm.tokenizers.kl import AutoencoderKL
from unimm.vlms.llama_layout import EXPERT


@dataclass(frozen=True)
class JanusFlowLosses:
    """Cross entropy of every labelled row [n], and squared error of every noised token [n, p*p*C]."""

    text: Tensor
    mse: Tensor


@dataclass(frozen=True)
class UViTFeatures:
    """Noised latents as rows of the language model, one for the time and one for each token, and what skips it."""

    time_embed: Tensor  # [B, D]
    token_embeds: Tensor  # [B, n, D]
    skip: Tensor  # [B, C, h, w]

    def __getitem__(self, images: Tensor) -> "UViTFeatures":
        return UViTFeatures(self.time_embed[images], self.token_embeds[images], self.skip[images])


def first_tokens(tokens: ImageTokens) -> Tensor:
    """The index of each image's first token among a batch's image tokens, [images]."""
    lengths = torch.tensor(tokens.lengths, device=tokens.rows.device)
    return lengths.cumsum(0) - lengths


def rows_before_images(tokens: ImageTokens) -> Tensor:
    """The row before each image of a batch, [images]."""
    return tokens.rows[first_tokens(tokens)] - 1


class JanusFlowNetwork(DeepseekNetwork):
    """A decoder; a vision encoder with its aligner; a U-ViT encoder and decoder with theirs; an autoencoder or None."""

    def __init__(self, config: JanusFlowConfig):
        super().__init__()
        self.config = config
        dim = config.decoder.dim
        self.decoder = Decoder(config.decoder)
        self.vision = TimmVisionEncoder(config.vision)
        self.aligner = nn.Linear(self.vision.trunk.num_features, dim)
        self.und_start_embed = nn.Parameter(torch.zeros(1, dim))  # in place of the id before an image to understand
        self.gen_encoder = ShallowUViTEncoder(config.gen_encoder)
        self.gen_decoder = ShallowUViTDecoder(config.gen_decoder)
        self.gen_encoder_aligner = nn.Linear(config.gen_encoder.dim, dim)
        self.gen_decoder_norm = RMSNorm(dim, config.decoder.norm_eps)
        self.gen_decoder_aligner = nn.Linear(dim, config.gen_decoder.in_channels)
        self.vae: AutoencoderKL | None = AutoencoderKL(config.vae) if config.vae else None

    def embed(self, batch: PackedBatch, latents: UViTFeatures | None = None) -> Tensor:
        """The embeddings of every row of a batch, in order [N, D]: text, images to understand, noised latents."""
        embeds = {"text": self.decoder.embed(batch.ids)}
        rows = {"text": batch.id_rows}
        if batch.und_images:
            embeds["und_image"] = self.aligner(self.image_features(batch.und_images))
            rows["und_image"] = batch.und_images.rows
        if batch.gen_images and latents:
            embeds["gen_image"] = latents.token_embeds.flatten(0, 1)
            rows["gen_image"] = batch.gen_images.rows
        x = ExpertRouting(rows).join(embeds)
        if batch.und_images:
            start = self.und_start_embed.expand(len(batch.und_images.lengths), -1)
            x = x.index_copy(0, rows_before_images(batch.und_images), start.to(x.dtype))
        if batch.gen_images and latents:
            x = x.index_copy(0, rows_before_images(batch.gen_images), latents.time_embed.to(x.dtype))
        return x

    def backbone(self, batch: PackedBatch, attend: AttentionFn, latents: UViTFeatures | None = None) -> RowsByExpert:
        """The last hidden states of every row of a batch [N, D], before the final norm."""
        return {EXPERT: self.run_decoder(self.embed(batch, latents), batch.layout.position_ids, attend)}

    def run_decoder(self, x: Tensor, position_ids: Tensor, attend: AttentionFn) -> Tensor:
        """Embedded rows [N, D] -> their last hidden states, before the final norm."""
        return self.decoder(x, position_ids, {EXPERT: torch.arange(len(x), device=x.device)}, attend)[EXPERT]

    def encode_latents(self, x: Tensor, timesteps: Tensor, *, bf16_time: bool = False) -> UViTFeatures:
        """Noised latents x [B, C, H, W] at timesteps [B] as rows of the language model."""
        times = (1 - timesteps) * TIME_SCALE
        times = times.bfloat16().float() if bf16_time else times
        grid, time_embed = self.gen_encoder(x.to(self.dtype), times)
        # contiguous: a CPU's product in bfloat16 of rows that lie apart rounds otherwise where there is one image
        tokens = self.gen_encoder_aligner(rearrange(grid, "B C h w -> B (h w) C").contiguous())
        return UViTFeatures(time_embed, tokens, grid)

    def decode_velocity(self, hidden: Tensor, features: UViTFeatures) -> Tensor:
        """Last hidden states of the tokens [B, n, D] -> velocity [B, C, H, W], noise - data."""
        y = self.gen_decoder_aligner(self.gen_decoder_norm(self.decoder.norms[EXPERT](hidden)))
        grid = rearrange(y, "B (h w) C -> B C h w", h=features.skip.shape[2])
        # the original's velocity is data - noise
        return -self.gen_decoder(grid, features.skip, features.time_embed)

    def forward(self, batch: PackedBatch, noise: Tensor) -> JanusFlowLosses:
        """Training: next-id loss of the labelled rows, flow loss of the noised tokens; noise [n, p*p*C]."""
        latents = None
        if batch.gen_images:
            noised = self._unpatchify(add_noise(batch.gen_images.content, noise, batch.timesteps))
            latents = self.encode_latents(noised, batch.timesteps[first_tokens(batch.gen_images)])
        hidden = self.backbone(batch, lambda layer, q, k, v: attention(q, k, v, batch.layout.mask), latents)[EXPERT]
        text = self.text_loss(batch, hidden)
        if batch.gen_images is None or latents is None:
            return JanusFlowLosses(text, noise.new_zeros(0, noise.shape[-1]))
        states = hidden[batch.gen_images.rows].unflatten(0, latents.token_embeds.shape[:2])
        velocity = self.decode_velocity(states, latents)
        target = self._unpatchify(noise - batch.gen_images.content)
        error = (velocity.float() - target).square()
        return JanusFlowLosses(text, torch.cat([patchify(one, self.config.latent_patch_size) for one in error]))

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        """Tokens [n, p*p*C] of images, one after the other -> [B, C, H, W]."""
        p = self.config.latent_patch_size
        height, width = self.config.latent_size
        return rearrange(tokens, "(B h w) (p q C) -> B C (h p) (w q)", h=height // p, w=width // p, p=p, q=p)

    def latent_part(self, latent: Tensor, boi: int, *, timestep: float) -> Part:
        """A latent [C, H, W] to be noised up to a timestep."""
        return noised_part(patchify(latent, self.config.latent_patch_size), boi, timestep=timestep)

    def initial_noise(self, generator: torch.Generator) -> Tensor:
        """The noise [C, H, W] that an image is generated from."""
        shape = self.config.gen_encoder.in_channels, *self.config.latent_size
        return gaussian_noise(shape, generator)
