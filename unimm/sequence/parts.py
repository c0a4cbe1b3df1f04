"""The parts of an interleaved sequence: texts, images and position gaps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from unimm.sequence.segments import Segment

IGNORE_INDEX = -100  # a label without loss; torch.nn.functional.cross_entropy's own default


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """Token ids in a segment of their own; also a position gap, which has none."""

    kind: ClassVar[Literal["text"]] = "text"
    n_tokens: ClassVar[int] = 0  # image tokens
    noised: ClassVar[bool] = False

    segment: Segment
    ids: Tensor  # [n]
    labels: Tensor  # [n] the id that each row must predict, or IGNORE_INDEX


@dataclass(frozen=True, kw_only=True)
class ImagePart:
    """The tokens of an image between two boundary ids, behind one, or alone."""

    kind: Literal["und_image", "gen_image"]  # to understand (features of an encoder), or generated (latents, codes)
    segment: Segment
    ids: Tensor  # the boundary ids: [2] around the tokens, [1] before them, [0] none
    labels: Tensor  # of the boundary ids: the id that each row must predict, or IGNORE_INDEX
    # to understand: patches [n, p*p*3], or features [n, F] where it is encoded already; generated: clean latent tokens
    # [n, p*p*C], or codes [n]
    tokens: Tensor
    # [n] where each token lies in its table of positions; or [n, 3] its time, row and column from the image's first
    image_position_ids: Tensor
    pixel_values: Tensor | None = (
        None  # the tiles [T, C, S, S] that the tokens are features of, where they are no patches
    )
    timestep: float = 0.0  # generated: 0 is data, 1 is noise
    noised: bool = False  # generated: a target, its tokens carry the flow loss
    encoded: bool = False  # to understand: whether the tokens are the encoder's features

    @property
    def n_tokens(self) -> int:
        """Image tokens."""
        return len(self.tokens)


Part: TypeAlias = TextPart | ImagePart


def text_part(ids: Sequence[int], *, labels: Sequence[int] | None = None) -> TextPart:
    """A text of n token ids, special ones included: causal, each at the next position."""
    n = len(ids)
    return TextPart(
        segment=Segment(length=n, attention="causal", advance=n),
        ids=torch.tensor(ids, dtype=torch.long),
        labels=torch.full((n,), IGNORE_INDEX) if labels is None else torch.tensor(labels, dtype=torch.long),
    )


def image_part(
    kind: Literal["und_image", "gen_image"],
    tokens: Tensor,
    image_position_ids: Tensor,
    *,
    boundary_ids: tuple[int, int] | tuple[int],
    causal: bool = False,
    timestep: float = 0.0,
    noised: bool = False,
    video_frame: tuple[int, bool] | None = None,
    end_label: int = IGNORE_INDEX,
) -> ImagePart:
    """An image of n tokens between two boundary ids, or behind one.

    All its rows attend to each other and share one position; the next part begins at the next one, behind a noised
    image at the same. A `causal` image is like a text: each row attends to those before it and has a position of its
    own. Later parts do not see a noised image. Frames of a video are the exception, video_frame = (positions to the
    next frame, whether it shares a block with the frame before): later parts see them, noised as they are.
    """
    length = len(tokens) + len(boundary_ids)
    n = len(boundary_ids)
    advance, joined = video_frame or (length if causal else 0 if noised else 1, False)
    visible = video_frame is not None or not noised
    attention: Literal["causal", "full"] = "causal" if causal else "full"
    return ImagePart(
        kind=kind,
        segment=Segment(length=length, attention=attention, visible=visible, advance=advance, joined=joined),
        ids=torch.tensor(boundary_ids, dtype=torch.long),
        labels=torch.tensor((IGNORE_INDEX, end_label)[:n]),
        tokens=tokens,
        image_position_ids=image_position_ids,
        timestep=timestep,
        noised=noised,
    )


def position_gap(advance: int) -> TextPart:
    """No rows, but `advance` positions: what remains of a dropped image."""
    none = torch.zeros(0, dtype=torch.long)
    return TextPart(segment=Segment(length=0, attention="full", advance=advance), ids=none, labels=none)
