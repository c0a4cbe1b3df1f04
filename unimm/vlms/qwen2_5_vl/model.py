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

from unimm.checkpoint.keymap import KeyMap
from unimm.nn.decoder import Decoder
from unimm.sequence.packing import ImageTokens, PackedBatch
from unimm.vlms.base import VisionLanguageModel
from unimm.vlms.qwen2_5_vl.config import QwenVLConfig
from unimm.vlms.qwen2_5_vl.processor import QwenVLProcessor
from unimm.vlms.qwen2_5_vl.vision import QwenVisionEncoder
from unimm.vlms.qwen2_5_vl.weights import has_nested_names, qwen_key_map


class QwenVL(VisionLanguageModel):
    """A decoder and a tower to look with."""

    config_class = QwenVLConfig
    NON_COMMERCIAL = {"Qwen/Qwen2.5-VL-3B-Instruct": "Qwen Research License"}  # as its page stated it in 2025

    def __init__(self, config: QwenVLConfig):
        super().__init__()
        self.config = config
        self.decoder = Decoder(config.decoder)
        self.vision = QwenVisionEncoder(config.vision)

    def key_map(self, shapes: Mapping[str, Any]) -> KeyMap:
        """The key table for files of these names, in either spelling; for none the older one."""
        return qwen_key_map(head=not self.config.decoder.tie_word_embeddings, nested=has_nested_names(shapes))

    @property
    def processor(self) -> QwenVLProcessor:
        """How this model's prompts are made."""
        cfg = self.config
        return QwenVLProcessor(
            tokenizer=self.tokenizer,
            image_processor=cfg.image_processor,
            vision_config=cfg.vision,
            special_tokens=cfg.special_tokens,
        )

    def image_features(self, tokens: ImageTokens) -> Tensor:
        """Pictures of a pack -> a row for each of their cells [n, D]."""
        m, grids = self.config.vision.spatial_merge_size, []
        for places in tokens.image_position_ids.split(tokens.lengths):
            h, w = (places[:, 1:].amax(0) + 1).tolist()
            grids.append((len(places) // (h * w), h * m, w * m))
        return self.vision(rearrange(tokens.content, "n (s f) -> (n s) f", s=m * m).to(self.dtype), grids)

    def position_ids(self, batch: PackedBatch) -> Tensor:
        """Rotary positions of a pack: [N] without pictures, else (time, row, column) [N, 3], equal at texts."""
        at, look = batch.layout.position_ids, batch.und_images
        if look is None:
            return at
        first = torch.tensor(look.lengths).cumsum(0) - torch.tensor(look.lengths)
        begin = at[look.rows[first.to(at.device)]].repeat_interleave(torch.tensor(look.lengths, device=at.device))
        return at[:, None].repeat(1, 3).index_copy(0, look.rows, begin[:, None] + look.image_position_ids)
