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

from unimm.data.batching import ROUND_ROWS, dealt, taken
from unimm.data.shapes import Example
from unimm.data.shapes.novel_attributes import unnamed
from unimm.models.common.deepseek_processor import PLACEHOLDER, ROLES, Markers, Prompts
from unimm.sequence.packing import Pack, pack
from unimm.sequence.parts import Item, text_item

# a loss for each kind of sample
DRAWINGS = ("draw", "edit", "reason")
TEXTS = ("caption", "answer", "fact")
SYMBOLS = (*Markers.STRINGS.values(), PLACEHOLDER, *ROLES)


@dataclass(frozen=True, kw_only=True)
class Common:
    """What the `options` of both recipes may say."""

    # samples of each task in a batch, or their weights (training/tasks.py)
    tasks: Mapping[str, int]
    # the part of drawings whose prompt is dropped, so that guidance has something to compare with
    dropout: float
    # the part of things in drawings and edits whose colour, or whose shape, has no name
    nameless_colours: float
    nameless_shapes: float
    # pieces of the text model
    vocabulary: int
    # the folder of a trained ViT, which the tower begins from
    vit: str
    # parts that are not trained, by the beginning of their parameters' names; what makes latents or codes never is
    frozen: tuple[str, ...]
    # whether torch.compile fuses what a token meets before and after attention
    compiled: bool


@dataclass(frozen=True, kw_only=True)
class Conversations(ABC):
    """Batches by step: the same for a seed on every machine, and made without the model."""

    options: Common
    prompts: Prompts
    size: int
    seed: int

    @abstractmethod
    def batch(self, examples: Sequence[Example], dice: random.Random) -> Any:
        """Examples as one pack; the dice drop conditions."""

    def __call__(self, step: int) -> Any:
        dice = random.Random(f"{self.seed}/{step}")
        tasks = dealt(self.options.tasks, self.size, dice)
        examples = [taken(task, step * self.size + i, seed=self.seed) for i, task in enumerate(tasks)]
        return self.batch([self.unnamed(one, dice) for one in examples], dice)

    def unnamed(self, one: Example, dice: random.Random) -> Example:
        """The example, if it draws or edits with some things that have no name; facts stay as they are."""
        return unnamed(one, dice, colours=self.options.nameless_colours, shapes=self.options.nameless_shapes)

    def asked(self, one: Example) -> list[Item]:
        """A question with its labelled answer, or a prompt to draw from, with a picture where it edits one."""
        shown = [Image.fromarray(image) for image in one.images]
        if one.answer is not None:
            return self.prompts.answered([{"role": "user", "content": one.prompt, "images": shown}], one.answer)
        assert one.target is not None, f"{one.task} has neither an answer nor a picture"
        return self.prompts.drawing(one.prompt, shown)

    def packed(self, samples: Sequence[Sequence[Item]]) -> Pack:
        """One pack, rounded up with a sample without loss: new shapes cost a CPU more than these rows."""
        rows = sum(item.segment.length for items in samples for item in items)
        filler = [[text_item([self.prompts.markers.pad] * (-rows % ROUND_ROWS))]] if rows % ROUND_ROWS else []
        return pack([*samples, *filler])
