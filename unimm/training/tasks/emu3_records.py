"""Training Emu3 on one's own records: images from texts and from images, answers, texts, all of them by turns, in packs.

The released fine-tuning is the recipe emu3-sft (docs/training.md).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image

from unimm.data.records import Record, RecordImage, choose_wordings
from unimm.models.emu3.model import Emu3
from unimm.processing.images.io import resize
from unimm.training.config import TrainConfig, from_mapping
from unimm.training.fields import AtLeastOne, Fraction, RecipeSection
from unimm.training.pretrained import load_released
from unimm.training.samples import prompt_grid
from unimm.training.tasks.emu3 import Emu3PackTask, Emu3Sample, Emu3SampleBuilder, blank_processor, prepare_emu3
from unimm.training.tasks.generation_request import (
    GENERATED_KINDS,
    GenerationRequest,
    check_kind,
    check_pack_limit,
    join_pieces,
    split_system,
)
from unimm.training.tasks.record_answers import ANSWERED_KINDS, answer_parts, written
from unimm.vlms.processor import append_learned

INTERLEAVED = "interleaved"
KINDS = (*GENERATED_KINDS, *ANSWERED_KINDS, INTERLEAVED)


@dataclass(frozen=True, kw_only=True)
class Emu3RecordConfig(RecipeSection):
    """The recipe's `options` where it has `data`."""

    # the part of images to generate whose prompt is empty
    dropout: Fraction
    # pixels that an image to generate is resized to, about, in its own ratio; null for the model's `image_area`
    image_area: AtLeastOne | None = None
    # prefixes of the names of parameters that are not trained; the vision tokenizer never is
    frozen: tuple[str, ...]
    # whether torch.compile fuses the decoder's layers around attention
    compile: bool
    # what sample images are generated from
    sample_prompts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Emu3RecordBuilder(Emu3SampleBuilder):
    """Samples of records. image_area: pixels of an image to generate, about."""

    kinds: tuple[str, ...] = KINDS
    image_area: int

    FAMILY: ClassVar[str] = "Emu3"

    def prepare(self, record: Record, rng: random.Random) -> Emu3Sample:
        """The sample of a record.

        Raises ValueError for a kind of record that is not learned, and for images that are missing or broken.
        """
        if record.kind in ANSWERED_KINDS:
            images = [part.load() for part in record.images]
            return self.sequence_sample(record.kind, answer_parts(record, rng, self.processor), images)
        check_kind(record, (*KINDS, "multi_edit"), family=self.FAMILY)
        if record.kind == INTERLEAVED:
            return self.interleaved_sample(record, rng)
        request = GenerationRequest.from_record(record, rng, family=self.FAMILY)
        if request.system:
            raise ValueError("got a system prompt: Emu3 generates images without one; leave it out")
        target = resize_to_area(request.target.load(), self.image_area)
        prompt = join_pieces(request.pieces, around_images="")
        return self.generation_sample(request.kind, prompt, target, rng)

    def interleaved_sample(self, record: Record, rng: random.Random) -> Emu3Sample:
        """Texts and images in order, without roles. Of an image with loss the ids that begin and end it are learned, too:
        where an image comes, and of which grid, is the model's to say."""
        system, others = split_system(choose_wordings(record, rng).parts)
        if system:
            raise ValueError("got a system prompt among texts and images by turns: expected none; leave it out")
        images: list[Image.Image] = []
        parts = self.processor.to_parts([self.processor.special_tokens.bos])
        for part in others:
            piece: str | Image.Image
            if isinstance(part, RecordImage):
                piece = resize_to_area(part.load(), self.image_area) if part.loss else part.load()
                images.append(piece)
            else:
                piece = written(part).text
            new = self.processor.to_parts([piece])
            parts = append_learned(parts, new[0].ids.tolist()) if part.loss and new else [*parts, *new]
        if others[-1].loss:
            parts = append_learned(parts, [], last_label=self.processor.special_tokens.eos)
        return self.sequence_sample(INTERLEAVED, parts, images)


def resize_to_area(image: Image.Image, area: int) -> Image.Image:
    """An image of about so many pixels in its own ratio, as the released code prepares those to generate (bicubic)."""
    scale = sqrt(area / (image.height * image.width))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image if size == image.size else resize(image, size)


class Emu3RecordTask(Emu3PackTask):
    """Emu3 on records."""

    name = "emu3"
    loss_names = KINDS

    def __init__(self, model: Emu3, sample_builder: Emu3RecordBuilder, sample_prompts: tuple[str, ...] = ()) -> None:
        self.model = model
        self.sample_builder = sample_builder
        self.sample_prompts = sample_prompts

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> Emu3RecordTask:
        """Load the release that the recipe names, with its vision tokenizer."""
        options = from_mapping(Emu3RecordConfig, recipe.options, where="options")
        model = load_released(Emu3, recipe.model)
        # raised now, where it was left out
        stride = model.vision_tokenizer.config.stride
        # what dropout draws
        torch.manual_seed(recipe.seed)
        prepare_emu3(model, options.frozen, compiled=options.compile)
        area = options.image_area or model.config.image_area
        check_pack_limit(area // stride**2, recipe)
        builder = Emu3RecordBuilder(processor=blank_processor(model), dropout=options.dropout, image_area=area)
        return cls(model, builder, options.sample_prompts)

    def sample_image(self) -> Image.Image | None:
        """Images of the recipe's prompts; None without prompts."""
        return prompt_grid(self.model, self.sample_prompts)

    def save(self, folder: Path) -> None:
        """Write the layout that the release came in, in bfloat16; a vision tokenizer of its own stays in float32."""
        self.model.save_pretrained(folder, dtype="bfloat16")
