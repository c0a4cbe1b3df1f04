"""MetaQuery's processor: a system prompt, images and a caption to parts, with the queries where an answer would begin.

It needs no weights, so that training prepares batches in other processes. docs/originals/metaquery.md, "Queries and
prompt".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from PIL import Image

from unimm.processing.chat_templates import Prompt
from unimm.processing.images.io import center_crop, load_image
from unimm.processing.requests import ImageInput
from unimm.sequence.packing import PackedBatch, pack_sequences
from unimm.sequence.parts import Part, text_part
from unimm.sequence.segments import CachedPrefix
from unimm.tokenizers.text import TextTokenizer, encode_prompt
from unimm.vlms.llava_onevision.processor import LlavaOneVisionProcessor
from unimm.vlms.processor import IM_END, IM_START

N_BOUNDARY_TOKENS = 2  # rows of the embedding table before the queries: <begin_of_img>, <end_of_img>


class PromptComposer(Protocol):
    """The MLLM's own way from texts and images to parts."""

    @property
    def text_tokenizer(self) -> TextTokenizer: ...

    def special(self, token: str) -> str | int:
        """A special token in a prompt: its id, or the token as text where the tokenizer has no such one."""

    def to_parts(self, prompt: Prompt) -> list[Part]:
        """A prompt of texts, ids of special tokens and RGB images as parts."""

    def whole_image_part(self, image: Image.Image) -> Part:
        """An RGB image as one part, without tiles."""


@dataclass(frozen=True, kw_only=True)
class MLLMChatFormat:
    """The text around what varies in an MLLM's chat format; <|im_start|> and <|im_end|> enclose both messages."""

    before_system: str
    between_messages: str
    before_images: str
    after_images: str
    assistant: str = "assistant\n\n"

    def system_prompt(self, special: Callable[[str], str | int], system: str) -> list[str | int]:
        """The parts that all samples begin with; the last id is special, so that it can be prefilled once."""
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
    """Captions and images to parts that end with the queries.

    begin_image_id: of <begin_of_img>, the first id behind the MLLM's own vocabulary. end_of_turn_id: of the token that
    ends every sample.
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
        """The MLLM's tokenizer. Raises ValueError for a checkpoint without one."""
        return self.composer.text_tokenizer

    @cached_property
    def system_ids(self) -> list[int]:
        """Ids that every sample begins with."""
        return encode_prompt(self.text_tokenizer, self._system_prompt)

    @cached_property
    def query_ids(self) -> list[int]:
        """The ids of the queries between their boundary tokens, and of the end of the turn."""
        end_image_id = self.begin_image_id + 1
        first_query_id = self.begin_image_id + N_BOUNDARY_TOKENS
        queries = range(first_query_id, first_query_id + self.n_queries)
        return [self.begin_image_id, *queries, end_image_id, self.end_of_turn_id]

    def prompt_parts(self, caption: str, images: Sequence[ImageInput] = ()) -> list[Part]:
        """The parts of a prompt: the system turn, the images, the caption of at most max_text_tokens, the queries.

        As in the original the caption is truncated on its own ids, which are decoded to text again. Special tokens
        written in it are plain text.
        """
        ids = self.text_tokenizer.encode(caption)
        cut = caption if len(ids) <= self.max_text_tokens else self.text_tokenizer.decode(ids[: self.max_text_tokens])
        opened = [load_image(image) for image in images]
        user_prompt = self.chat_format.user_prompt(self.composer.special, cut, opened)
        *before, last = self.composer.to_parts([*self._system_prompt, *user_prompt])
        return [*before, text_part([*last.ids.tolist(), *self.query_ids])]

    def query_batch(self, samples: Sequence[Sequence[Part]], *, row_multiple: int = 1) -> "QueryBatch":
        """Samples for training. row_multiple: the prompts' rows are padded to a multiple of it, by a text without
        queries."""
        prompts = [[*before, text_part(last.ids[: -len(self.query_ids)].tolist())] for *before, last in samples]
        rows = sum(part.segment.length for parts in prompts for part in parts)
        padding = [[text_part([self.end_of_turn_id] * (-rows % row_multiple))]] if rows % row_multiple else []
        packed = pack_sequences([*prompts, *padding])
        ends = list(zip(packed.layout.lengths, packed.layout.next_positions, strict=True))[: len(prompts)]
        prefixes = [CachedPrefix(length=length, next_position=position) for length, position in ends]
        return QueryBatch(packed, pack_sequences([[text_part(self.query_ids)]] * len(prompts), prefixes))

    def without_system(self, parts: Sequence[Part]) -> list[Part]:
        """A sample without its system turn."""
        first, *others = parts
        n = len(self.system_ids)
        assert first.ids[:n].tolist() == self.system_ids, (
            "every sample begins with the system turn, which ends with a special token"
        )
        return [text_part(first.ids[n:].tolist()), *others]

    @property
    def _system_prompt(self) -> list[str | int]:
        return self.chat_format.system_prompt(self.composer.special, self.system_prompt)


