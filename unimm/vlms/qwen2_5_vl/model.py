"""Qwen2.5-VL: a language model that reads texts and pictures; a part of MetaQuery, UniWorld and Qwen-Image.

Bai et al. 2025, arXiv 2502.13923. Everything is read causally; positions are (time, row, column), which are equal for
text. docs/originals/blocks.md, "Qwen2.5-VL".

Axes: N packed rows, n rows or cells, D model, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from unimm.checkpoint.keymap import Table
from unimm.nn.decoder import Decoder
from unimm.sequence.packing import Pack, Tokens
from unimm.vlms.base import Reader
from unimm.vlms.qwen2_5_vl.config import QwenVLConfig
from unimm.vlms.qwen2_5_vl.processor import QwenPrompts
from unimm.vlms.qwen2_5_vl.vision import QwenVision
from unimm.vlms.qwen2_5_vl.weights import nested, qwen_keys


class QwenVL(Reader):
    """A decoder and a tower to look with."""

    Config = QwenVLConfig

    def __init__(self, cfg: QwenVLConfig):
        super().__init__()
        self.cfg = cfg
        self.decoder = Decoder(cfg.decoder)
        self.vision = QwenVision(cfg.vision)

    def keys(self, shapes: Mapping[str, Any]) -> Table:
        """The key table for files of these names, in either spelling; for none the older one."""
        return qwen_keys(head=not self.cfg.decoder.tied, nested=nested(shapes))

    @property
    def prompts(self) -> QwenPrompts:
        """How this model's prompts are made."""
        cfg = self.cfg
        return QwenPrompts(tokenizer=self.tokenizer, pixels=cfg.pixels, vision=cfg.vision, markers=cfg.markers)

    def seen(self, tokens: Tokens) -> Tensor:
        """Pictures of a pack -> a row for each of their cells [n, D]."""
        m, grids = self.cfg.vision.merge, []
        for places in tokens.places.split(tokens.lengths):
            h, w = (places[:, 1:].amax(0) + 1).tolist()
            grids.append((len(places) // (h * w), h * m, w * m))
        return self.vision(rearrange(tokens.content, "n (s f) -> (n s) f", s=m * m).to(self.dtype), grids)

    def positions(self, batch: Pack) -> Tensor:
        """Rotary positions of a pack: [N] without pictures, else (time, row, column) [N, 3], equal at texts."""
        at, look = batch.layout.positions, batch.look
        if look is None:
            return at
        first = torch.tensor(look.lengths).cumsum(0) - torch.tensor(look.lengths)
        begin = at[look.rows[first.to(at.device)]].repeat_interleave(torch.tensor(look.lengths, device=at.device))
        return at[:, None].repeat(1, 3).index_copy(0, look.rows, begin[:, None] + look.places)
