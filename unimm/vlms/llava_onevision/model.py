"""LLaVA-OneVision: a Qwen2 that reads texts and pictures, which it sees whole and in tiles; a part of MetaQuery.

Li et al. 2024, arXiv 2408.03326. Everything is read causally, at positions that count rows. docs/originals/blocks.md,
"LLaVA-OneVision" and "SigLIP2".

Axes: N packed rows, n rows of a picture, T tiles, D model, F features of a tile.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unimm.checkpoint.keymap import Table
from unimm.encoders.siglip import Siglip
from unimm.nn.decoder import Decoder
from unimm.nn.layers import MLP
from unimm.sequence.packing import Tokens
from unimm.vlms.base import Reader
from unimm.vlms.llava_onevision.config import LlavaConfig
from unimm.vlms.llava_onevision.processor import PLACEHOLDER, LlavaPrompts
from unimm.vlms.llava_onevision.vision import arranged
from unimm.vlms.llava_onevision.weights import llava_keys


class LlavaOneVision(Reader):
    """A decoder, a tower to look with, and what brings its features to the decoder's width."""

    Config = LlavaConfig
    SPECIAL = (PLACEHOLDER, "<video>")

    def __init__(self, cfg: LlavaConfig):
        super().__init__()
        self.cfg = cfg
        self.decoder = Decoder(cfg.decoder)
        self.vision = Siglip(cfg.vision)
        self.projector = MLP(cfg.vision.dim, cfg.decoder.dim, cfg.decoder.dim, cfg.act)
        self.newline = nn.Parameter(torch.randn(cfg.decoder.dim) * cfg.decoder.dim**-0.5)

    def keys(self, shapes: Mapping[str, Any]) -> Table:
        """The key table for files of these names, in either spelling; for none the older one."""
        return llava_keys(self.cfg, shapes)

    @property
    def prompts(self) -> LlavaPrompts:
        """How this model's prompts are made."""
        return LlavaPrompts(tokenizer=self.tokenizer, pixels=self.cfg.pixels, markers=self.cfg.markers)

    def seen(self, tokens: Tokens) -> Tensor:
        """Pictures of a pack -> a row for each of their tokens [n, D]."""
        assert tokens.tiles is not None, "the prompts of this model bring tiles"
        # the tower's last layer, before its norm, as the decoder was trained with
        features = self.projector(self.vision.layers(tokens.tiles.to(self.dtype)))
        first = torch.tensor(tokens.lengths).cumsum(0) - torch.tensor(tokens.lengths)
        sizes = tokens.content[first.to(tokens.content.device)].tolist()
        parts, rule = features.split([n for *_, n in sizes]), self.cfg.pixels
        return torch.cat(
            [arranged(part, self.newline, (h, w), rule) for part, (h, w, _) in zip(parts, sizes, strict=True)]
        )
