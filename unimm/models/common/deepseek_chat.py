"""Models that talk in DeepSeek's conversation format about pictures of one size: the half that Janus and JanusFlow share.

A prompt is text whose placeholders become pictures; everything is read causally. docs/originals/janus.md, "Tokenizer"
and "Image processor".
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from typing_extensions import Self

from unimm.generation.decode import TextStream, speak
from unimm.generation.text_sampling import TextSampling
from unimm.models.base import UnifiedModel
from unimm.models.common.deepseek_network import DeepseekNetwork
from unimm.models.common.deepseek_processor import Markers, Prompts, Talk
from unimm.nn.decoder import Parts
from unimm.nn.packed_linear import prepared
from unimm.processing.images.deepseek_vl import PadSquare
from unimm.processing.requests import Picture
from unimm.sequence.packing import Pack
from unimm.sequence.parts import Item
from unimm.vlms.chat import Chatting


class Conversing(Chatting, DeepseekNetwork, UnifiedModel):
    """A decoder that is shown pictures through a tower and an aligner, and asked about them."""

    pixels: PadSquare  # the rule for pictures that the tower sees
    talk: Talk
    special: Markers | None = None  # the markers of a checkpoint without tokenizer

    @abstractmethod
    def hidden(self, batch: Pack, attend: Any) -> Parts:
        """Last hidden states of every row of a pack, before the final norm."""

    # ---- faster on a CPU

    def prepared(self, *, int8: bool = False) -> Self:
        """This model made ready to write and draw on a CPU: about twice as fast a token, with `int8` three times.

        Its weights are this model's own, the large ones packed a second time for products of few rows: as many bytes
        again, and half a minute for each billion of them (float32: a whole one). Results are the same to within rounding.
        Weights changed later, by training or loading, are not packed again: prepare the trained model.

        int8: the decoder's blocks are kept in int8 alone, a byte a weight (drop this model to have its bytes back), each
        product about 1 % off; such a model neither trains nor saves. Heads and encoders stay as they are.

        On another device, or where PyTorch has no packed products (not x86), nothing is packed and nothing changes; with
        int8 that is a ValueError.
        """
        return prepared(self, but=("vision",), int8=("decoder.blocks",) if int8 else ())

    # ---- the verbs

    def understand(
        self,
        images: Picture | Sequence | None,
        question: str | Sequence[str],
        *,
        think: bool = False,
        stream: bool = False,
        text: TextSampling | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Any:
        """Answer a question about pictures: a str; for a batch of questions a list; with `stream`, pieces as they come.

        images: for one question a picture, several, or None; for a batch one of these each. They stand before the
        question, or where it says <image_placeholder>. Raises ValueError for bad input.
        """
        if think:
            raise NotImplementedError(f"{type(self).__name__} was not trained to think first: Bagel was")
        if stream and not isinstance(question, str) and len(question) > 1:
            raise ValueError(f"got {len(question)} questions to stream: expected one")
        return super().understand(images, question, stream=stream, text=text, seed=seed)

    def interleave(
        self, items: Sequence[str | Picture], *, outputs: Sequence[str] = ("image",), seed: int = 0
    ) -> Iterator:
        """Not for this family."""
        raise NotImplementedError(
            f"{type(self).__name__} gives one text or one kind of picture a call: Bagel interleaves"
        )

    # ---- prompts

    @property
    def prompts(self) -> Prompts:
        """How this model's prompts are made."""
        return Prompts(
            tokenizer=self.tokenizer, pixels=self.pixels, patch=self.vision.patch, talk=self.talk, special=self.special
        )

    @property
    def markers(self) -> Markers:
        """The ids of the markers. Raises ValueError for a checkpoint without tokenizer, or one that lacks a marker."""
        return self.prompts.markers

    def written(self, prompts: Sequence[list[Item]], sampling: TextSampling | None, seed: Sequence[int]) -> TextStream:
        """The assistant's words after each prompt."""
        sampling = (sampling or TextSampling()).within(self.talk.max_tokens)
        contexts, last = self.prefilled(prompts)
        steps = speak(self, contexts, last, end=self.markers.eos, sampling=sampling, seeds=seed)
        return TextStream(steps, self.prompts.words.decode, len(prompts), sampling.stop)
