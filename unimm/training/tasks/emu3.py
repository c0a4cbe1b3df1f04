"""Training Emu3 on the shapes world: the codes of an image behind its prompt, answers behind images and questions.

What is made of samples serves training on one's own records, too (unimm.training.tasks.emu3_records). Plain next-token
cross entropy. As in the released fine-tuning, of an image to generate the codes alone are learned, not its grid, nor what
ends its rows; captions are dropped at random (docs/originals/emu3.md, "Training").
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unimm.data.batching import name_indices, pad_rows, sample_tasks, training_example
from unimm.data.shapes import TASKS, Example
from unimm.data.shapes.novel_attributes import augment_novel_attributes
from unimm.models.emu3 import VISION_TOKENIZER_FOLDER
from unimm.models.emu3.flops import emu3_flops
from unimm.models.emu3.model import Emu3
from unimm.models.emu3.processor import Emu3Processor
from unimm.nn.compiled import compile_experts
from unimm.processing.chat_templates import Prompt
from unimm.sequence.packing import PackedBatch, pack_sequences
from unimm.sequence.parts import IGNORE_INDEX, Part, text_part
from unimm.tokenizers.emu3_vq import Emu3VQModel
from unimm.training.config import RecipeSection, TrainConfig, from_mapping
from unimm.training.fields import AtLeastOne, Fraction, TaskWeights, held_out_seed, known_tasks
from unimm.training.freezing import freeze
from unimm.training.losses import LossSum, count_by_kind, sum_by_kind
from unimm.training.samples import sample_grid
from unimm.training.tasks.emu3_start import init_emu3
from unimm.training.tasks.emu3_vq import save_emu3_vq
from unimm.training.throughput import StepCounts

# a loss for each kind of sample
IMAGE_KINDS = ("draw", "edit", "reason")
TEXT_KINDS = ("caption", "answer", "fact")
# of the images that the vision tokenizer encodes at once: 8 of 64x64
PIXELS_AT_ONCE = 2**15


@dataclass(frozen=True, kw_only=True)
class Emu3TrainingConfig(RecipeSection):
    """The recipe's `options`."""

    # samples of each task in a batch, or their weights (unimm.data.batching.sample_tasks)
    tasks: Annotated[TaskWeights, known_tasks(TASKS)]
    # the part of images to generate whose prompt is empty
    dropout: Fraction
    # the part of things in generation and editing with a novel colour, and with a novel shape
    novel_colours: Fraction
    novel_shapes: Fraction
    # ranks of the text tokenizer: bytes, and pairs of them
    n_ranks: AtLeastOne
    # the folder of a trained vision tokenizer
    vq: str
    # prefixes of the names of parameters that are not trained; the vision tokenizer never is
    frozen: tuple[str, ...]
    # whether torch.compile fuses the decoder's layers around attention
    compile: bool


