"""The one description of an interleaved sequence: segments, the items that fill them, and packs of many samples.

Masks, positions, expert choice and losses all come from the segment table; there is no second description.
"""
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from unimm.kernels import Block, Mask
from unimm.kernels.attention.mask import kept

IGNORE = -100  # a label without loss; torch.nn.functional.cross_entropy's own default


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Consecutive rows of one sample.

    The mask rule, once, for training, prefill and denoising: a row sees another of its sample when that one's
    segment is visible or is its own, and it stands before, or both stand in one full segment.

    `advance` is how far the rotary clock moves past the segment. Rows of a causal segment count up from the clock,
    rows of a full one share it. A `joined` segment is one block with the segment before it: frames of one video see
    each other, each at its own clock. Length 0 is a dropped condition that still moves the clock.
    """

    length: int
    attend: Literal["causal", "full"]
    visible: bool = True
    advance: int
    joined: bool = False


@dataclass(frozen=True, kw_only=True)
class Item:
    """A segment and what fills it: token ids alone (text), or marker ids around (one: before) an image's tokens."""

    kind: Literal["text", "look", "draw"]  # a text, an image looked at (ViT), an image drawn or drawn before (latents)
    segment: Segment
    ids: Tensor  # [n] text, or the markers: [2] around the tokens, [1] before them, [0] none
    labels: Tensor  # one for each of ids, the id that its row must predict, or IGNORE
    tokens: Tensor | None = None  # look: patches [n, p*p*3]; draw: latent tokens [n, p*p*C], clean, or codes [n]
    # [n], where each token lies in its table of positions; or [n, 3], its time, row and column from where the image begins
    places: Tensor | None = None
    tiles: Tensor | None = None  # look: the pixels [T, C, S, S] behind tokens that are no patches
    time: float = 0.0  # draw: 0 is data, 1 is noise
    noised: bool = False  # draw: a target, its tokens carry the flow loss

    @property
    def n_tokens(self) -> int:
        """Image tokens; a text has none."""
        return 0 if self.tokens is None else len(self.tokens)


def text_item(ids: Sequence[int], *, labels: Sequence[int] | None = None) -> Item:
    """A text of n token ids, markers included; causal, and the clock moves by n."""
    n = len(ids)
    return Item(
        kind="text",
        segment=Segment(length=n, attend="causal", advance=n),
        ids=torch.tensor(ids, dtype=torch.long),
        labels=torch.full((n,), IGNORE) if labels is None else torch.tensor(labels, dtype=torch.long),
    )


def image_item(
    kind: Literal["look", "draw"],
    tokens: Tensor,
    places: Tensor,
    *,
    markers: tuple[int, int] | tuple[int],
    causal: bool = False,
    time: float = 0.0,
    noised: bool = False,
    frame: tuple[int, bool] | None = None,
    end_label: int = IGNORE,
) -> Item:
    """An image of n tokens between its two markers, or behind one; full, all rows at one clock, which moves by 1
    (noised: by 0). A `causal` image is read like a text: each row sees those before it, the clock counts every row.

    A noised image is invisible to all that follows. Frames of a video are the exception, `frame` = (clock steps to
    the next frame, whether it joins the frame before): later items see them, noised as they are.
    """
    length, n = len(tokens) + len(markers), len(markers)
    advance, joined = frame or (length if causal else 0 if noised else 1, False)
    visible = frame is not None or not noised
    attend: Literal["causal", "full"] = "causal" if causal else "full"
    return Item(
        kind=kind,
        segment=Segment(length=length, attend=attend, visible=visible, advance=advance, joined=joined),
        ids=torch.tensor(markers, dtype=torch.long),
        labels=torch.tensor((IGNORE, end_label)[:n]),
        tokens=tokens,
        places=places,
        time=time,
        noised=noised,
    )


def gap_item(advance: int) -> Item:
    """No rows, but the clock moves: what is left of a dropped image."""
    none = torch.zeros(0, dtype=torch.long)
    return Item(kind="text", segment=Segment(length=0, attend="full", advance=advance), ids=none, labels=none)


@dataclass(frozen=True, kw_only=True)
class Past:
    """What a sample already holds in a cache: rows, the rotary clock after them, where its buffer begins."""

    length: int = 0
    clock: int = 0
    start: int | None = None


@dataclass(frozen=True)
class Layout:
    """Where the rows of packed samples lie, at which rotary position, and who sees whom."""

    starts: tuple[tuple[int, ...], ...]  # first row of each segment, by sample
    lengths: tuple[int, ...]  # rows a sample
    clocks: tuple[int, ...]  # the rotary clock after each sample
    positions: Tensor  # [N]
    mask: Mask

    def to(self, device: torch.device | str) -> "Layout":
        """The same layout on a device."""
        return replace(self, positions=self.positions.to(device), mask=self.mask.to(device))


def lay_out(
    samples: Sequence[Sequence[Segment]], past: Sequence[Past] | None = None, *, device: torch.device | str = "cpu"
) -> Layout:
    """Pack samples end to end. `past` says what each sample's rows come after; nothing unless given.

    Worked rows, one sample: text of 3, clean image of 2 tokens and markers, noised image of 1 token and markers

        row       0  1  2 | 3  4  5  6 | 7  8  9
        position  0  1  2 | 3  3  3  3 | 4  4  4      the clock then stands at 4: a noised image does not move it
    """
    past = past or [Past()] * len(samples)
    row, starts, clocks, positions, blocks = 0, [], [], [], []
    for segments, before in zip(samples, past, strict=True):
        clock, sample_starts = before.clock, []
        for segment in segments:
            sample_starts.append(row)
            positions.append(clock + torch.arange(segment.length) * (segment.attend == "causal"))
            row, clock = row + segment.length, clock + segment.advance
        starts.append(tuple(sample_starts))
        clocks.append(clock)
        blocks.append([Block(before.length, full=True), *_blocks(segments)])
    lengths = tuple(sum(segment.length for segment in segments) for segments in samples)
    key_starts = None if past[0].start is None else [p.start or 0 for p in past]
    mask = Mask(blocks, queries=lengths, key_starts=key_starts, device=device)
    return Layout(tuple(starts), lengths, tuple(clocks), torch.cat(positions).to(device), mask)


