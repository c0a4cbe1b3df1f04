"""LLaVA-OneVision: a Qwen2 that reads texts and pictures, which it sees whole and in tiles; a part of MetaQuery.

Li et al. 2024, arXiv 2408.03326. Everything is read causally, at positions that count rows. docs/originals/blocks.md,
"LLaVA-OneVision" and "SigLIP2".

Axes: N packed rows, n rows of a picture, T tiles, D model, F features of a tile.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unimm.checkpoint.keymap import KeyMap
from unimm.encoders.siglip import SiglipVisionEncoder
from unimm.nn.decoder import Decoder
from unimm.nn.layers import MLP
from unimm.sequence.packing import ImageTokens, PackedBatch
from unimm.vlms.base import VisionLanguageModel
from unimm.vlms.llava_onevision.config import LlavaConfig
from unimm.vlms.llava_onevision.processor import IMAGE_TOKEN, LlavaOneVisionProcessor
from unimm.vlms.llava_onevision.vision import arrange_tiles
from unimm.vlms.llava_onevision.weights import llava_key_map


class LlavaOneVision(VisionLanguageModel):
    """A decoder, a tower to look with, and what brings its features to the decoder's width."""

    config_class = LlavaConfig
    SPECIAL_TOKENS = (IMAGE_TOKEN, "<video>")

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.decoder = Decoder(config.decoder)
        self.vision = SiglipVisionEncoder(config.vision)
        self.projector = MLP(config.vision.dim, config.decoder.dim, config.decoder.dim, config.projector_act)
        self.image_newline = nn.Parameter(torch.randn(config.decoder.dim) * config.decoder.dim**-0.5)

    def key_map(self, shapes: Mapping[str, Any]) -> KeyMap:
        """The key table for files of these names, in either spelling; for none the older one."""
        return llava_key_map(self.config, shapes)

    @property
    def processor(self) -> LlavaOneVisionProcessor:
        """How this model's prompts are made."""
        return LlavaOneVisionProcessor(
            tokenizer=self.tokenizer,
            image_processor=self.config.image_processor,
            special_tokens=self.config.special_tokens,
        )

    def position_ids(self, batch: PackedBatch) -> Tensor:
        """The rotary positions of a batch [N], which count rows."""
        return batch.layout.position_ids

    def image_features(self, tokens: ImageTokens) -> Tensor:
        """Pictures of a pack -> a row for each of their tokens [n, D]."""
        assert tokens.pixel_values is not None, "the prompts of this model bring tiles"
        # the tower's last layer, before its norm, as the decoder was trained with
        features = self.projector(self.vision.pre_norm_features(tokens.pixel_values.to(self.dtype)))
        first = torch.tensor(tokens.lengths).cumsum(0) - torch.tensor(tokens.lengths)
        sizes = tokens.content[first.to(tokens.content.device)].tolist()
        parts, rule = features.split([n for *_, n in sizes]), self.config.image_processor
        return torch.cat(
            [
                arrange_tiles(part, self.image_newline, (h, w), rule)
                for part, (h, w, _) in zip(parts, sizes, strict=True)
            ]
        )
