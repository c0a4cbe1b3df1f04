"""Janus's network: a causal decoder between two encoders and two heads."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimm.encoders.timm_vit import Tower
from unimm.kernels import attention, linear_cross_entropy
from unimm.models.common.deepseek_network import DeepseekNetwork
from unimm.models.janus.config import STREAM, JanusConfig, ProjectorConfig
from unimm.nn.decoder import Decoder, Parts, Route
from unimm.nn.layers import MLP
from unimm.sequence.packing import Pack
from unimm.sequence.parts import IGNORE, Item, image_item
from unimm.tokenizers.vq import VQ


class Projector(nn.Module):
    """Features of an encoder to rows of the language model."""

    def __init__(self, cfg: ProjectorConfig):
        super().__init__()
        dims = [cfg.dim_in] + [cfg.dim_out] * cfg.depth
        linears = [nn.Linear(a, b) for a, b in pairwise(dims)]
        self.layers = nn.Sequential(*[part for linear in linears for part in (linear, nn.GELU())][:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@dataclass(frozen=True)
class Losses:
    """Cross entropy of every labelled row [n], and of every code that is drawn [m]."""

    text: Tensor
    codes: Tensor


class JanusNetwork(DeepseekNetwork):
    """A decoder, a tower to look with, a VQ tokenizer to draw with, and an aligner for each."""

    def __init__(self, cfg: JanusConfig):
        super().__init__()
        self.cfg = cfg
        d, codes = cfg.decoder.dim, cfg.vq.n_codes
        self.decoder = Decoder(cfg.decoder)
        self.vision, self.aligner = Tower(cfg.tower), Projector(cfg.aligner)
        if (width := self.vision.trunk.num_features) != cfg.aligner.dim_in:
            raise ValueError(
                f"got an aligner_config with input_dim {cfg.aligner.dim_in} for {cfg.tower.name}: expected {width}, its width"
            )
        self.vq = VQ(cfg.vq)
        self.code_embed, self.code_aligner = nn.Embedding(codes, cfg.vq.code_dim), Projector(cfg.code_aligner)
        self.code_head = MLP(d, cfg.code_head, codes, "gelu")

    def embed(self, batch: Pack) -> Tensor:
        """Every row of a pack, in its order [N, D]: texts and markers, pictures seen, codes drawn."""
        parts, rows = {"text": self.decoder.embed(batch.ids)}, {"text": batch.id_rows}
        if batch.look:
            parts["look"], rows["look"] = self.aligner(self.seen(batch.look)), batch.look.rows
        if batch.draw:
            parts["draw"], rows["draw"] = self.code_rows(batch.draw.content), batch.draw.rows
        return Route(rows).join(parts)

    def code_rows(self, codes: Tensor) -> Tensor:
        """Codes [n] as rows of the language model [n, D]."""
        return self.code_aligner(self.code_embed(codes))

    def hidden(self, batch: Pack, attend: Any) -> Parts:
        """Last hidden states of a pack's rows, before the final norm."""
        positions = batch.layout.positions
        return self.decoder(self.embed(batch), positions, {STREAM: torch.arange(len(positions))}, attend)

    def code_logits(self, hidden: Tensor) -> Tensor:
        """Last hidden states [n, D] -> the next code [n, V]."""
        return self.code_head(self.decoder.norms[STREAM](hidden))

    def forward(self, batch: Pack) -> Losses:
        """Training: next-id loss at the labelled rows; each code of a drawn picture is predicted by the row before it."""
        hidden = self.hidden(batch, lambda layer, q, k, v: attention(q, k, v, batch.layout.mask))[STREAM]
        at = (batch.labels != IGNORE).nonzero().squeeze(1)
        said = self.decoder.norms[STREAM](hidden[batch.id_rows[at]])
        text = linear_cross_entropy(said, self.decoder.head.weight, batch.labels[at])
        if batch.draw is None:
            return Losses(text, text.new_zeros(0))
        logits = self.code_logits(hidden[batch.draw.rows - 1])
        return Losses(text, F.cross_entropy(logits.float(), batch.draw.content, reduction="none"))

    def drawn(self, codes: Tensor, boi: int) -> Item:
        """A picture to draw, codes [n], behind its marker."""
        return image_item("draw", codes, torch.arange(len(codes)), markers=(boi,), causal=True)
