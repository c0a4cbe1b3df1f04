"""Samples of parts packed end to end into one batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from unimm.kernels.attention.mask import kept
from unimm.sequence.parts import IGNORE, Item
from unimm.sequence.segments import Layout, Past, lay_out


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
    placed = [
        pair for items, rows in zip(samples, layout.starts, strict=True) for pair in zip(items, rows, strict=True)
    ]
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
