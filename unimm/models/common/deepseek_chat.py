"""The halves of a network and of a model that Janus and JanusFlow share.

A prompt is text in DeepSeek's chat format in which images of one size stand; all of it is causal.
docs/originals/janus.md, "Tokenizer" and "Image processor".

Axes: N packed rows, n image tokens, D model, F features of the vision encoder, h w grid, p patch, C channels.
"""

from typing import ClassVar

from einops import rearrange
from torch import Tensor

from unimm.encoders.timm_vit import TimmVisionEncoder
from unimm.generation.causal_lm import CausalLM
from unimm.kernels import linear_cross_entropy
from unimm.models.base import UnifiedModel
from unimm.models.common.deepseek_processor import DeepseekChatConfig, DeepseekProcessor, JanusSpecialTokens
from unimm.nn.decoder import Decoder
from unimm.processing.images.deepseek_vl import DeepseekVLImageProcessor
from unimm.processing.requests import parse_size
from unimm.sequence.packing import ImageTokens, PackedBatch
from unimm.sequence.parts import IGNORE_INDEX
from unimm.vlms.chat import MLLMChat
from unimm.vlms.llama_layout import EXPERT


class DeepseekNetwork(CausalLM):
    """A causal decoder, and a vision encoder for the images that it understands."""

    decoder: Decoder
    vision: TimmVisionEncoder

    def image_features(self, tokens: ImageTokens) -> Tensor:
        """The vision encoder's features of a batch's images, [n, F]."""
        if tokens.encoded:
            return tokens.content
        p = self.vision.patch_size
        side = self.vision.grid_side
        images = rearrange(tokens.content, "(b h w) (p q c) -> b c (h p) (w q)", h=side, w=side, p=p, q=p)
        return self.vision(images.to(self.dtype)).flatten(0, 1)

    def text_loss(self, batch: PackedBatch, hidden: Tensor) -> Tensor:
        """Cross entropy of every labelled row, from the last hidden states of all rows [N, D]."""
        labelled = (batch.labels != IGNORE_INDEX).nonzero().squeeze(1)
        states = self.decoder.norms[EXPERT](hidden[batch.id_rows[labelled]])
        return linear_cross_entropy(states, self.decoder.head.weight, batch.labels[labelled])


class DeepseekChatModel(MLLMChat, DeepseekNetwork, UnifiedModel):
    """The half of a model that Janus and JanusFlow share: the processor, and the answers' end."""

    supports_editing: ClassVar[bool] = False
    image_processor: DeepseekVLImageProcessor  # of the images that it understands
    chat_config: DeepseekChatConfig
    fallback_special_tokens: JanusSpecialTokens | None = None  # for a checkpoint without tokenizer

    @property
    def processor(self) -> DeepseekProcessor:
        """Conversations to parts."""
        return DeepseekProcessor(
            tokenizer=self.tokenizer,
            image_processor=self.image_processor,
            patch_size=self.vision.patch_size,
            chat_config=self.chat_config,
            fallback_special_tokens=self.fallback_special_tokens,
        )

    @property
    def special_tokens(self) -> JanusSpecialTokens:
        """The ids of the special tokens. Raises ValueError for a tokenizer that lacks one, or none at all."""
        return self.processor.special_tokens

    @property
    def eos_ids(self) -> tuple[int]:
        """The id that ends an answer."""
        return (self.special_tokens.eos,)

    @property
    def max_answer_tokens(self) -> int:
        """The most new ids of an answer, where a call does not say."""
        return self.chat_config.max_tokens

    def check_image_size(self, size: tuple[int, int] | None, trained: tuple[int, int]) -> None:
        """Raise ValueError for another (height, width) than the one that the model was trained for."""
        if size is not None and parse_size(size) != trained:
            raise ValueError(
                f"cannot generate (height, width) {tuple(size)}: this model was trained for {trained} alone; leave "
                "size out"
            )
