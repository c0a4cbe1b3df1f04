"""Samples of parts packed end to end into one batch.

Axes: N rows, n rows or tokens of one kind, F features of a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from unimm.kernels.attention.mask import cached_tensor_property
from unimm.sequence.parts import IGNORE_INDEX, ImagePart, Part
from unimm.sequence.segments import CachedPrefix, PackedLayout, build_layout


@dataclass(frozen=True)
class ImageTokens:
    """The image tokens of one kind in a batch, image after image."""

    content: Tensor  # [n, F] patches or latent tokens, or [n] codes
    rows: Tensor  # [n] of the batch
    image_position_ids: Tensor  # [n] or [n, 3], as in ImagePart
    lengths: tuple[int, ...]  # tokens per image
    pixel_values: Tensor | None = None  # the tiles of all images, where tokens are no patches
    encoded: bool = False  # whether the content is the encoder's features already, [n, F]

    def to(self, device: torch.device | str) -> "ImageTokens":
        """The same tokens on a device."""
        pixel_values = None if self.pixel_values is None else self.pixel_values.to(device)
        position_ids = self.image_position_ids.to(device)
        content = self.content.to(device)
        return ImageTokens(content, self.rows.to(device), position_ids, self.lengths, pixel_values, self.encoded)


@dataclass(frozen=True)
class PackedBatch:
    """Samples of parts laid end to end, ready for one forward."""

    layout: PackedLayout
    ids: Tensor  # [n] of texts and of boundaries of images
    id_rows: Tensor  # [n] their rows
    labels: Tensor  # [n]
    label_weights: Tensor  # [n] of each label in a reweighted loss
    und_images: ImageTokens | None
    gen_images: ImageTokens | None
    timesteps: Tensor = field(repr=False)  # [generated image tokens] float32
    noised: Tensor = field(repr=False)  # [generated image tokens] bool: which carry the flow loss

    @cached_tensor_property
    def rows_by_expert(self) -> dict[str, Tensor]:
        """Routing by kind: generated image tokens to the generation expert, all others to the understanding one."""
        und = torch.cat([self.id_rows, self.und_images.rows]).sort().values if self.und_images else self.id_rows
        return {"und": und} | ({"gen": self.gen_images.rows} if self.gen_images else {})

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on a device."""
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
    """Lay samples of parts end to end; `prefixes` as in `build_layout`."""
    layout = build_layout([[part.segment for part in parts] for parts in samples], prefixes, device=device)
    placed = [
        pair
        for parts, rows in zip(samples, layout.segment_starts, strict=True)
        for pair in zip(parts, rows, strict=True)
    ]
    labels = [part.labels for part, _ in placed]
    generated = [part for part, _ in placed if isinstance(part, ImagePart) and part.kind == "gen_image"]
    n_tokens = torch.tensor([part.n_tokens for part in generated], dtype=torch.long)
    timesteps = torch.tensor([part.timestep for part in generated], dtype=torch.float32)
    noised = torch.tensor([part.noised for part in generated], dtype=torch.bool)
    return PackedBatch(
        layout=layout,
        ids=torch.cat([part.ids for part, _ in placed]).to(device),
        id_rows=torch.cat([row + _id_offsets(part) for part, row in placed]).to(device),
        labels=torch.cat(labels).to(device),
        label_weights=torch.cat([label_weights(one) for one in labels]).to(device),
        und_images=_image_tokens("und_image", placed, device),
        gen_images=_image_tokens("gen_image", placed, device),
        timesteps=timesteps.repeat_interleave(n_tokens).to(device),
        noised=noised.repeat_interleave(n_tokens).to(device),
    )


def _id_offsets(part: Part) -> Tensor:
    """The rows of a part's ids in its segment: a text's fill it, an image's stand at its ends."""
    if isinstance(part, ImagePart):
        return torch.tensor([0, part.n_tokens + 1])[: len(part.ids)]
    return torch.arange(len(part.ids))


def label_weights(labels: Tensor) -> Tensor:
    """The optional weight of each label of a part [n]: 1 / sqrt(labels): long answers do not outweigh short ones.

    It is 0 without a label. A label at the part's last row, of the id that ends the message, is not counted and weighs
    1.
    """
    labelled = labels != IGNORE_INDEX
    weight = labelled[:-1].sum().clamp(min=1).float().rsqrt()
    return torch.cat((labelled[:-1] * weight, labelled[-1:].float()))


def _image_tokens(kind: str, placed: list[tuple[Part, int]], device: torch.device | str) -> ImageTokens | None:
    images = [(part, row) for part, row in placed if isinstance(part, ImagePart) and part.kind == kind]
    if not images:
        return None
    parts = [part for part, _ in images]
    pixel_values = [part.pixel_values for part in parts if part.pixel_values is not None]
    tokens = ImageTokens(
        content=torch.cat([part.tokens for part in parts]),
        rows=torch.cat([row + min(1, len(part.ids)) + torch.arange(part.n_tokens) for part, row in images]),
        image_position_ids=torch.cat([part.image_position_ids for part in parts]),
        lengths=tuple(part.n_tokens for part in parts),
        pixel_values=torch.cat(pixel_values) if pixel_values else None,
        encoded=all(part.encoded for part in parts),
    )
    return tokens.to(device)
