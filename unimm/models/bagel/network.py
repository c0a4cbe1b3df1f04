"""BAGEL's network: two experts in one decoder, a ViT, a VAE and the flow head.

Deng et al. 2025, arXiv 2505.14683. Released code: github.com/ByteDance-Seed/Bagel at 056b5fd, Apache-2.0.
Two experts share every attention: "und" owns text, ViT tokens and all markers, "gen" owns latent tokens.

Axes: N packed tokens, L latent tokens of a picture, D model, C features of a latent token, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unimm.encoders.siglip_navit import NaViT
from unimm.generation.flow import add_noise
from unimm.kernels import attention, linear_cross_entropy
from unimm.models.bagel.config import BagelConfig
from unimm.nn.decoder import Decoder, Parts, Route
from unimm.nn.layers import MLP
from unimm.nn.patches import unpatchify
from unimm.nn.pos_embed import sincos_2d
from unimm.nn.timestep import TimeEmbedding
from unimm.sequence.packing import Pack, Tokens
from unimm.sequence.parts import IGNORE
from unimm.tokenizers.kl import VAE


@dataclass(frozen=True)
class Losses:
    """Per token: cross entropy of every labelled row [n], squared error of every noised latent token [m, C]."""

    ce: Tensor
    mse: Tensor


class BagelNetwork(nn.Module):
    """A decoder of two experts, a ViT to look with, a VAE to draw with."""

    look_places: Tensor  # [look_side^2, D], the connector's
    latent_places: Tensor  # [latent_side^2, D]

    def __init__(self, cfg: BagelConfig):
        super().__init__()
        self.cfg = cfg
        dim = cfg.decoder.dim
        self.decoder = Decoder(cfg.decoder)
        if cfg.vision:
            self.vision = NaViT(cfg.vision)
            self.connector = MLP(cfg.vision.dim, dim, dim, cfg.connector_act)
            self.register_buffer("look_places", sincos_2d(cfg.look_side, dim))
        if cfg.draws:
            self.time = TimeEmbedding(dim)
            self.from_latent, self.to_velocity = nn.Linear(cfg.latent_dim, dim), nn.Linear(dim, cfg.latent_dim)
            self.register_buffer("latent_places", sincos_2d(cfg.latent_side, dim))
            self.vae = VAE(cfg.vae)

    def look(self, tokens: Tokens) -> Tensor:
        """Patches of packed images -> [n, D]: ViT, connector, place."""
        seen = self.vision(tokens.content.to(self.dtype), tokens.places, tokens.lengths)
        return self.connector(seen) + self.look_places[tokens.places]

    def latent_tokens(self, x: Tensor, times: Tensor, where: Tensor) -> Tensor:
        """Latent tokens x [n, C] at times [n] (or [1], one for all) and places [n] -> [n, D]."""
        return self.from_latent(x.to(self.dtype)) + self.time(times) + self.latent_places[where]

    def embed(self, batch: Pack, noise: Tensor | None = None) -> Tensor:
        """Every row of a pack, in its order [N, D]; latent tokens are mixed with `noise` [n, C] by their times."""
        parts, rows = {"text": self.decoder.embed(batch.ids)}, {"text": batch.id_rows}
        if batch.look:
            parts["look"], rows["look"] = self.look(batch.look), batch.look.rows
        if batch.draw:
            x = batch.draw.content if noise is None else add_noise(batch.draw.content, noise, batch.times)
            parts["draw"], rows["draw"] = self.latent_tokens(x, batch.times, batch.draw.places), batch.draw.rows
        return Route(rows).join(parts)

    def velocity(self, hidden: Tensor) -> Tensor:
        """The generation expert's last hidden states [n, D] -> velocity [n, C], noise - data."""
        return self.to_velocity(self.decoder.norms["gen"](hidden))

    def forward(self, batch: Pack, noise: Tensor) -> Losses:
        """Training: next-id loss at the labelled rows, flow loss at the noised tokens; noise [n draw tokens, C]."""
        hidden = self.hidden(batch, lambda layer, q, k, v: attention(q, k, v, batch.layout.mask), noise)
        at = (batch.labels != IGNORE).nonzero().squeeze(1)
        rows = torch.searchsorted(batch.streams["und"], batch.id_rows[at])
        said = self.decoder.norms["und"](hidden["und"][rows])
        ce = linear_cross_entropy(said, self.decoder.head.weight, batch.labels[at])
        if batch.draw is None:
            return Losses(ce, noise.new_zeros(0, self.cfg.latent_dim))
        target = noise - batch.draw.content
        v = self.velocity(hidden["gen"][batch.noised])
        return Losses(ce, (v.float() - target[batch.noised]).square())

    def hidden(self, batch: Pack, attend: Any, noise: Tensor | None = None) -> Parts:
        """Last hidden states of a pack's rows by expert, before the final norms; `attend` as in the decoder."""
        return self.decoder(self.embed(batch, noise), batch.layout.positions, batch.streams, attend)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the decoder; the VAE keeps float32."""
        return self.decoder.embed.weight.dtype

    @torch.inference_mode()
    def paint(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Latent tokens [L, C] -> pixels [3, height, width] in [-1, 1]."""
        return self.vae.decode(unpatchify(tokens.float(), self.cfg.latent_patch, size[0] // self.cfg.stride)[None])[0]
