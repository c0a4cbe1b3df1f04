"""LLaVA-OneVision: a vision-language model that encodes an image whole and in tiles; a part of MetaQuery.

Li et al. 2024, arXiv 2408.03326. All rows are causal, at positions that count them. docs/originals/blocks.md,
"LLaVA-OneVision" and "SigLIP2".

Axes: N packed rows, n rows of an image, T tiles, D model, F features of a tile.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unimm.checkpoint.keymap import KeyMap
from unimm.encoders.flops import siglip_flops
from unimm.encoders.siglip import SiglipVisionEncoder
from unimm.nn.decoder import Decoder
from unimm.nn.flops import StepFlops
from unimm.nn.layers import MLP
from unimm.sequence.packing import ImageTokens, PackedBatch
from unimm.vlms.base import VisionLanguageModel
from unimm.vlms.llava_onevision.config import LlavaConfig
from unimm.vlms.llava_onevision.processor import IMAGE_TOKEN, LlavaOneVisionProcessor
from unimm.vlms.llava_onevision.vision import arrange_tiles
from unimm.vlms.llava_onevision.weights import llava_key_map
from unimm.vlms.processor import IM_END, IM_START


class LlavaOneVision(VisionLanguageModel):
    """LLaVA-OneVision with its tokenizer: a decoder, a vision encoder and a projector between them."""

    config_class = LlavaConfig
    SPECIAL_TOKENS = (IM_START, IM_END, IMAGE_TOKEN, "<video>")

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.decoder = Decoder(config.decoder)
        self.vision = SiglipVisionEncoder(config.vision)
        self.projector = MLP(config.vision.dim, config.decoder.dim, config.decoder.dim, config.projector_act)
        self.image_newline = nn.Parameter(torch.randn(config.decoder.dim) * config.decoder.dim**-0.5)

    def key_map(self, shapes: Mapping[str, Any]) -> KeyMap:
        """The key map for files whose tensors have these names, nested or not; for none, not nested."""
        return llava_key_map(self.config, shapes)

    @property
    def processor(self) -> LlavaOneVisionProcessor:
        """Conversations to parts."""
        return LlavaOneVisionProcessor(
            tokenizer=self.tokenizer,
            image_processor=self.config.image_processor,
            special_tokens=self.config.special_tokens,
        )

    def position_ids(self, batch: PackedBatch) -> Tensor:
        """The rotary positions of a batch [N], which count rows."""
        return batch.layout.position_ids

    def image_features(self, tokens: ImageTokens) -> Tensor:
        """The embeddings of a batch's images, one row for each of their tokens [n, D]."""
        assert tokens.pixel_values is not None, "the processor of this model makes parts with tiles"
        # the encoder's last layer, before its norm, as the decoder was trained with
        features = self.projector(self.vision.pre_norm_features(tokens.pixel_values.to(self.dtype)))
        first = torch.tensor(tokens.lengths).cumsum(0) - torch.tensor(tokens.lengths)
        sizes = tokens.content[first.to(tokens.content.device)].tolist()
        rows = [
            arrange_tiles(image, self.image_newline, (height, width), self.config.image_processor)
            for image, (height, width, _) in zip(features.split([n for *_, n in sizes]), sizes, strict=True)
        ]
        return torch.cat(rows)

    def whole_image_features(self, tokens: ImageTokens) -> Tensor:
        """The embeddings of P images without tiles, patch by patch [P, n, D], without the newline behind each."""
        return self.image_features(tokens).unflatten(0, (len(tokens.lengths), -1))[:, :-1]

    def count_image_flops(self, count: StepFlops, tokens: ImageTokens) -> bool:
        """Add the FLOPs of `image_features`. Returns whether the embeddings have gradients."""
        assert tokens.pixel_values is not None, "the processor of this model makes parts with tiles"
        n_tiles = len(tokens.pixel_values)
        features = siglip_flops(count, self.vision, n_tiles)
        projected = count.chain(n_tiles * self.vision.config.grid_side**2, features, self.projector)
        return projected or self.image_newline.requires_grad
