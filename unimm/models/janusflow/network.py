"""JanusFlow's network: a causal decoder with a flow head between two U-ViTs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from unimm.encoders.timm_vit import TimmVisionEncoder
from unimm.generation.flow import add_noise
from unimm.kernels import attention, linear_cross_entropy
from unimm.models.common.deepseek_network import DeepseekNetwork
from unimm.models.janusflow.config import EXPERT, TIME_SCALE, JanusFlowConfig
from unimm.models.janusflow.uvit import ShallowUViTDecoder, ShallowUViTEncoder
from unimm.nn.decoder import Decoder, ExpertRouting, RowsByExpert
from unimm.nn.layers import RMSNorm
from unimm.nn.patches import patchify
from unimm.sequence.packing import ImageTokens, PackedBatch
from unimm.sequence.parts import IGNORE_INDEX, Part, image_part, position_gap, text_part
from unimm.tokenizers.kl import AutoencoderKL


@dataclass(frozen=True)
class JanusFlowLosses:
    """Cross entropy of every labelled row [m], squared error of every noised token [n, p*p*C]."""

    text: Tensor
    mse: Tensor


@dataclass(frozen=True)
class UViTFeatures:
    """Noised latents inside the language model: a row for the time, one for each token, and what skips it."""

    time_embed: Tensor  # [B, D]
    token_embeds: Tensor  # [B, n, D]
    skip: Tensor  # [B, C, h, w]

    def __getitem__(self, images: Tensor) -> "UViTFeatures":
        return UViTFeatures(self.time_embed[images], self.token_embeds[images], self.skip[images])


def noised_part(tokens: Tensor, boi: int, *, timestep: float) -> Part:
    """Tokens [n, ...] of a latent to be noised up to `time`, 0 data and 1 noise; the row of its marker holds the time.

    Nothing sees them and the clock does not count them, so copies at other times may follow the same prompt, exactly.
    """
    item = image_part(
        "gen_image", tokens, torch.arange(len(tokens)), boundary_ids=(boi,), causal=True, timestep=timestep, noised=True
    )
    return replace(item, segment=replace(item.segment, advance=0))


def bos_unconditional(prompt: Sequence[Part]) -> list[Part]:
    """What guidance compares with, in place of a prompt: its first id, and nothing until where the prompt ends."""
    length = sum(item.segment.length for item in prompt)
    return [text_part([int(prompt[0].ids[0])]), position_gap(length - 1)]


def first_tokens(tokens: ImageTokens) -> Tensor:
    """Which of a pack's image tokens begin a picture, [pictures]."""
    lengths = torch.tensor(tokens.lengths, device=tokens.rows.device)
    return lengths.cumsum(0) - lengths


def rows_before_images(tokens: ImageTokens) -> Tensor:
    """The row before each picture of a pack, [pictures]."""
    return tokens.rows[first_tokens(tokens)] - 1


