"""What training Janus and training JanusFlow on the little world share: conversations by step, and what they begin from.

Samples are packed, all kinds in every batch (arXiv 2410.13848, sections 3.3 and 3.4; docs/originals/janus.md,
"Training").
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from unimm.data.batching import ROW_MULTIPLE, sample_tasks, training_example
from unimm.data.shapes import Example
from unimm.data.shapes.novel_attributes import augment_novel_attributes
from unimm.models.common.deepseek_processor import IMAGE_PLACEHOLDER, ROLES, DeepseekProcessor, JanusSpecialTokens
from unimm.sequence.packing import PackedBatch, pack_sequences
from unimm.sequence.parts import Part, text_part

# a loss for each kind of sample
IMAGE_KINDS = ("draw", "edit", "reason")
TEXT_KINDS = ("caption", "answer", "fact")
DEEPSEEK_TOKENS = (*JanusSpecialTokens.TOKENS.values(), IMAGE_PLACEHOLDER, *ROLES)


@dataclass(frozen=True, kw_only=True)
class DeepseekChatTrainingConfig:
    """What the `options` of both recipes may say."""

    # samples of each task in a batch, or their weights (training/tasks.py)
    tasks: Mapping[str, int]
    # the part of drawings whose prompt is dropped, so that guidance has something to compare with
    dropout: float
    # the part of things in drawings and edits whose colour, or whose shape, has no name
    novel_colours: float
    novel_shapes: float
    # pieces of the text model
    vocab_size: int
    # the folder of a trained ViT, which the tower begins from
    vit: str
    # parts that are not trained, by the beginning of their parameters' names; what makes latents or codes never is
    frozen: tuple[str, ...]
    # whether torch.compile fuses what a token meets before and after attention
    compile: bool


@dataclass(frozen=True, kw_only=True)
class DeepseekChatDataset(ABC):
    """Batches by step: the same for a seed on every machine, and made without the model."""

    options: DeepseekChatTrainingConfig
    prompts: DeepseekProcessor
    batch_size: int
    seed: int

    @abstractmethod
    def batch(self, examples: Sequence[Example], rng: random.Random) -> Any:
        """Examples as one pack; the dice drop conditions."""

    def __call__(self, step: int) -> Any:
        rng = random.Random(f"{self.seed}/{step}")
        tasks = sample_tasks(self.options.tasks, self.batch_size, rng)
        examples = [training_example(task, step * self.batch_size + i, seed=self.seed) for i, task in enumerate(tasks)]
        return self.batch([self.augment(one, rng) for one in examples], rng)

    def augment(self, one: Example, rng: random.Random) -> Example:
        """The example, if it draws or edits with some things that have no name; facts stay as they are."""
        return augment_novel_attributes(one, rng, colours=self.options.novel_colours, shapes=self.options.novel_shapes)

    def prompt_parts(self, one: Example) -> list[Part]:
        """A question with its labelled answer, or a prompt to draw from, with a picture where it edits one."""
        shown = [Image.fromarray(image) for image in one.images]
        if one.answer is not None:
            return self.prompts.with_answer([{"role": "user", "content": one.prompt, "images": shown}], one.answer)
        assert one.target is not None, f"{one.task} has neither an answer nor a picture"
        return self.prompts.generation_parts(one.prompt, shown)

    def pack(self, samples: Sequence[Sequence[Part]]) -> PackedBatch:
        """One pack, rounded up with a sample without loss: new shapes cost a CPU more than these rows."""
        rows = sum(item.segment.length for items in samples for item in items)
        filler = (
            [[text_part([self.prompts.special_tokens.pad] * (-rows % ROW_MULTIPLE))]] if rows % ROW_MULTIPLE else []
        )
        return pack_sequences([*samples, *filler])