@dataclass(frozen=True, kw_only=True)
class Emu3Sample:
    """A sequence, in which every code is code 0 as yet, and the images whose codes they are, in order."""

    kind: str
    parts: Sequence[Part]
    pixel_values: Sequence[Tensor]  # [3, H, W] each

    @property
    def n_tokens(self) -> int:
        """Its rows."""
        return sum(part.segment.length for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class Emu3Batch:
    """A pack in which every code is code 0, until the vision tokenizer has encoded the images."""

    pack: PackedBatch
    kinds: Tensor  # [labels with loss], index into the loss names
    images: tuple[Tensor, ...]  # [3, H, W] each, in the order of their codes
    codes: tuple[Tensor, ...] | None = None  # [h, w] each, where they are known


def blank_codes(pixel_values: Tensor, *, stride: int) -> Tensor:
    """Code 0 at every place of an image [3, H, W]: [h, w]."""
    return torch.zeros(pixel_values.shape[1] // stride, pixel_values.shape[2] // stride, dtype=torch.long)


def blank_processor(model: Emu3) -> Emu3Processor:
    """A model's processor, which makes every code of an image code 0, and holds no model."""
    encode_image = partial(blank_codes, stride=model.config.image_processor.stride)
    return replace(model.processor, encode_image=encode_image)


@dataclass(frozen=True, kw_only=True)
class Emu3SampleBuilder:
    """Samples of prompts, images and answers. processor: as `blank_processor` makes it.

    dropout: the part of images to generate whose prompt is empty. kinds: of the losses.
    """

    processor: Emu3Processor
    dropout: float = 0.0
    kinds: tuple[str, ...] = IMAGE_KINDS + TEXT_KINDS

    def generation_sample(
        self, kind: str, prompt: Sequence[str | Image.Image], target: Image.Image, rng: random.Random
    ) -> Emu3Sample:
        """An image behind its prompt, whose texts are dropped at random."""
        images = [piece for piece in prompt if isinstance(piece, Image.Image)]
        before: Prompt = [self.processor.special_tokens.bos, *(images if rng.random() < self.dropout else prompt)]
        return self.sequence_sample(
            kind, [*self.processor.to_parts(before), *self.image_parts(target)], [*images, target]
        )

    def image_parts(self, target: Image.Image) -> list[Part]:
        """The blank codes of an image to generate, and what stands around them; the codes alone are learned."""
        codes = self.processor.encode_image(self.processor.image_processor.preprocess(target))
        (part,) = self.processor.to_parts([*self.processor.codes_prompt(codes)])
        labels = torch.where(part.ids >= self.processor.special_tokens.code0, part.ids, IGNORE_INDEX)
        # each row must predict the next
        return [text_part(part.ids.tolist(), labels=[*labels[1:].tolist(), IGNORE_INDEX])]

    def answer_sample(self, kind: str, question: str, images: Sequence[Image.Image], answer: str) -> Emu3Sample:
        """An answer, and the id that ends it, behind images and a question."""
        parts = self.processor.with_answer([{"role": "user", "content": question, "images": images}], answer)
        return self.sequence_sample(kind, parts, images)

    def sequence_sample(self, kind: str, parts: Sequence[Part], images: Sequence[Image.Image]) -> Emu3Sample:
        """A sample of parts, with the images whose codes stand in them, in order."""
        pixel_values = [self.processor.image_processor.preprocess(one) for one in images]
        return Emu3Sample(kind=kind, parts=parts, pixel_values=pixel_values)

    def collate(self, samples: Sequence[Emu3Sample], rng: random.Random | None = None) -> Emu3Batch:
        """Samples as one pack, its rows rounded up. rng: nothing is left to it."""
        n_labels = [sum(int((part.labels >= 0).sum()) for part in sample.parts) for sample in samples]
        rows = pad_rows([sample.parts for sample in samples], self.processor.special_tokens.pad)
        return Emu3Batch(
            pack=pack_sequences(rows),
            kinds=name_indices(self.kinds, [sample.kind for sample in samples], n_labels),
            images=tuple(one for sample in samples for one in sample.pixel_values),
        )


@dataclass(frozen=True, kw_only=True)
class Emu3Dataset:
    """Batches by step: the same for a seed on every machine, and made without the model."""

    options: Emu3TrainingConfig
    builder: Emu3SampleBuilder
    batch_size: int
    seed: int

    def __call__(self, step: int) -> Emu3Batch:
        rng = random.Random(f"{self.seed}/{step}")
        tasks = sample_tasks(self.options.tasks, self.batch_size, rng)
        first = step * self.batch_size
        examples = [training_example(task, first + i, seed=self.seed) for i, task in enumerate(tasks)]
        return self.builder.collate([self.sample(one, rng) for one in examples])

    def sample(self, one: Example, rng: random.Random) -> Emu3Sample:
        """A question with its answer, or an image to generate behind its prompt; with novel attributes at random."""
        options = self.options
        one = augment_novel_attributes(one, rng, colours=options.novel_colours, shapes=options.novel_shapes)
        kind = one.task.split(".")[0]
        images = [_to_pil(image) for image in one.images]
        if one.answer is not None:
            return self.builder.answer_sample(kind, one.prompt, images, one.answer)
        assert one.target is not None, f"{one.task} has neither an answer nor an image"
        return self.builder.generation_sample(kind, [*images, one.prompt], _to_pil(one.target), rng)


def _to_pil(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels)


class Emu3PackTask:
    """The half of both of Emu3's tasks: the losses of a pack, and the release."""

    model: Emu3
    loss_names: tuple[str, ...]

    def losses(self, batch: Emu3Batch) -> dict[str, LossSum]:
        """Cross entropy of every kind of sample in the batch."""
        # the running statistics of the vision tokenizer's batch norms are part of it, and stay
        self.model.vision_tokenizer.eval()
        losses = self.model(place_codes(self.model, batch).to(self.model.device))
        return sum_by_kind(self.loss_names, batch.kinds, losses)

    def loss_counts(self, batch: Emu3Batch) -> dict[str, int]:
        """How many rows of the batch have each loss."""
        return count_by_kind(self.loss_names, batch.kinds)

    def step_counts(self, batch: Emu3Batch) -> StepCounts:
        """Rows of the pack, images, FLOPs."""
        sizes = [] if batch.codes is not None else [(one.shape[1], one.shape[2]) for one in batch.images]
        flops = emu3_flops(self.model, batch.pack, sizes)
        return StepCounts(tokens=len(batch.pack.layout.position_ids), images=len(batch.images), flops=flops.total)


class Emu3Task(Emu3PackTask):
    """Emu3 on the shapes world."""

    name = "emu3-nano"
    loss_names = IMAGE_KINDS + TEXT_KINDS

    def __init__(self, model: Emu3, batch: Emu3Dataset) -> None:
        self.model = model
        self.batch = batch

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> Emu3Task:
        """Build a model of the recipe's numbers around a trained vision tokenizer."""
        options = from_mapping(Emu3TrainingConfig, recipe.options, where="options")
        model = init_emu3(recipe, vq=options.vq, n_ranks=options.n_ranks)
        prepare_emu3(model, options.frozen, compiled=options.compile)
        builder = Emu3SampleBuilder(processor=blank_processor(model), dropout=options.dropout)
        return cls(model, Emu3Dataset(options=options, builder=builder, batch_size=recipe.batch_size, seed=recipe.seed))

    @property
    def held_out_batch(self) -> Emu3Dataset:
        """Batches of scenes that no run trains on."""
        return replace(self.batch, seed=held_out_seed(self.batch.seed))

    def sample_image(self) -> Image.Image:
        """Images of test prompts."""
        return sample_grid(self.model)

    def save(self, folder: Path) -> None:
        """Write the released layout, the language model in bfloat16, the vision tokenizer in float16."""
        self.model.save_pretrained(folder, dtype="bfloat16")
        save_emu3_vq(self.model.vision_tokenizer, folder / VISION_TOKENIZER_FOLDER, torch.float16)


def prepare_emu3(model: Emu3, frozen: Sequence[str], *, compiled: bool) -> None:
    """Freeze what is not trained, the vision tokenizer always. compiled: whether layers are fused."""
    if compiled:
        compile_experts(model.decoder)
    freeze(model, frozen, always=("vq.",))


def encode_images(vq: Emu3VQModel, images: Sequence[Tensor]) -> list[Tensor]:
    """The codes [h, w] of images [3, H, W], in their order; small ones of one size are encoded several at once."""
    by_size: dict[torch.Size, list[int]] = {}
    for i, image in enumerate(images):
        by_size.setdefault(image.shape, []).append(i)
    codes: dict[int, Tensor] = {}
    for size, indices in by_size.items():
        n_at_once = max(PIXELS_AT_ONCE // (size[1] * size[2]), 1)
        for first in range(0, len(indices), n_at_once):
            some = indices[first : first + n_at_once]
            pixels = torch.stack([images[i] for i in some])
            codes |= zip(some, vq.encode_ids(pixels.to(vq.quantize.embedding.weight)).cpu(), strict=True)
    return [codes[i] for i in range(len(images))]


@torch.no_grad()
def place_codes(model: Emu3, batch: Emu3Batch) -> PackedBatch:
    """The pack with the codes of its images in place, as ids and as labels."""
    code0 = model.config.special_tokens.code0
    codes = batch.codes if batch.codes is not None else encode_images(model.vision_tokenizer, batch.images)
    ids = batch.pack.ids.clone()
    labels = batch.pack.labels.clone()
    if codes:
        ids[ids >= code0] += torch.cat([one.flatten() for one in codes])
    # a label is the next row's id
    learned = (labels >= code0).nonzero().squeeze(1)
    labels[learned] = ids[learned + 1]
    return replace(batch.pack, ids=ids, labels=labels)
