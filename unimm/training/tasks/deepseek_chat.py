"""The shared half of training Janus and JanusFlow on the shapes world: options, and conversations by step.

Samples are packed, all kinds in every batch (arXiv 2410.13848, sections 3.3 and 3.4; docs/originals/janus.md,
"Training").
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from PIL import Image

from unimm.data.batching import THOUGHT_TASKS, pad_rows, sample_tasks, training_example
from unimm.data.shapes import TASKS, Example
from unimm.data.shapes.novel_attributes import augment_novel_attributes
from unimm.models.common.deepseek_processor import IMAGE_PLACEHOLDER, ROLES, DeepseekProcessor, JanusSpecialTokens
from unimm.sequence.packing import PackedBatch, pack_sequences
from unimm.sequence.parts import Part
from unimm.training.config import RecipeSection
from unimm.training.fields import AtLeastOne, Fraction, TaskWeights, known_tasks

# a loss for each kind of sample
IMAGE_KINDS = ("draw", "edit", "reason")
TEXT_KINDS = ("caption", "answer", "fact")
DEEPSEEK_TOKENS = (*JanusSpecialTokens.TOKENS.values(), IMAGE_PLACEHOLDER, *ROLES)


@dataclass(frozen=True, kw_only=True)
class DeepseekChatTrainingConfig(RecipeSection):
    """The `options` of both recipes."""

    # samples of each task in a batch, or their weights (unimm.data.batching.sample_tasks)
    tasks: Annotated[TaskWeights, known_tasks((*TASKS, *THOUGHT_TASKS))]
    # the part of generation samples whose prompt is dropped, which guidance compares with
    dropout: Fraction
    # the part of things in generation and editing with a novel colour, and with a novel shape
    novel_colours: Fraction
    novel_shapes: Fraction
    vocab_size: AtLeastOne
    # the folder of a trained ViT, which the vision encoder begins from
    vit: str
    # prefixes of the names of parameters that are not trained; the image tokenizer never is
    frozen: tuple[str, ...]
    # whether torch.compile fuses the decoder's layers around attention
    compile: bool


@dataclass(frozen=True, kw_only=True)
class DeepseekChatDataset(ABC):
    """Batches by step: the same for a seed on every machine, and made without the model."""

    options: DeepseekChatTrainingConfig
    processor: DeepseekProcessor
    batch_size: int
    seed: int

    @abstractmethod
    def batch(self, examples: Sequence[Example], rng: random.Random) -> Any:
        """Examples as one pack, with conditions dropped at random."""

    def __call__(self, step: int) -> Any:
        rng = random.Random(f"{self.seed}/{step}")
        tasks = sample_tasks(self.options.tasks, self.batch_size, rng)
        examples = [training_example(task, step * self.batch_size + i, seed=self.seed) for i, task in enumerate(tasks)]
        return self.batch([self.augment(one, rng) for one in examples], rng)

    def augment(self, one: Example, rng: random.Random) -> Example:
        """The example, with some novel attributes if it generates or edits; facts stay as they are."""
        return augment_novel_attributes(one, rng, colours=self.options.novel_colours, shapes=self.options.novel_shapes)

    def prompt_parts(self, one: Example) -> list[Part]:
        """A question with its labelled answer, or a prompt to generate from, after the image that it edits, if any."""
        images = [Image.fromarray(image) for image in one.images]
        if one.answer is not None:
            return self.processor.with_answer([{"role": "user", "content": one.prompt, "images": images}], one.answer)
        assert one.target is not None, f"{one.task} has neither an answer nor an image"
        return self.processor.generation_parts(one.prompt, images)

    def pack(self, samples: Sequence[Sequence[Part]]) -> PackedBatch:
        """One pack of the samples, its rows rounded up."""
        return pack_sequences(pad_rows(samples, self.processor.special_tokens.pad))
