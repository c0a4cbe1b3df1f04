"""What a conversation with pictures is in Qwen2.5-VL's sequence: texts in its chat template, pictures behind a marker.

Made without the model, so that training can make its batches ahead. docs/originals/blocks.md, "Position ids (M-RoPE)"
and "Image processor".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from unimm.processing.images.io import open_image
from unimm.processing.images.qwen2_vl import Grid, SmartResize
from unimm.processing.requests import Picture, Turn
from unimm.sequence.parts import IGNORE, Item, text_item
from unimm.sequence.segments import Segment
from unimm.tokenizers.text import encode_marked, hide_markers
from unimm.vlms.processor import END, ROLES, START, ReaderPrompts, user_is_last
from unimm.vlms.qwen2_5_vl.config import QwenMarkers, QwenVisionConfig
from unimm.vlms.qwen2_5_vl.vision import cells

__all__ = ["END", "PLACEHOLDER", "ROLES", "SHOWN", "START", "SYSTEM", "QwenPrompts"]

PLACEHOLDER = "<|image_pad|>"  # where a picture belongs
SHOWN = f"<|vision_start|>{PLACEHOLDER}<|vision_end|>"
SYSTEM = "You are a helpful assistant."  # what the released chat template says where nobody else does


@dataclass(frozen=True, kw_only=True)
class QwenPrompts(ReaderPrompts):
    """Conversations to items."""

    pixels: SmartResize
    vision: QwenVisionConfig
    markers: QwenMarkers

    PLACEHOLDER: ClassVar[str] = PLACEHOLDER

    def template(self, turns: Sequence[Turn], *, system: str | None = None) -> tuple[str, list[Picture]]:
        """The text of a conversation, for `composed`, and its pictures; a caller may add to the text."""
        system = SYSTEM if system is None else system
        text = f"{START}system\n{hide_markers(self.words, system)}{END}\n" if system else ""
        shown: list[Picture] = []
        for turn in turns:
            content, images = self.content(turn)
            text += f"{START}{turn['role']}\n{content.replace(PLACEHOLDER, SHOWN)}{END}\n"
            shown += images
        user_is_last(turns)
        return text + f"{START}assistant\n", shown

    def composed(self, text: str, pictures: Sequence[Picture]) -> list[Item]:
        """A text in which markers are markers, with a `PLACEHOLDER` for each picture, as items."""
        shown = [self.pixels.patches([open_image(picture)]) for picture in pictures]
        return self.items(encode_marked(self.words, text), shown)

    def items(
        self, ids: Sequence[int], shown: Sequence[tuple[Tensor, Grid]], *, seconds: Sequence[float] = ()
    ) -> list[Item]:
        """Ids with runs of placeholders, each a picture's or a video's, as items. shown: patches and grid of each run.

        A run may be a single id or as long as the picture has cells. seconds: of each of `shown`, what a step of its grid
        in time lasts; a still picture's is 0, and so are all unless given. Raises ValueError where runs and pictures differ.
        """
        left = iter(zip(shown, seconds or [0.0] * len(shown), strict=True))
        out: list[Item] = []
        text: list[int] = []
        for one, length in _runs(ids, (self.markers.image, self.markers.video)):
            if not length:
                text.append(one)
                continue
            if not text or text.pop() != self.markers.look:
                raise ValueError(
                    "got a picture's placeholder without the marker <|vision_start|> before it: add the marker"
                )
            found = next(left, None)
            item = None if found is None else self.looked_at(*found[0], seconds=found[1])
            if item is None or length not in (1, item.n_tokens):
                n = "no picture" if item is None else f"a picture of {item.n_tokens} cells"
                raise ValueError(f"got {length} placeholders for {n}: expected one for each picture, or one a cell")
            out += [text_item(text), item] if text else [item]
            text = []
        if next(left, None) is not None:
            raise ValueError(
                f"got {len(shown)} pictures and fewer placeholders: write {PLACEHOLDER} where each belongs"
            )
        return [*out, text_item(text)] if text else out

    def looked_at(self, patches: Tensor, grid: Grid, *, seconds: float = 0.0) -> Item:
        """A picture's patches [N, C*T*p*p] behind the marker <|vision_start|>; its tokens are cells.

        Places [n, 3] are (time, row, column) from where the picture begins; the text behind it starts past the largest.
        """
        places = cells(grid, self.vision.merge)
        places[:, 0] = (places[:, 0] * seconds * self.vision.ticks).long()  # truncated, as in the original
        n = len(places)
        return Item(
            kind="look",
            segment=Segment(length=n + 1, attend="causal", advance=int(places.max()) + 2),
            ids=torch.tensor([self.markers.look]),
            labels=torch.tensor([IGNORE]),
            tokens=rearrange(patches, "(n s) f -> n (s f)", n=n),
            places=places,
        )


def _runs(ids: Sequence[int], pads: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Each id that is no pad, with 0; each run of equal pads once, with its length."""
    run = 0
    for i, one in enumerate(ids):
        run = run + 1 if one in pads else 0
        if not run:
            yield one, 0
        elif i + 1 == len(ids) or ids[i + 1] != one:
            yield one, run
            run = 0


def frames(pictures: Sequence[Picture]) -> list[Image.Image]:
    """Pictures of one size as the frames of a video. Raises ValueError where the sizes differ."""
    opened = [open_image(picture) for picture in pictures]
    if len({picture.size for picture in opened}) != 1:
        raise ValueError(
            f"got frames of sizes {[picture.size for picture in opened]}: expected some, of one size; resize them"
        )
    return opened