@dataclass(frozen=True)
class QueryBatch:
    """Samples in two batches, since what stands before the queries needs no gradients: the prompts, and the queries."""

    prompts: PackedBatch
    queries: PackedBatch

    def to(self, device: torch.device | str) -> "QueryBatch":
        """The batch on a device."""
        return QueryBatch(self.prompts.to(device), self.queries.to(device))

    def row_order(self) -> torch.Tensor:
        """The order that puts each sample's prompt rows before its query rows, in [all prompts' rows; all queries'
        rows]."""
        prompt_lengths = self.prompts.layout.lengths[: len(self.queries.layout.lengths)]
        prompt_row = 0
        query_row = sum(self.prompts.layout.lengths)
        order = []
        for n_prompt, n_query in zip(prompt_lengths, self.queries.layout.lengths, strict=True):
            order += [torch.arange(prompt_row, prompt_row + n_prompt), torch.arange(query_row, query_row + n_query)]
            prompt_row += n_prompt
            query_row += n_query
        return torch.cat(order).to(self.queries.ids.device)


def black_image(image: Image.Image) -> Image.Image:
    """A black image of the same size, in place of one that is dropped."""
    return Image.new("RGB", image.size)


@dataclass
class ConditionBatch:
    """The distinct samples that the images of one call are conditioned on, each of which runs once.

    A branch of an image's guidance is the index of a sample and the weight of the velocity under its condition; the
    weights of an image's branches add up to 1.
    """

    processor: MetaQueryProcessor
    samples: list[list[Part]] = field(default_factory=list)
    index: dict[tuple, int] = field(default_factory=dict)

    def add_sample(self, caption: str, images: Sequence[Image.Image], *, kind: str) -> int:
        """The index of a sample, which is added once. kind: "black" for black images in place of the images, or
        "given"."""
        shown = [black_image(image) for image in images] if kind == "black" else list(images)
        # black images are equal if their sizes are; others are if they are one object
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
        """The branches of one image; a branch of weight 0 is left out.

        Without input images v = u + guidance (c - u), with c under the caption and u under the negative prompt. With
        them v = u + image_guidance (i - u) + guidance (c - i): c has the caption and the images, i the negative prompt
        and the images, u the negative prompt and black images. At an image_guidance of 1 or less v = i + guidance (c -
        i).
        """
        conditional = (caption, "given", guidance)
        if not images or image_guidance <= 1:
            branches = [(negative_prompt, "given", 1 - guidance), conditional]
        else:
            branches = [
                (negative_prompt, "black", 1 - image_guidance),
                (negative_prompt, "given", image_guidance - guidance),
                conditional,
            ]
        return [(self.add_sample(text, images, kind=kind), weight) for text, kind, weight in branches if weight]


@dataclass(frozen=True)
class LlavaSquareComposer:
    """LLaVA-OneVision's composer as MetaQuery uses it: images cropped to the vision encoder's square, all of them
    tiled."""

    composer: LlavaOneVisionProcessor

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """The MLLM's tokenizer."""
        return self.composer.text_tokenizer

    def special(self, token: str) -> str | int:
        """A special token in a prompt: its id, or the token as text where the tokenizer has no such one."""
        return self.composer.special(token)

    def to_parts(self, prompt: Prompt) -> list[Part]:
        """A prompt of texts, ids of special tokens and RGB images, which are cropped, as parts."""
        size = self.composer.image_processor.tile_size
        cropped: Prompt = [center_crop(item, size) if isinstance(item, Image.Image) else item for item in prompt]
        return replace(self.composer, always_tiled=True).to_parts(cropped)

    def whole_image_part(self, image: Image.Image) -> Part:
        """An RGB image, which is cropped, as a part without tiles."""
        return self.composer.whole_image_part(center_crop(image, self.composer.image_processor.tile_size))


def prompt_composer(processor: Any) -> PromptComposer:
    """The composer for an MLLM's processor."""
    return LlavaSquareComposer(processor) if isinstance(processor, LlavaOneVisionProcessor) else processor
