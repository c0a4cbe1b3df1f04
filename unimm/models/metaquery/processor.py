"""What MetaQuery asks of its reader: a system prompt, pictures, a caption, and the queries where an answer would begin.

Made without the model, so that training can make its batches ahead. docs/originals/metaquery.md, "Queries and prompt".
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from PIL import Image

from unimm.processing.images.io import CropSquare, open_image
from unimm.processing.requests import Picture
from unimm.sequence.packing import Pack, pack
from unimm.sequence.parts import Item, text_item
from unimm.sequence.segments import Past
from unimm.tokenizers.text import TextTokenizer, encode_marked, hide_markers
from unimm.vlms.llava_onevision.processor import LlavaPrompts

MARKERS = 2  # before the queries in the table of embeddings: <begin_of_img>, <end_of_img>


class Composer(Protocol):
    """What a reader makes of texts and pictures."""

    @property
    def words(self) -> TextTokenizer: ...

    def composed(self, text: str, pictures: Sequence[Picture]) -> list[Item]:
        """A text in which markers are markers, with a placeholder for each picture, as items."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """A reader's chat format. What all samples share ends with a marker, so that it can be read once."""

    opening: str  # has a place for the system prompt
    turn: str  # has places for the pictures and the caption; the queries come behind
    shown: str  # a picture


@dataclass(frozen=True)
class QueryPrompts:
    """Captions and pictures to items that end with the queries.

    first: the id of <begin_of_img>, which is how many rows the reader's own table has; end: of the marker after all.
    """

    reader: Composer
    template: Template
    system: str
    n_queries: int
    first: int
    end: int
    max_text: int

    @property
    def words(self) -> TextTokenizer:
        """The reader's tokenizer. Raises ValueError for a checkpoint without one."""
        return self.reader.words

    @cached_property
    def opening(self) -> list[int]:
        """Ids that every sample begins with."""
        return encode_marked(self.words, self._opening)

    @cached_property
    def queries(self) -> list[int]:
        """Ids of the queries between their markers, and of the end of the turn."""
        begin, queries = self.first + MARKERS, range(self.n_queries)
        return [self.first, *(begin + i for i in queries), self.first + 1, self.end]

    def drawing(self, caption: str, pictures: Sequence[Picture] = ()) -> list[Item]:
        """What a picture is drawn from: pictures first, then the caption, of at most max_text ids.

        The caption is cut alone and decoded again, as in the original. Markers in it are its author's words.
        """
        ids = self.words.encode(caption)
        cut = caption if len(ids) <= self.max_text else self.words.decode(ids[: self.max_text])
        shown = self.template.shown * len(pictures)
        turn = self.template.turn.format(pictures=shown, caption=hide_markers(self.words, cut))
        *before, last = self.reader.composed(self._opening + turn, pictures)
        return [*before, text_item([*last.ids.tolist(), *self.queries])]

    def asking(self, samples: Sequence[Sequence[Item]], *, multiple: int = 1) -> "Asking":
        """Samples for training; the prompts' rows rounded up to a multiple, with a text that nobody asks about."""
        prompts = [[*before, text_item(last.ids[: -len(self.queries)].tolist())] for *before, last in samples]
        rows = sum(item.segment.length for items in prompts for item in items)
        packed = pack([*prompts, *([[text_item([self.end] * (-rows % multiple))]] if rows % multiple else [])])
        ends = list(zip(packed.layout.lengths, packed.layout.clocks, strict=True))[: len(prompts)]
        past = [Past(length=length, clock=clock) for length, clock in ends]
        return Asking(packed, pack([[text_item(self.queries)]] * len(prompts), past))

    def rest(self, items: Sequence[Item]) -> list[Item]:
        """A sample without its opening, to be read behind it."""
        first, *others = items
        n = len(self.opening)
        assert first.ids[:n].tolist() == self.opening, "every sample begins with the opening, which ends with a marker"
        return [text_item(first.ids[n:].tolist()), *others]

    @property
    def _opening(self) -> str:
        return self.template.opening.format(hide_markers(self.words, self.system))


@dataclass(frozen=True)
class Asking:
    """Samples in two packs: all before the queries, which learns nothing while the reader is frozen, and the queries."""

    prompts: Pack
    queries: Pack

    def to(self, device: torch.device | str) -> "Asking":
        """The same on a device."""
        return Asking(self.prompts.to(device), self.queries.to(device))

    def order(self) -> torch.Tensor:
        """Which of all rows, the prompts' first, stand before one another in each sample: its prompt's, then its queries'."""
        first = self.prompts.layout.lengths[: len(self.queries.layout.lengths)]
        old, new, found = 0, sum(self.prompts.layout.lengths), []
        for before, behind in zip(first, self.queries.layout.lengths, strict=True):
            found += [torch.arange(old, old + before), torch.arange(new, new + behind)]
            old, new = old + before, new + behind
        return torch.cat(found).to(self.queries.ids.device)


def black(picture: Image.Image) -> Image.Image:
    """What stands for a picture that is dropped: a black one of its size."""
    return Image.new("RGB", picture.size)


@dataclass
class Asked:
    """What the reader is asked in one call, each sample once, and what each picture takes of the answers.

    A branch is a sample and the weight of the velocity under it; the weights of a picture's branches add up to 1.
    """

    prompts: QueryPrompts
    samples: list[list[Item]] = field(default_factory=list)
    known: dict[tuple, int] = field(default_factory=dict)

    def sample(self, caption: str, pictures: Sequence[Image.Image], *, kind: str) -> int:
        """The place of a sample. kind: what is shown, "black" in place of the pictures, or the pictures."""
        look = [black(picture) for picture in pictures] if kind == "black" else list(pictures)
        # black pictures are equal where their sizes are; others are where they are one object
        key = (caption, *(one.size if kind == "black" else id(one) for one in look))
        if key not in self.known:
            self.known[key] = len(self.samples)
            self.samples.append(self.prompts.drawing(caption, look))
        return self.known[key]

    def branches(
        self, caption: str, pictures: Sequence[Image.Image], *, negative: str, text: float, image: float
    ) -> list[tuple[int, float]]:
        """The branches of a picture under its scales of guidance; a branch of weight 0 is not read.

        Without pictures v = u + text (c - u). With them v = u + image (i - u) + text (c - i), where u sees the negative
        prompt and black pictures, i the negative prompt and the pictures; at an image scale of 1 or less
        v = i + text (c - i).
        """
        told = (caption, "shown", text)
        if not pictures or image <= 1:
            found = [(negative, "shown", 1 - text), told]
        else:
            found = [(negative, "black", 1 - image), (negative, "shown", image - text), told]
        return [(self.sample(words, pictures, kind=kind), weight) for words, kind, weight in found if weight]


@dataclass(frozen=True)
class Squares:
    """LLaVA-OneVision's prompts as MetaQuery makes them: pictures cropped to the tower's square, all of them tiled."""

    inner: LlavaPrompts

    @property
    def words(self) -> TextTokenizer:
        """The tokenizer."""
        return self.inner.words

    def composed(self, text: str, pictures: Sequence[Picture]) -> list[Item]:
        """A text in which markers are markers, with a placeholder for each picture, as items."""
        crop = CropSquare(self.inner.pixels.size)
        return self.inner.composed(text, [crop(open_image(picture)) for picture in pictures], tiled=True)


def composer(prompts: Any) -> Composer:
    """What makes a reader's texts and pictures into items, the way MetaQuery does."""
    return Squares(prompts) if isinstance(prompts, LlavaPrompts) else prompts
