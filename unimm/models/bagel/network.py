"""BAGEL's network: two experts in one decoder, a ViT, a VAE and the velocity head.

Deng et al. 2025, arXiv 2505.14683. Released code: github.com/ByteDance-Seed/Bagel at 056b5fd, Apache-2.0.
Two experts share every attention: "und" owns texts, ViT tokens and all special tokens, "gen" owns latent tokens.

Axes: N packed rows, n rows of one kind, D model, C channels of a latent token, L latent tokens of an image, P images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unimm.encoders.siglip import SiglipNaViT
from unimm.generation.causal_lm import CausalLM
from unimm.generation.flow import add_noise
from unimm.generation.guidance import Branch
from unimm.generation.kv_cache import KVCache
from unimm.kernels import attention, linear_cross_entropy
from unimm.models.bagel.cfg_contexts import CFGContexts, ContextAppend, ImageParts
from unimm.models.bagel.config import BagelConfig
from unimm.models.bagel.latent_denoiser import LatentDenoiser
from unimm.nn.decoder import AttentionFn, Decoder, ExpertRouting, RowsByExpert
from unimm.nn.layers import MLP
from unimm.nn.patches import unpatchify
from unimm.nn.pos_embed import sincos_pos_embed_2d
from unimm.nn.timestep import TimestepEmbedder
from unimm.sequence.packing import ImageTokens, PackedBatch
from unimm.sequence.parts import IGNORE_INDEX, Part
from unimm.tokenizers.kl import AutoencoderKL


@dataclass(frozen=True)
class BagelLosses:
    """Losses by row: cross entropy of every labelled row [n], squared error of every noised latent token [m, C]."""

    ce: Tensor
    mse: Tensor


class BagelNetwork(CausalLM):
    """A decoder of two experts, a ViT that encodes images to understand, a VAE for images to generate."""

    decoder: Decoder

    vit_pos_embed: Tensor  # [vit_grid^2, D], added behind the connector
    latent_pos_embed: Tensor  # [latent_grid^2, D]

    def __init__(self, config: BagelConfig):
        super().__init__()
        self.config = config
        dim = config.decoder.dim
        self.decoder = Decoder(config.decoder)
        if config.vision:
            self.vision = SiglipNaViT(config.vision)
            self.connector = MLP(config.vision.dim, dim, dim, config.connector_act)
            self.register_buffer("vit_pos_embed", sincos_pos_embed_2d(config.vit_grid, dim))
        if config.visual_gen:
            self.time_embedder = TimestepEmbedder(dim)
            self.vae2llm = nn.Linear(config.latent_dim, dim)
            self.llm2vae = nn.Linear(dim, config.latent_dim)
            self.register_buffer("latent_pos_embed", sincos_pos_embed_2d(config.latent_grid, dim))
            self.vae = AutoencoderKL(config.vae)

    # ---- from parts to rows of the decoder

    def encode_vit(self, images: ImageTokens) -> Tensor:
        """Patches of packed images -> [n, D]."""
        features = self.vision(images.content.to(self.dtype), images.image_position_ids, images.lengths)
        return self.connector(features) + self.vit_pos_embed[images.image_position_ids]

    def embed_latents(self, x: Tensor, timesteps: Tensor, position_ids: Tensor) -> Tensor:
        """Latent tokens x [n, C] at timesteps [n] (or [1], one for all) and places [n] of the table -> [n, D]."""
        return self.vae2llm(x.to(self.dtype)) + self.time_embedder(timesteps) + self.latent_pos_embed[position_ids]

    def embed(self, batch: PackedBatch, noise: Tensor | None = None) -> Tensor:
        """Every row of a batch, in its order [N, D]; latent tokens are mixed with `noise` [n, C] by their timesteps."""
        parts = {"text": self.decoder.embed(batch.ids)}
        rows = {"text": batch.id_rows}
        if batch.und_images:
            parts["und_image"] = self.encode_vit(batch.und_images)
            rows["und_image"] = batch.und_images.rows
        if batch.gen_images:
            latents = batch.gen_images
            x = latents.content if noise is None else add_noise(latents.content, noise, batch.timesteps)
            parts["gen_image"] = self.embed_latents(x, batch.timesteps, latents.image_position_ids)
            rows["gen_image"] = latents.rows
        return ExpertRouting(rows).join(parts)

    # ---- the decoder and its heads

    def backbone(self, batch: PackedBatch, attend: AttentionFn, noise: Tensor | None = None) -> RowsByExpert:
        """Last hidden states of a batch's rows by expert, before the final norms; `attend` as in the decoder."""
        return self.decoder(self.embed(batch, noise), batch.layout.position_ids, batch.rows_by_expert, attend)

    def llm_to_velocity(self, hidden: Tensor) -> Tensor:
        """The generation expert's last hidden states [n, D] -> velocity [n, C], noise - data."""
        return self.llm2vae(self.decoder.norms["gen"](hidden))

    def forward(self, batch: PackedBatch, noise: Tensor) -> BagelLosses:
        """Training: next-id loss at the labelled rows, flow loss at the noised latent tokens; noise [n latent tokens,
        C].
        """
        hidden = self.backbone(batch, lambda layer, q, k, v: attention(q, k, v, batch.layout.mask), noise)
        labelled = (batch.labels != IGNORE_INDEX).nonzero().squeeze(1)
        rows = torch.searchsorted(batch.rows_by_expert["und"], batch.id_rows[labelled])
        states = self.decoder.norms["und"](hidden["und"][rows])
        ce = linear_cross_entropy(states, self.decoder.head.weight, batch.labels[labelled])
        if batch.gen_images is None:
            return BagelLosses(ce, noise.new_zeros(0, self.config.latent_dim))
        target = noise - batch.gen_images.content
        v = self.llm_to_velocity(hidden["gen"][batch.noised])
        return BagelLosses(ce, (v.float() - target[batch.noised]).square())

    # ---- contexts

    def append_text(
        self, contexts: Sequence[CFGContexts], texts: Sequence[Part], *, system: bool = False
    ) -> list[CFGContexts]:
        """The contexts after one text each; `system` where it is the system prompt."""
        grown = self._append(contexts, [[text] for text in texts], ("full", "no_image"))
        return [one.with_text(caches, system=system) for one, caches in zip(contexts, grown, strict=True)]

    def append_reasoning(self, contexts: Sequence[CFGContexts], texts: Sequence[Part]) -> list[CFGContexts]:
        """The contexts after the reasoning that the model wrote for each."""
        grown = self._append(contexts, [[text] for text in texts], ("full",))
        return [one.with_reasoning(caches) for one, caches in zip(contexts, grown, strict=True)]

    def append_images(
        self, contexts: Sequence[CFGContexts], images: Sequence[Sequence[ImageParts]]
    ) -> list[CFGContexts]:
        """The contexts after some images each: the first ones of all in one forward, then the second ones, and so
        on."""
        result = list(contexts)
        for n in range(max(map(len, images))):
            rows = [i for i, some in enumerate(images) if len(some) > n]
            grown = self._append([result[i] for i in rows], [images[i][n][0] for i in rows], ("full",))
            for i, caches in zip(rows, grown, strict=True):
                result[i] = result[i].with_image(caches, images[i][n][1])
        return result

    def _append(
        self, contexts: Sequence[CFGContexts], parts: Sequence[Sequence[Part]], names: Sequence[str]
    ) -> list[dict[str, KVCache]]:
        append = ContextAppend(contexts, parts, names)
        return append.by_name(self.prefill(append.caches, append.parts))

    # ---- denoising

    def denoiser_states(
        self, denoiser: LatentDenoiser, x: Tensor, timesteps: Tensor, branches: Sequence[Branch]
    ) -> list[Tensor]:
        """Last hidden states [L, D] of each branch's latent tokens; x [N, C] of all images, at their timesteps [P]."""
        tokens = self.embed_latents(x, denoiser.token_timesteps(timesteps), denoiser.position_ids)
        return self._decode_tokens(denoiser, tokens, branches)

    def _decode_tokens(self, denoiser: LatentDenoiser, tokens: Tensor, branches: Sequence[Branch]) -> list[Tensor]:
        """Embedded latent tokens [N, D] -> last hidden states [L, D] of each branch."""
        rows = denoiser.rows(branches)
        block = torch.cat((tokens, self.decoder.embed(denoiser.boundary_ids))).index_select(0, rows.source)
        hidden = self.decoder(block, rows.position_ids, rows.by_expert, rows.attend)
        return list(hidden["gen"].split(rows.lengths))

    def guided_velocity(self, denoiser: LatentDenoiser, x: Tensor, timesteps: Tensor) -> Tensor:
        """The guided velocity [N, C] of the latent tokens x [N, C] of all images, at their timesteps [P]."""
        branches = denoiser.branches(timesteps)

        def step(x: Tensor, token_timesteps: Tensor) -> Tensor:
            tokens = self.embed_latents(x, token_timesteps, denoiser.position_ids)
            states = denoiser.states(branches, tokens, lambda some: self._decode_tokens(denoiser, tokens, some))
            velocities = {branch: self.llm_to_velocity(hidden) for branch, hidden in states.items()}
            return denoiser.guide(velocities, timesteps)

        times = denoiser.token_timesteps(timesteps)
        return denoiser.graphs.run((tuple(branches), len(times)), step, x, times)

    # ---- pixels

    def encode_latents(self, pixels: Tensor, noise: Tensor | None) -> Tensor:
        """Pixels [3, height, width] in [-1, 1] -> latents [z, h, w]: the posterior's mean, or drawn by noise [z, h,
        w]."""
        return self.vae.encode(pixels[None], noise=None if noise is None else noise[None])[0]

    def decode_latents(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Latent tokens [L, C] -> pixels [3, height, width] in [-1, 1]."""
        height = size[0] // self.config.latent_downsample
        return self.vae.decode(unpatchify(tokens.float(), self.config.latent_patch_size, height)[None])[0]
