"""Qwen2.5-VL: a vision-language model; a part of MetaQuery, UniWorld and Qwen-Image.

Bai et al. 2025, arXiv 2502.13923. All rows are causal; their positions are (time, row, column), which are equal for
text. docs/originals/blocks.md, "Qwen2.5-VL".

Axes: N packed rows, n rows or cells, D model, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from unimm.checkpoint.keymap import KeyMap
from unimm.nn.decoder import Decoder
from unimm.nn.flops import StepFlops
from unimm.processing.images.qwen2_vl import PatchGrid
from unimm.sequence.packing import ImageTokens, PackedBatch
from unimm.vlms.base import VisionLanguageModel
from unimm.vlms.processor import IM_END, IM_START
from unimm.vlms.qwen2_5_vl.config import QwenVLConfig
from unimm.vlms.qwen2_5_vl.flops import qwen_vision_flops
from unimm.vlms.qwen2_5_vl.processor import IMAGE_PAD, VISION_END, VISION_START, QwenVLProcessor
from unimm.vlms.qwen2_5_vl.vision import QwenVisionEncoder
from unimm.vlms.qwen2_5_vl.weights import has_nested_names, qwen_key_map


class QwenVL(VisionLanguageModel):
    """Qwen2.5-VL with its tokenizer: a decoder, and a vision encoder for images of any size."""

    config_class = QwenVLConfig
    SPECIAL_TOKENS = (IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD)
    # as its page stated it in 2025
    NON_COMMERCIAL: ClassVar[Mapping[str, str]] = {"Qwen/Qwen2.5-VL-3B-Instruct": "Qwen Research License"}

    def __init__(self, config: QwenVLConfig):
        super().__init__()
        self.config = config
        self.decoder = Decoder(config.decoder)
        self.vision = QwenVisionEncoder(config.vision)

    def key_map(self, shapes: Mapping[str, Any]) -> KeyMap:
        """The key map for files whose tensors have these names, nested or not; for none, not nested."""
        return qwen_key_map(head=not self.config.decoder.tie_word_embeddings, nested=has_nested_names(shapes))

    @property
    def processor(self) -> QwenVLProcessor:
        """Conversations to parts."""
        return QwenVLProcessor(
            tokenizer=self.tokenizer,
            image_processor=self.config.image_processor,
            vision_config=self.config.vision,
            special_tokens=self.config.special_tokens,
        )

    def image_features(self, tokens: ImageTokens) -> Tensor:
        """The embeddings of a batch's images, one row for each of their cells [n, D]."""
        m = self.config.vision.spatial_merge_size
        patches = rearrange(tokens.content, "n (s f) -> (n s) f", s=m * m)
        return self.vision(patches.to(self.dtype), self._patch_grids(tokens))

    def whole_image_features(self, tokens: ImageTokens) -> Tensor:
        """The embeddings of P equally large images, cell by cell [P, n, D]."""
        return self.image_features(tokens).unflatten(0, (len(tokens.lengths), -1))

    def count_image_flops(self, count: StepFlops, tokens: ImageTokens) -> bool:
        """Add the FLOPs of `image_features`. Returns whether the embeddings have gradients."""
        return qwen_vision_flops(count, self.vision, self._patch_grids(tokens))

    def _patch_grids(self, tokens: ImageTokens) -> list[PatchGrid]:
        """The grid of patches of each image of a batch."""
        m = self.config.vision.spatial_merge_size
        grids = []
        for positions in tokens.image_position_ids.split(tokens.lengths):
            h, w = (positions[:, 1:].amax(0) + 1).tolist()
            grids.append((len(positions) // (h * w), h * m, w * m))
        return grids

    def position_ids(self, batch: PackedBatch) -> Tensor:
        """The rotary positions of a batch: [N] without images, else (time, row, column) [N, 3], equal for text."""
        rows = batch.layout.position_ids
        images = batch.und_images
        if images is None:
            return rows
        lengths = torch.tensor(images.lengths, device=rows.device)
        first = lengths.cumsum(0) - lengths
        # the positions of an image's cells count from where it begins
        begin = rows[images.rows[first]].repeat_interleave(lengths)
        return rows[:, None].repeat(1, 3).index_copy(0, images.rows, begin[:, None] + images.image_position_ids)
