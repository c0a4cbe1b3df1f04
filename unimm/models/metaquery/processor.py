"""What MetaQuery asks of its reader: a system prompt, pictures, a caption, and the queries where an answer would begin.

Made without the model, so that training can make its batches ahead. docs/originals/metaquery.md, "Queries and prompt".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from PIL import Image

from unimm.processing.chat_templates import Prompt
from unimm.processing.images.io import CropSquare, load_image
from unimm.processing.requests import ImageInput
from unimm.sequence.packing import PackedBatch, pack_sequences
from unimm.sequence.parts import Part, text_part
from unimm.sequence.segments import CachedPrefix
from unimm.tokenizers.text import TextTokenizer, encode_prompt
from unimm.vlms.llava_onevision.processor import LlavaOneVisionProcessor
from unimm.vlms.processor import IM_END, IM_START

N_BOUNDARY_TOKENS = 2  # before the queries in the table of embeddings: <begin_of_img>, <end_of_img>


class PromptComposer(Protocol):
    """What a reader makes of texts and pictures."""

    @property
    def text_tokenizer(self) -> TextTokenizer: ...

    def special(self, token: str) -> str | int:
        """A special token in a prompt: its id, or the token as text where the tokenizer has no such one."""

    def to_parts(self, prompt: Prompt) -> list[Part]:
        """A prompt of texts, ids of special tokens and RGB images as parts."""


@dataclass(frozen=True, kw_only=True)
class MLLMChatFormat:
    """The text around what varies in an MLLM's chat format; <|im_start|> and <|im_end|> enclose both messages."""

    before_system: str
    between_messages: str
    before_images: str
    after_images: str
    assistant: str = "assistant\n\n"

    def system_prompt(self, special: Callable[[str], str | int], system: str) -> list[str | int]:
        """What all samples begin with; its last id is special, so that it can be prefilled once."""
        return [
            special(IM_START), self.before_system + system, special(IM_END), self.between_messages, special(IM_START),
        ]  # fmt: skip

    def user_prompt(self, special: Callable[[str], str | int], caption: str, images: Sequence[Image.Image]) -> Prompt:
        """The user's message after the system prompt, and the beginning of the answer; the queries come behind."""
        return [
            self.before_images, *images, self.after_images + caption,
            special(IM_END), self.between_messages, special(IM_START), self.assistant,
        ]  # fmt: skip


@dataclass(frozen=True)
class MetaQueryProcessor:
    """Captions and pictures to items that end with the queries.

    first: the id of <begin_of_img>, which is how many rows the reader's own table has; end: of the marker after all.
    """

    composer: PromptComposer
    chat_format: MLLMChatFormat
    system_prompt: str
    n_queries: int
    begin_image_id: int
    end_of_turn_id: int
    max_text_tokens: int

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """The reader's tokenizer. Raises ValueError for a checkpoint without one."""
        return self.composer.text_tokenizer

    @cached_property
    def system_ids(self) -> list[int]:
        """Ids that every sample begins with."""
        return encode_prompt(self.text_tokenizer, self._system_prompt)

    @cached_property
    def query_ids(self) -> list[int]:
        """Ids of the queries between their markers, and of the end of the turn."""
        first_query_id, offsets = self.begin_image_id + N_BOUNDARY_TOKENS, range(self.n_queries)
        return [
            self.begin_image_id,
            *(first_query_id + i for i in offsets),
            self.begin_image_id + 1,
            self.end_of_turn_id,
        ]

    def prompt_parts(self, caption: str, images: Sequence[ImageInput] = ()) -> list[Part]:
        """What a picture is drawn from: pictures first, then the caption, of at most max_text ids.

        The caption is cut alone and decoded again, as in the original. Markers in it are its author's words.
        """
        ids = self.text_tokenizer.encode(caption)
        cut = caption if len(ids) <= self.max_text_tokens else self.text_tokenizer.decode(ids[: self.max_text_tokens])
        opened = [load_image(image) for image in images]
        user_prompt = self.chat_format.user_prompt(self.composer.special, cut, opened)
        *before, last = self.composer.to_parts([*self._system_prompt, *user_prompt])
        return [*before, text_part([*last.ids.tolist(), *self.query_ids])]

    def query_batch(self, samples: Sequence[Sequence[Part]], *, row_multiple: int = 1) -> "QueryBatch":
        """Samples for training; the prompts' rows rounded up to a multiple, with a text that nobody asks about."""
        prompts = [[*before, text_part(last.ids[: -len(self.query_ids)].tolist())] for *before, last in samples]
        rows = sum(item.segment.length for items in prompts for item in items)
        packed = pack_sequences(
            [*prompts, *([[text_part([self.end_of_turn_id] * (-rows % row_multiple))]] if rows % row_multiple else [])]
        )
        ends = list(zip(packed.layout.lengths, packed.layout.next_positions, strict=True))[: len(prompts)]
        prefixes = [CachedPrefix(length=length, next_position=clock) for length, clock in ends]
        return QueryBatch(packed, pack_sequences([[text_part(self.query_ids)]] * len(prompts), prefixes))

    def without_system(self, parts: Sequence[Part]) -> list[Part]:
        """A sample without its opening, to be read behind it."""
        first, *others = parts
        n = len(self.system_ids)
        assert first.ids[:n].tolist() == self.system_ids, (
            "every sample begins with the opening, which ends with a marker"
        )
        return [text_part(first.ids[n:].tolist()), *others]

    @property
    def _system_prompt(self) -> list[str | int]:
        return self.chat_format.system_prompt(self.composer.special, self.system_prompt)