def _blocks(segments: Sequence[Segment]) -> list[Block]:
    blocks: list[Block] = []
    for segment in segments:
        if segment.joined:
            blocks[-1] = Block(blocks[-1].length + segment.length, full=True, visible=segment.visible)
        else:
            blocks.append(Block(segment.length, full=segment.attend == "full", visible=segment.visible))
    return blocks


@dataclass(frozen=True)
class Tokens:
    """The image tokens of a pack: contents [n, F], their rows in the pack, places in the table, tokens an image."""

    content: Tensor
    rows: Tensor
    places: Tensor
    lengths: tuple[int, ...]
    tiles: Tensor | None = None  # of all images, where tokens are no patches

    def to(self, device: torch.device | str) -> "Tokens":
        """The same tokens on a device."""
        tiles = None if self.tiles is None else self.tiles.to(device)
        return Tokens(self.content.to(device), self.rows.to(device), self.places.to(device), self.lengths, tiles)


@dataclass(frozen=True)
class Pack:
    """Samples of items, laid end to end, ready for one forward."""

    layout: Layout
    ids: Tensor  # [n] text and marker ids
    id_rows: Tensor  # [n]
    labels: Tensor  # [n]
    weights: Tensor  # [n] of each label in a reweighted loss
    look: Tokens | None
    draw: Tokens | None
    times: Tensor = field(repr=False)  # [draw tokens] float32
    noised: Tensor = field(repr=False)  # [draw tokens] bool: which carry the flow loss

    @kept
    def streams(self) -> dict[str, Tensor]:
        """Hard routing by token kind: latent tokens are the generation expert's, all others the understanding one's."""
        rows = {"und": torch.cat([self.id_rows, self.look.rows]).sort().values if self.look else self.id_rows}
        return rows | ({"gen": self.draw.rows} if self.draw else {})

    def to(self, device: torch.device | str) -> "Pack":
        """The same pack on a device."""
        if self.ids.device == torch.device(device):
            return self
        moved: dict[str, Any] = {}
        for part in fields(self):
            value = getattr(self, part.name)
            moved[part.name] = None if value is None else value.to(device)
        return Pack(**moved)


def pack(
    samples: Sequence[Sequence[Item]], past: Sequence[Past] | None = None, *, device: torch.device | str = "cpu"
) -> Pack:
    """Lay samples of items end to end; `past` as in `lay_out`."""
    layout = lay_out([[item.segment for item in items] for items in samples], past, device=device)
    placed = [pair for items, rows in zip(samples, layout.starts, strict=True) for pair in zip(items, rows, strict=True)]
    # the ids of a text fill its segment, the markers of an image stand at its ends
    ends = [torch.tensor([0, i.n_tokens + 1])[: len(i.ids)] for i, _ in placed]
    ids_at = [at if i.n_tokens else torch.arange(len(i.ids)) for (i, _), at in zip(placed, ends, strict=True)]
    id_rows = [row + at for (_, row), at in zip(placed, ids_at, strict=True)]
    draws = [item for item, _ in placed if item.kind == "draw" and item.tokens is not None]
    labels = [item.labels for item, _ in placed]
    return Pack(
        layout=layout,
        ids=torch.cat([item.ids for item, _ in placed]).to(device),
        id_rows=torch.cat(id_rows).to(device),
        labels=torch.cat(labels).to(device),
        weights=torch.cat([label_weights(one) for one in labels]).to(device),
        look=_tokens("look", placed, device),
        draw=_tokens("draw", placed, device),
        times=_each_token(draws, [i.time for i in draws], torch.float32).to(device),
        noised=_each_token(draws, [i.noised for i in draws], torch.bool).to(device),
    )


def label_weights(labels: Tensor) -> Tensor:
    """The optional weight of each label of an item [n]: 1 / sqrt(labels of its turn), so that long answers do not drown
    short ones; 0 without loss. A label at the closing token is no part of the turn and weighs 1."""
    counts = labels != IGNORE
    turn = counts[:-1].sum().clamp(min=1).float().rsqrt()
    return torch.cat((counts[:-1] * turn, counts[-1:].float()))


def _tokens(kind: str, placed: list[tuple[Item, int]], device: torch.device | str) -> Tokens | None:
    content, rows, places, tiles = [], [], [], []
    for item, row in placed:
        if item.kind == kind and item.tokens is not None and item.places is not None:
            content.append(item.tokens)
            rows.append(row + min(1, len(item.ids)) + torch.arange(len(item.tokens)))
            places.append(item.places)
            tiles += [] if item.tiles is None else [item.tiles]
    if not content:
        return None
    pixels = torch.cat(tiles) if tiles else None
    return Tokens(torch.cat(content), torch.cat(rows), torch.cat(places), tuple(map(len, content)), pixels).to(device)


def _each_token(items: list[Item], values: list, dtype: torch.dtype) -> Tensor:
    lengths = torch.tensor([item.n_tokens for item in items], dtype=torch.long)
    return torch.tensor(values, dtype=dtype).repeat_interleave(lengths)
