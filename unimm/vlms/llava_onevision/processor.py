"""What a conversation with pictures is in LLaVA-OneVision's sequence: texts in its chat template, pictures as rows.

Made without the model, so that training can make its batches ahead. docs/originals/metaquery.md, "Queries and prompt".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from PIL import Image

from unimm.processing.images.io import open_image
from unimm.processing.images.llava_onevision import AnyRes
from unimm.processing.requests import Picture, Turn
from unimm.sequence.parts import Item, text_item
from unimm.sequence.segments import Segment
from unimm.tokenizers.text import encode_marked, hide_markers
from unimm.vlms.llava_onevision.config import LlavaMarkers
from unimm.vlms.processor import END, START, ReaderPrompts, user_is_last

PLACEHOLDER = "<image>"


@dataclass(frozen=True, kw_only=True)
class LlavaPrompts(ReaderPrompts):
    """Conversations to items."""

    pixels: AnyRes
    markers: LlavaMarkers

    PLACEHOLDER: ClassVar[str] = PLACEHOLDER

    def template(self, turns: Sequence[Turn], *, system: str | None = None) -> tuple[str, list[Picture]]:
        """The text of a conversation, for `composed`, and its pictures; a caller may add to the text. No system prompt
        unless one is given."""
        text = f"{START}system \n{hide_markers(self.words, system)}{END}" if system else ""
        shown: list[Picture] = []
        for turn in turns:
            content, images = self.content(turn)
            ahead = PLACEHOLDER * len(images) if content.startswith(PLACEHOLDER * len(images)) else ""
            text += f"{START}{turn['role']} {ahead}\n{content[len(ahead) :]}{END}"
            shown += images
        user_is_last(turns)
        return text + f"{START}assistant\n", shown

    def composed(self, text: str, pictures: Sequence[Picture], *, tiled: bool | None = None) -> list[Item]:
        """A text in which markers are markers, with a `PLACEHOLDER` for each picture, as items.

        tiled: whether pictures are seen in tiles, too; unless given, a single one is, and several are not.
        """
        cut = len(pictures) == 1 if tiled is None else tiled
        return self.items(encode_marked(self.words, text), [open_image(picture) for picture in pictures], tiled=cut)

    def items(self, ids: Sequence[int], pictures: Sequence[Image.Image], *, tiled: bool) -> list[Item]:
        """Ids with a placeholder for each picture, as items. Raises ValueError where they are not as many."""
        places = [i for i, one in enumerate(ids) if one == self.markers.image]
        if len(places) != len(pictures):
            raise ValueError(
                f"got {len(places)} placeholders for {len(pictures)} pictures: write {PLACEHOLDER} for each"
            )
        out: list[Item] = []
        for begin, end, picture in zip([-1, *places], [*places, len(ids)], [None, *pictures], strict=True):
            out += [] if picture is None else [self.looked_at(picture, tiled=tiled)]
            out += [text_item(ids[begin + 1 : end])] if end > begin + 1 else []
        return out

    def looked_at(self, picture: Image.Image, *, tiled: bool) -> Item:
        """An RGB picture: no marker; of each row its picture's (height, width) and tiles, for the model to arrange them."""
        tiles = self.pixels.tiles(picture, tiled=tiled)
        n = self.pixels.rows(picture.height, picture.width, tiled=tiled)
        none = torch.zeros(0, dtype=torch.long)
        return Item(
            kind="look",
            segment=Segment(length=n, attend="causal", advance=n),
            ids=none,
            labels=none,
            tokens=torch.tensor([[picture.height, picture.width, len(tiles)]]).expand(n, 3),
            places=torch.arange(n),
            tiles=tiles,
        )