@dataclass(frozen=True)
class QueryBatch:
    """Samples in two packs: all before the queries, which learns nothing while the reader is frozen, and the queries."""

    prompts: PackedBatch
    queries: PackedBatch

    def to(self, device: torch.device | str) -> "QueryBatch":
        """The same on a device."""
        return QueryBatch(self.prompts.to(device), self.queries.to(device))

    def row_order(self) -> torch.Tensor:
        """Which of all rows, the prompts' first, stand before one another in each sample: its prompt's, then its queries'."""
        prompt_lengths = self.prompts.layout.lengths[: len(self.queries.layout.lengths)]
        prompt_row, query_row, order = 0, sum(self.prompts.layout.lengths), []
        for before, behind in zip(prompt_lengths, self.queries.layout.lengths, strict=True):
            order += [torch.arange(prompt_row, prompt_row + before), torch.arange(query_row, query_row + behind)]
            prompt_row, query_row = prompt_row + before, query_row + behind
        return torch.cat(order).to(self.queries.ids.device)


def black_image(image: Image.Image) -> Image.Image:
    """What stands for a picture that is dropped: a black one of its size."""
    return Image.new("RGB", image.size)


@dataclass
class ConditionBatch:
    """What the reader is asked in one call, each sample once, and what each picture takes of the answers.

    A branch is a sample and the weight of the velocity under it; the weights of a picture's branches add up to 1.
    """

    processor: MetaQueryProcessor
    samples: list[list[Part]] = field(default_factory=list)
    index: dict[tuple, int] = field(default_factory=dict)

    def add_sample(self, caption: str, images: Sequence[Image.Image], *, kind: str) -> int:
        """The place of a sample. kind: what is shown, "black" in place of the pictures, or the pictures."""
        shown = [black_image(picture) for picture in images] if kind == "black" else list(images)
        # black pictures are equal where their sizes are; others are where they are one object
        key = (caption, *(one.size if kind == "black" else id(one) for one in shown))
        if key not in self.index:
            self.index[key] = len(self.samples)
            self.samples.append(self.processor.prompt_parts(caption, shown))
        return self.index[key]

    def guidance_branches(
        self,
        caption: str,
        images: Sequence[Image.Image],
        *,
        negative_prompt: str,
        guidance: float,
        image_guidance: float,
    ) -> list[tuple[int, float]]:
        """The branches of a picture under its scales of guidance; a branch of weight 0 is not read.

        Without pictures v = u + text (c - u). With them v = u + image (i - u) + text (c - i), where u sees the negative
        prompt and black pictures, i the negative prompt and the pictures; at an image scale of 1 or less
        v = i + text (c - i).
        """
        conditional = (caption, "shown", guidance)
        if not images or image_guidance <= 1:
            branches = [(negative_prompt, "shown", 1 - guidance), conditional]
        else:
            branches = [
                (negative_prompt, "black", 1 - image_guidance),
                (negative_prompt, "shown", image_guidance - guidance),
                conditional,
            ]
        return [(self.add_sample(words, images, kind=kind), weight) for words, kind, weight in branches if weight]


@dataclass(frozen=True)
class LlavaSquareComposer:
    """LLaVA-OneVision's prompts as MetaQuery makes them: pictures cropped to the tower's square, all of them tiled."""

    composer: LlavaOneVisionProcessor

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """The tokenizer."""
        return self.composer.text_tokenizer

    def special(self, token: str) -> str | int:
        """A special token in a prompt: its id, or the token as text where the tokenizer has no such one."""
        return self.composer.special(token)

    def to_parts(self, prompt: Prompt) -> list[Part]:
        """A prompt of texts, ids of special tokens and RGB images, which are cropped, as parts."""
        crop = CropSquare(self.composer.image_processor.tile_size)
        cropped: Prompt = [crop(item) if isinstance(item, Image.Image) else item for item in prompt]
        return replace(self.composer, always_tiled=True).to_parts(cropped)


def prompt_composer(prompts: Any) -> PromptComposer:
    """What makes a reader's texts and pictures into items, the way MetaQuery does."""
    return LlavaSquareComposer(prompts) if isinstance(prompts, LlavaOneVisionProcessor) else prompts