class JanusFlowNetwork(DeepseekNetwork):
    """A decoder, a tower to look with, and a way in and a way out for latents; the autoencoder may lie elsewhere."""

    def __init__(self, config: JanusFlowConfig):
        super().__init__()
        self.config = config
        dim = config.decoder.dim
        self.decoder, self.vision = Decoder(config.decoder), TimmVisionEncoder(config.vision)
        self.aligner = nn.Linear(self.vision.trunk.num_features, dim)
        self.und_start_embed = nn.Parameter(torch.zeros(1, dim))  # stands where the marker before a picture would
        self.gen_encoder, self.gen_decoder = (
            ShallowUViTEncoder(config.gen_encoder),
            ShallowUViTDecoder(config.gen_decoder),
        )
        self.gen_encoder_aligner = nn.Linear(config.gen_encoder.dim, dim)
        self.gen_decoder_norm, self.gen_decoder_aligner = (
            RMSNorm(dim, config.decoder.norm_eps),
            nn.Linear(dim, config.gen_decoder.in_channels),
        )
        self.vae: AutoencoderKL | None = AutoencoderKL(config.vae) if config.vae else None

    def embed(self, batch: PackedBatch, latents: UViTFeatures | None = None) -> Tensor:
        """Every row of a pack, in its order [N, D]: texts and markers, pictures seen, and pictures to draw."""
        parts, rows = {"text": self.decoder.embed(batch.ids)}, {"text": batch.id_rows}
        if batch.und_images:
            parts["look"], rows["look"] = self.aligner(self.image_features(batch.und_images)), batch.und_images.rows
        if batch.gen_images and latents:
            parts["draw"], rows["draw"] = latents.token_embeds.flatten(0, 1), batch.gen_images.rows
        x = ExpertRouting(rows).join(parts)
        if batch.und_images:
            begun = self.und_start_embed.expand(len(batch.und_images.lengths), -1)
            x = x.index_copy(0, rows_before_images(batch.und_images), begun.to(x.dtype))
        return (
            x.index_copy(0, rows_before_images(batch.gen_images), latents.time_embed.to(x.dtype))
            if batch.gen_images and latents
            else x
        )

    def backbone(self, batch: PackedBatch, attend: Any, latents: UViTFeatures | None = None) -> RowsByExpert:
        """Last hidden states of a pack's rows, before the final norm."""
        return self._run_decoder(self.embed(batch, latents), batch.layout.position_ids, attend)

    def _run_decoder(self, x: Tensor, positions: Tensor, attend: Any) -> RowsByExpert:
        return self.decoder(x, positions, {EXPERT: torch.arange(len(x), device=x.device)}, attend)

    def encode_latents(self, x: Tensor, timesteps: Tensor, *, bf16_time: bool = False) -> UViTFeatures:
        """Noised latents x [B, C, H, W] at times [B], 0 data and 1 noise."""
        scaled = (1 - timesteps) * TIME_SCALE
        scaled = scaled.bfloat16().float() if bf16_time else scaled
        grid, time = self.gen_encoder(x.to(self.dtype), scaled)
        return UViTFeatures(time, self.gen_encoder_aligner(rearrange(grid, "B C h w -> B (h w) C")), grid)

    def decode_velocity(self, hidden: Tensor, features: UViTFeatures) -> Tensor:
        """Last hidden states of the tokens [B, n, D] -> velocity [B, C, H, W], noise - data."""
        y = self.gen_decoder_aligner(self.gen_decoder_norm(self.decoder.norms[EXPERT](hidden)))
        grid = rearrange(y, "B (h w) C -> B C h w", h=features.skip.shape[2])
        return -self.gen_decoder(grid, features.skip, features.time_embed)

    def forward(self, batch: PackedBatch, noise: Tensor) -> JanusFlowLosses:
        """Training: next-id loss at the labelled rows, flow loss at the noised tokens; noise [n draw tokens, p*p*C]."""
        drawn = None
        if batch.gen_images:
            z = add_noise(batch.gen_images.content, noise, batch.timesteps)
            drawn = self.encode_latents(self._unpatchify(z), batch.timesteps[first_tokens(batch.gen_images)])
        hidden = self.backbone(batch, lambda layer, q, k, v: attention(q, k, v, batch.layout.mask), drawn)[EXPERT]
        at = (batch.labels != IGNORE_INDEX).nonzero().squeeze(1)
        said = self.decoder.norms[EXPERT](hidden[batch.id_rows[at]])
        text = linear_cross_entropy(said, self.decoder.head.weight, batch.labels[at])
        if batch.gen_images is None or drawn is None:
            return JanusFlowLosses(text, noise.new_zeros(0, noise.shape[-1]))
        v = self.decode_velocity(hidden[batch.gen_images.rows].unflatten(0, drawn.token_embeds.shape[:2]), drawn)
        target = self._unpatchify(noise - batch.gen_images.content)
        error = (v.float() - target).square()
        return JanusFlowLosses(text, torch.cat([patchify(one, self.config.latent_patch_size) for one in error]))

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        """Tokens of pictures [n, p*p*C], one after the other -> [B, C, H, W]."""
        p, (height, width) = self.config.latent_patch_size, self.config.latent_size
        return rearrange(tokens, "(B h w) (p q C) -> B C (h p) (w q)", h=height // p, w=width // p, p=p, q=p)

    def latent_part(self, latent: Tensor, boi: int, *, timestep: float) -> Part:
        """A latent [C, H, W] to be noised up to `time`, 0 data and 1 noise."""
        return noised_part(patchify(latent, self.config.latent_patch_size), boi, timestep=timestep)

    def initial_noise(self, generator: torch.Generator) -> Tensor:
        """What a picture is drawn from, [C, H, W]."""
        shape = self.config.gen_encoder.in_channels, *self.config.latent_size
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
