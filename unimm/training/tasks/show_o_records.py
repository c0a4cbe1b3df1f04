"""Training Show-o on one's own records: images from texts and from images, answers, texts, in packs or in batches.

What of a model is trained is the recipe's `frozen`; the released stages are recipes of ours (docs/training.md).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from unimm.data.records import Record
from unimm.models.show_o.model import ShowO
from unimm.models.show_o.processor import square_crop
from unimm.sequence.parts import IGNORE_INDEX, Part
from unimm.training.config import TrainConfig, from_mapping
from unimm.training.fields import Fraction, RecipeSection
from unimm.training.freezing import freeze
from unimm.training.pretrained import load_released
from unimm.training.samples import prompt_grid
from unimm.training.tasks.chat_sample import ChatSample
from unimm.training.tasks.generation_request import GENERATED_KINDS, GenerationRequest, check_kind, check_pack_limit
from unimm.training.tasks.record_answers import ANSWERED_KINDS, answer_parts
from unimm.training.tasks.show_o import ShowOPackTask, ShowOSampleBuilder


@dataclass(frozen=True, kw_only=True)
class ShowORecordConfig(RecipeSection):
    """The recipe's `options` where it has `data`."""

    # the part of images to generate whose prompt is dropped, which guidance compares with
    dropout: Fraction
    # prefixes of the names of parameters that are not trained; the image tokenizer and CLIP never are
    frozen: tuple[str, ...]
    # what sample images are generated from
    sample_prompts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ShowORecordBuilder(ShowOSampleBuilder):
    """Samples of records. image_size: pixels a side of images to generate. max_positions: of the decoder."""

    image_kinds: tuple[str, ...] = GENERATED_KINDS
    text_kinds: tuple[str, ...] = ANSWERED_KINDS
    image_size: int
    max_positions: int

    FAMILY: ClassVar[str] = "Show-o"

    def prepare(self, record: Record, rng: random.Random) -> ChatSample:
        """The sample of a record. Images to generate from stand in front of the text.

        Raises ValueError for a kind of record that is not learned, for images that are missing or broken, and for more
        rows than the decoder has positions.
        """
        if record.kind in ANSWERED_KINDS:
            parts = learned_behind_images(answer_parts(record, rng, self.processor))
            sample = ChatSample(kind=record.kind, parts=parts, target=None)
        else:
            check_kind(record, (*GENERATED_KINDS, "multi_edit", *ANSWERED_KINDS), family=self.FAMILY)
            request = GenerationRequest.from_record(record, rng, family=self.FAMILY)
            if request.system:
                raise ValueError("got a system prompt: Show-o generates images without one; leave it out")
            target = np.asarray(square_crop(request.target.load(), self.image_size))
            sample = self.generation_sample(request.kind, request.text, request.images, target, rng)
        if sample.n_tokens > self.max_positions:
            raise ValueError(
                f"got a sample of {sample.n_tokens} rows: expected at most {self.max_positions}, the decoder's positions"
            )
        return sample


def learned_behind_images(parts: Sequence[Part]) -> list[Part]:
    """Parts in which no answer ahead of an image carries a label: such rows attend to the image, which they could not when
    they were written. Raises ValueError where no label is left."""
    last = max((i for i, part in enumerate(parts) if part.kind == "und_image"), default=0)
    # the last image's own row may predict the text behind it
    left = [
        replace(part, labels=torch.full_like(part.labels, IGNORE_INDEX)) if i < last else part
        for i, part in enumerate(parts)
    ]
    if not any((part.labels != IGNORE_INDEX).any() for part in left):
        raise ValueError(
            "got answers in front of all images: Show-o's texts attend to the images behind them, so that none of them can "
            "be learned; expected an answer behind the last image"
        )
    return left


class ShowORecordTask(ShowOPackTask):
    """Show-o on records."""

    name = "show_o"
    loss_names = GENERATED_KINDS + ANSWERED_KINDS

    def __init__(self, model: ShowO, sample_builder: ShowORecordBuilder, sample_prompts: tuple[str, ...] = ()) -> None:
        self.model = model
        self.builder = self.sample_builder = sample_builder
        self.sample_prompts = sample_prompts

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> ShowORecordTask:
        """Load the release that the recipe names, with its image tokenizer, and CLIP where it has one."""
        options = from_mapping(ShowORecordConfig, recipe.options, where="options")
        model = load_released(ShowO, recipe.model)
        # raised now, where it was left out
        stride = model.required_vq.config.stride
        freeze(model, options.frozen, always=("vq.", "clip."))
        config = model.config
        check_pack_limit(config.image_tokens, recipe)
        builder = ShowORecordBuilder(
            processor=model.processor,
            n_tokens=config.image_tokens,
            dropout=options.dropout,
            image_size=config.token_grid[0] * stride,
            max_positions=config.decoder.max_positions,
        )
        return cls(model, builder, options.sample_prompts)

    def sample_image(self) -> Image.Image | None:
        """Images of the recipe's prompts; None without prompts."""
        return prompt_grid(self.model, self.sample_prompts)
