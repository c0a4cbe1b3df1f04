"""Samples of parts packed end to end into one batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from unimm.kernels.attention.mask import cached_tensor_property
from unimm.sequence.parts import IGNORE_INDEX, Part
from unimm.sequence.segments import CachedPrefix, PackedLayout, build_layout


@dataclass(frozen=True)
class ImageTokens:
    """The image tokens of a pack: contents [n, F], their rows in the pack, places in the table, tokens an image."""

    content: Tensor
    rows: Tensor
    image_position_ids: Tensor
    lengths: tuple[int, ...]
    pixel_values: Tensor | None = None  # of all images, where tokens are no patches

    def to(self, device: torch.device | str) -> "ImageTokens":
        """The same tokens on a device."""
        tiles = None if self.pixel_values is None else self.pixel_values.to(device)
        return ImageTokens(
            self.content.to(device), self.rows.to(device), self.image_position_ids.to(device), self.lengths, tiles
        )


@dataclass(frozen=True)
class PackedBatch:
    """Samples of items, laid end to end, ready for one forward."""

    layout: PackedLayout
    ids: Tensor  # [n] text and marker ids
    id_rows: Tensor  # [n]
    labels: Tensor  # [n]
    label_weights: Tensor  # [n] of each label in a reweighted loss
    und_images: ImageTokens | None
    gen_images: ImageTokens | None
    timesteps: Tensor = field(repr=False)  # [draw tokens] float32
    noised: Tensor = field(repr=False)  # [draw tokens] bool: which carry the flow loss

    @cached_tensor_property
    def rows_by_expert(self) -> dict[str, Tensor]:
        """Hard routing by token kind: latent tokens are the generation expert's, all others the understanding one's."""
        rows = {
            "und": torch.cat([self.id_rows, self.und_images.rows]).sort().values if self.und_images else self.id_rows
        }
        return rows | ({"gen": self.gen_images.rows} if self.gen_images else {})

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same pack on a device."""
        if self.ids.device == torch.device(device):
            return self
        moved: dict[str, Any] = {}
        for part in fields(self):
            value = getattr(self, part.name)
            moved[part.name] = None if value is None else value.to(device)
        return PackedBatch(**moved)


def pack_sequences(
    samples: Sequence[Sequence[Part]],
    prefixes: Sequence[CachedPrefix] | None = None,
    *,
    device: torch.device | str = "cpu",
) -> PackedBatch:
    """Lay samples of items end to end; `past` as in `lay_out`."""
    layout = build_layout([[item.segment for item in items] for items in samples], prefixes, device=device)
    placed = [
        pair
        for items, rows in zip(samples, layout.segment_starts, strict=True)
        for pair in zip(items, rows, strict=True)
    ]
    # the ids of a text fill its segment, the markers of an image stand at its ends
    ends = [torch.tensor([0, i.n_tokens + 1])[: len(i.ids)] for i, _ in placed]
    ids_at = [at if i.n_tokens else torch.arange(len(i.ids)) for (i, _), at in zip(placed, ends, strict=True)]
    id_rows = [row + at for (_, row), at in zip(placed, ids_at, strict=True)]
    gen_images = [item for item, _ in placed if item.kind == "gen_image" and item.tokens is not None]
    labels = [item.labels for item, _ in placed]
    return PackedBatch(
        layout=layout,
        ids=torch.cat([item.ids for item, _ in placed]).to(device),
        id_rows=torch.cat(id_rows).to(device),
        labels=torch.cat(labels).to(device),
        label_weights=torch.cat([label_weights(one) for one in labels]).to(device),
        und_images=_image_tokens("und_image", placed, device),
        gen_images=_image_tokens("gen_image", placed, device),
        timesteps=_repeat_per_token(gen_images, [i.timestep for i in gen_images], torch.float32).to(device),
        noised=_repeat_per_token(gen_images, [i.noised for i in gen_images], torch.bool).to(device),
    )


def label_weights(labels: Tensor) -> Tensor:
    """The optional weight of each label of an item [n]: 1 / sqrt(labels of its turn), so that long answers do not drown
    short ones; 0 without loss. A label at the closing token is no part of the turn and weighs 1."""
    counts = labels != IGNORE_INDEX
    turn = counts[:-1].sum().clamp(min=1).float().rsqrt()
    return torch.cat((counts[:-1] * turn, counts[-1:].float()))


def _image_tokens(kind: str, placed: list[tuple[Part, int]], device: torch.device | str) -> ImageTokens | None:
    content, rows, image_position_ids, pixel_values = [], [], [], []
    for item, row in placed:
        if item.kind == kind and item.tokens is not None and item.image_position_ids is not None:
            content.append(item.tokens)
            rows.append(row + min(1, len(item.ids)) + torch.arange(len(item.tokens)))
            image_position_ids.append(item.image_position_ids)
            pixel_values += [] if item.pixel_values is None else [item.pixel_values]
    if not content:
        return None
    pixels = torch.cat(pixel_values) if pixel_values else None
    return ImageTokens(
        torch.cat(content), torch.cat(rows), torch.cat(image_position_ids), tuple(map(len, content)), pixels
    ).to(device)


def _repeat_per_token(items: list[Part], values: list, dtype: torch.dtype) -> Tensor:
    lengths = torch.tensor([item.n_tokens for item in items], dtype=torch.long)
    return torch.tensor(values, dtype=dtype).repeat_interleave(lengths)
