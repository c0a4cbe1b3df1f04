"""Samples of Janus and JanusFlow: conversations with labelled answers, and images behind what they are generated from.

They come of records of any dataset, or of examples of the shapes world. Nothing here holds a model.
"""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unimm.data.batching import name_indices, pad_rows
from unimm.data.records import Record
from unimm.models.common.deepseek_processor import DeepseekProcessor
from unimm.nn.flops import StepFlops
from unimm.processing.chat_templates import ChatMessage
from unimm.processing.images.io import center_crop
from unimm.sequence.packing import PackedBatch, pack_sequences
from unimm.sequence.parts import ImagePart, Part
from unimm.training.tasks.chat_sample import ChatSample
from unimm.training.tasks.generation_request import (
    GENERATED_KINDS,
    GenerationRequest,
    check_kind,
    join_pieces,
)
from unimm.training.tasks.record_answers import ANSWERED_KINDS, answer_parts
from unimm.training.throughput import StepCounts

# where a sentence ends: behind a full stop, an exclamation or a question mark, with white space behind
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True, kw_only=True)
class ChatSampleBuilder(ABC):
    """Samples of records, and packs of samples.

    image_kinds, text_kinds: the losses of images to generate, and of answers. dropout: the part of images to generate
    whose prompt is dropped, which guidance compares with. first_sentence: the part of captions of which the first
    sentence alone is taken. image_size: (height, width) of images to generate. max_positions: of the decoder.
    """

    processor: DeepseekProcessor
    image_kinds: tuple[str, ...] = GENERATED_KINDS
    text_kinds: tuple[str, ...] = ANSWERED_KINDS
    dropout: float
    first_sentence: float = 0.0
    image_size: tuple[int, int]
    max_positions: int

    FAMILY: ClassVar[str]

    @abstractmethod
    def generation_sample(
        self, kind: str, prompt: Sequence[Part], target: NDArray[np.uint8], rng: random.Random
    ) -> ChatSample:
        """An image behind its prompt, which is dropped at random."""

    @abstractmethod
    def collate(self, samples: Sequence[ChatSample], rng: random.Random) -> Any:
        """Samples as one pack, with the noise that it needs."""

    def prepare(self, record: Record, rng: random.Random) -> ChatSample:
        """The sample of a record.

        Raises ValueError for a kind of record that is not learned, for images that are missing or broken, and for more
        rows than the decoder has positions.
        """
        if record.kind in ANSWERED_KINDS:
            sample = ChatSample(kind=record.kind, parts=answer_parts(record, rng, self.processor), target=None)
        else:
            check_kind(record, (*GENERATED_KINDS, "multi_edit", *ANSWERED_KINDS), family=self.FAMILY)
            request = GenerationRequest.from_record(record, rng, family=self.FAMILY)
            target = np.asarray(center_crop(request.target.load(), self.image_size))
            sample = self.generation_sample(request.kind, self.prompt_parts(request, rng), target, rng)
        if (n := n_positions(sample.parts)) > self.max_positions:
            raise ValueError(f"got a sample of {n} positions: expected at most {self.max_positions}, the decoder's")
        return sample

    def prompt_parts(self, request: GenerationRequest, rng: random.Random) -> list[Part]:
        """The user's message that an image is generated from, of a caption perhaps the first sentence alone."""
        pieces = request.pieces
        if request.kind == "generate" and self.first_sentence and rng.random() < self.first_sentence:
            pieces = [SENTENCE_END.split(request.text, maxsplit=1)[0]]
        message = ChatMessage("user", join_pieces(pieces))
        return self.processor.to_parts(self.processor.render([message], request.system))

    def pack(self, samples: Sequence[ChatSample]) -> PackedBatch:
        """One pack of the samples, its rows rounded up; the content of image tokens is (image, place in it)."""
        numbered: list[Sequence[Part]] = []
        n_images = 0
        for sample in samples:
            numbered.append([number_tokens(part, n_images) for part in sample.parts])
            n_images += sample.target is not None
        return pack_sequences(pad_rows(numbered, self.processor.special_tokens.pad))

    def loss_kinds(self, samples: Sequence[ChatSample]) -> tuple[Tensor, Tensor]:
        """The kind of every labelled row [n], index into `text_kinds`, and of every image token, into `image_kinds`."""
        kinds = [sample.kind for sample in samples]
        n_labels = [sum(int((part.labels >= 0).sum()) for part in sample.parts) for sample in samples]
        n_tokens = [sum(part.n_tokens for part in sample.parts if part.kind == "gen_image") for sample in samples]
        return name_indices(self.text_kinds, kinds, n_labels), name_indices(self.image_kinds, kinds, n_tokens)


def n_positions(parts: Sequence[Part]) -> int:
    """The positions of parts, all of them causal: of several noised copies of an image, which share theirs, once."""
    # one more than parts: where the last ends
    starts = accumulate((part.segment.advance for part in parts), initial=0)
    return max(start + part.segment.length for start, part in zip(starts, parts, strict=False))


def number_tokens(part: Part, image: int) -> Part:
    """A part; where it is generated, its tokens are of the image of this number."""
    if not isinstance(part, ImagePart) or part.kind != "gen_image":
        return part
    return replace(part, tokens=part.tokens + torch.tensor([image, 0]))


def chat_images(samples: Sequence[ChatSample]) -> list[NDArray[np.uint8]]:
    """The images that samples generate, in order."""
    return [sample.target for sample in samples if sample.target is not None]


def pack_counts(pack: PackedBatch, flops: StepFlops) -> StepCounts:
    """Rows of a pack, images to understand and to generate, FLOPs."""
    n_images = sum(len(images.lengths) for images in (pack.und_images, pack.gen_images) if images is not None)
    return StepCounts(tokens=len(pack.layout.position_ids), images=n_images, flops=flops.total)
