"""BAGEL's network: two experts in one decoder, a ViT, a VAE and the flow head.

Deng et al. 2025, arXiv 2505.14683. Released code: github.com/ByteDance-Seed/Bagel at 056b5fd, Apache-2.0.
Two experts share every attention: "und" owns text, ViT tokens and all markers, "gen" owns latent tokens.

Axes: N packed tokens, L latent tokens of a picture, D model, C features of a latent token, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unimm.encoders.siglip_navit import SiglipNaViT
from unimm.generation.flow import add_noise
from unimm.kernels import attention, linear_cross_entropy
from unimm.models.bagel.config import BagelConfig
from unimm.nn.decoder import Decoder, ExpertRouting, RowsByExpert
from unimm.nn.layers import MLP
from unimm.nn.patches import unpatchify
from unimm.nn.pos_embed import sincos_pos_embed_2d
from unimm.nn.timestep import TimestepEmbedder
from unimm.sequence.packing import ImageTokens, PackedBatch
from unimm.sequence.parts import IGNORE_INDEX
from unimm.tokenizers.kl import AutoencoderKL


@dataclass(frozen=True)
class BagelLosses:
    """Per token: cross entropy of every labelled row [n], squared error of every noised latent token [m, C]."""

    ce: Tensor
    mse: Tensor


class BagelNetwork(nn.Module):
    """A decoder of two experts, a ViT to look with, a VAE to draw with."""

    vit_pos_embed: Tensor  # [look_side^2, D], the connector's
    latent_pos_embed: Tensor  # [latent_side^2, D]

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
            self.vae2llm, self.llm2vae = nn.Linear(config.latent_dim, dim), nn.Linear(dim, config.latent_dim)
            self.register_buffer("latent_pos_embed", sincos_pos_embed_2d(config.latent_grid, dim))
            self.vae = AutoencoderKL(config.vae)

    def encode_vit(self, tokens: ImageTokens) -> Tensor:
        """Patches of packed images -> [n, D]: ViT, connector, place."""
        features = self.vision(tokens.content.to(self.dtype), tokens.image_position_ids, tokens.lengths)
        return self.connector(features) + self.vit_pos_embed[tokens.image_position_ids]

    def embed_latents(self, x: Tensor, times: Tensor, where: Tensor) -> Tensor:
        """Latent tokens x [n, C] at times [n] (or [1], one for all) and places [n] -> [n, D]."""
        return self.vae2llm(x.to(self.dtype)) + self.time_embedder(times) + self.latent_pos_embed[where]

    def embed(self, batch: PackedBatch, noise: Tensor | None = None) -> Tensor:
        """Every row of a pack, in its order [N, D]; latent tokens are mixed with `noise` [n, C] by their times."""
        parts, rows = {"text": self.decoder.embed(batch.ids)}, {"text": batch.id_rows}
        if batch.und_images:
            parts["look"], rows["look"] = self.encode_vit(batch.und_images), batch.und_images.rows
        if batch.gen_images:
            x = (
                batch.gen_images.content
                if noise is None
                else add_noise(batch.gen_images.content, noise, batch.timesteps)
            )
            parts["draw"], rows["draw"] = (
                self.embed_latents(x, batch.timesteps, batch.gen_images.image_position_ids),
                batch.gen_images.rows,
            )
        return ExpertRouting(rows).join(parts)

    def llm_to_velocity(self, hidden: Tensor) -> Tensor:
        """The generation expert's last hidden states [n, D] -> velocity [n, C], noise - data."""
        return self.llm2vae(self.decoder.norms["gen"](hidden))

    def forward(self, batch: PackedBatch, noise: Tensor) -> BagelLosses:
        """Training: next-id loss at the labelled rows, flow loss at the noised tokens; noise [n draw tokens, C]."""
        hidden = self.backbone(batch, lambda layer, q, k, v: attention(q, k, v, batch.layout.mask), noise)
        at = (batch.labels != IGNORE_INDEX).nonzero().squeeze(1)
        rows = torch.searchsorted(batch.rows_by_expert["und"], batch.id_rows[at])
        states = self.decoder.norms["und"](hidden["und"][rows])
        ce = linear_cross_entropy(states, self.decoder.head.weight, batch.labels[at])
        if batch.gen_images is None:
            return BagelLosses(ce, noise.new_zeros(0, self.config.latent_dim))
        target = noise - batch.gen_images.content
        v = self.llm_to_velocity(hidden["gen"][batch.noised])
        return BagelLosses(ce, (v.float() - target[batch.noised]).square())

    def backbone(self, batch: PackedBatch, attend: Any, noise: Tensor | None = None) -> RowsByExpert:
        """Last hidden states of a pack's rows by expert, before the final norms; `attend` as in the decoder."""
        return self.decoder(self.embed(batch, noise), batch.layout.position_ids, batch.rows_by_expert, attend)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the decoder; the VAE keeps float32."""
        return self.decoder.embed.weight.dtype

    @torch.inference_mode()
    def decode_latents(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Latent tokens [L, C] -> pixels [3, height, width] in [-1, 1]."""
        return self.vae.decode(
            unpatchify(tokens.float(), self.config.latent_patch_size, size[0] // self.config.latent_downsample)[None]
        )[0]
