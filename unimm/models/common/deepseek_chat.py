"""Models that talk in DeepSeek's conversation format about pictures of one size: the half that Janus and JanusFlow share.

A prompt is text whose placeholders become pictures; everything is read causally. docs/originals/janus.md, "Tokenizer"
and "Image processor".
"""

from collections.abc import Sequence
from typing import Any

from typing_extensions import Self

from unimm.generation.decode import TextStream, decode_text
from unimm.generation.text_sampling import TextSampling
from unimm.models.base import UnifiedModel
from unimm.models.common.deepseek_network import DeepseekNetwork
from unimm.models.common.deepseek_processor import DeepseekChatConfig, DeepseekProcessor, JanusSpecialTokens
from unimm.nn.packed_linear import optimize_for_cpu
from unimm.processing.images.deepseek_vl import DeepseekVLImageProcessor
from unimm.processing.requests import ImageInput
from unimm.sequence.parts import Part
from unimm.vlms.chat import MLLMChat


class DeepseekChatModel(MLLMChat, DeepseekNetwork, UnifiedModel):
    """A decoder that is shown pictures through a tower and an aligner, and asked about them."""

    image_processor: DeepseekVLImageProcessor  # the rule for pictures that the tower sees
    chat_config: DeepseekChatConfig
    fallback_special_tokens: JanusSpecialTokens | None = None  # the markers of a checkpoint without tokenizer

    # ---- faster on a CPU

    def optimize_for_cpu(self, *, int8: bool = False) -> Self:
        """This model made ready to write and draw on a CPU: about twice as fast a token, with `int8` three times.

        Its weights are this model's own, the large ones packed a second time for products of few rows: as many bytes
        again, and half a minute for each billion of them (float32: a whole one). Results are the same to within rounding.
        Weights changed later, by training or loading, are not packed again: prepare the trained model.

        int8: the decoder's blocks are kept in int8 alone, a byte a weight (drop this model to have its bytes back), each
        product about 1 % off; such a model neither trains nor saves. Heads and encoders stay as they are.

        On another device, or where PyTorch has no packed products (not x86), nothing is packed and nothing changes; with
        int8 that is a ValueError.
        """
        return optimize_for_cpu(self, skip=("vision",), int8=("decoder.blocks",) if int8 else ())

    # ---- the verbs

    def understand(
        self,
        images: ImageInput | Sequence | None,
        question: str | Sequence[str],
        *,
        stream: bool = False,
        text_sampling: TextSampling | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Any:
        """Answer a question about pictures: a str; for a batch of questions a list; with `stream`, pieces as they come.

        images: for one question a picture, several, or None; for a batch one of these each. They stand before the
        question, or where it says <image_placeholder>. Raises ValueError for bad input.
        """
        if stream and not isinstance(question, str) and len(question) > 1:
            raise ValueError(f"got {len(question)} questions to stream: expected one")
        return super().understand(images, question, stream=stream, text_sampling=text_sampling, seed=seed)

    # ---- prompts

    @property
    def processor(self) -> DeepseekProcessor:
        """How this model's prompts are made."""
        return DeepseekProcessor(
            tokenizer=self.tokenizer,
            image_processor=self.image_processor,
            patch_size=self.vision.patch_size,
            chat_config=self.chat_config,
            fallback_special_tokens=self.fallback_special_tokens,
        )

    @property
    def special_tokens(self) -> JanusSpecialTokens:
        """The ids of the markers. Raises ValueError for a checkpoint without tokenizer, or one that lacks a marker."""
        return self.processor.special_tokens

    def decode_answer(
        self, prompts: Sequence[list[Part]], text_sampling: TextSampling | None, seed: Sequence[int]
    ) -> TextStream:
        """The assistant's words after each prompt."""
        text_sampling = (text_sampling or TextSampling()).with_default_max_tokens(self.chat_config.max_tokens)
        contexts, last = self.prefill_prompts(prompts)
        session = self.decode_session(contexts, text_sampling.token_limit)
        steps = decode_text(session, last, end=self.special_tokens.eos, sampling=text_sampling, seeds=seed)
        return TextStream(steps, self.processor.text_tokenizer.decode, len(prompts), text_sampling.stop)
