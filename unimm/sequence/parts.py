"""The parts of an interleaved sequence: texts, images and position gaps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unimm.sequence.segments import Segment

IGNORE_INDEX = -100  # a label without loss; torch.nn.functional.cross_entropy's own default


@dataclass(frozen=True, kw_only=True)
class Part:
    """A segment and what fills it: token ids alone (text), or marker ids around (one: before) an image's tokens."""

    kind: Literal[
        "text", "und_image", "gen_image"
    ]  # a text, an image looked at (ViT), an image drawn or drawn before (latents)
    segment: Segment
    ids: Tensor  # [n] text, or the markers: [2] around the tokens, [1] before them, [0] none
    labels: Tensor  # one for each of ids, the id that its row must predict, or IGNORE
    tokens: Tensor | None = None  # look: patches [n, p*p*3]; draw: latent tokens [n, p*p*C], clean, or codes [n]
    # [n], where each token lies in its table of positions; or [n, 3], its time, row and column from where the image begins
    image_position_ids: Tensor | None = None
    pixel_values: Tensor | None = None  # look: the pixels [T, C, S, S] behind tokens that are no patches
    timestep: float = 0.0  # draw: 0 is data, 1 is noise
    noised: bool = False  # draw: a target, its tokens carry the flow loss

    @property
    def n_tokens(self) -> int:
        """Image tokens; a text has none."""
        return 0 if self.tokens is None else len(self.tokens)


def text_part(ids: Sequence[int], *, labels: Sequence[int] | None = None) -> Part:
    """A text of n token ids, markers included; causal, and the clock moves by n."""
    n = len(ids)
    return Part(
        kind="text",
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
) -> Part:
    """An image of n tokens between its two markers, or behind one; full, all rows at one clock, which moves by 1
    (noised: by 0). A `causal` image is read like a text: each row sees those before it, the clock counts every row.

    A noised image is invisible to all that follows. Frames of a video are the exception, `frame` = (clock steps to
    the next frame, whether it joins the frame before): later items see them, noised as they are.
    """
    length, n = len(tokens) + len(boundary_ids), len(boundary_ids)
    advance, joined = video_frame or (length if causal else 0 if noised else 1, False)
    visible = video_frame is not None or not noised
    attend: Literal["causal", "full"] = "causal" if causal else "full"
    return Part(
        kind=kind,
        segment=Segment(length=length, attention=attend, visible=visible, advance=advance, joined=joined),
        ids=torch.tensor(boundary_ids, dtype=torch.long),
        labels=torch.tensor((IGNORE_INDEX, end_label)[:n]),
        tokens=tokens,
        image_position_ids=image_position_ids,
        timestep=timestep,
        noised=noised,
    )


def position_gap(advance: int) -> Part:
    """No rows, but the clock moves: what is left of a dropped image."""
    none = torch.zeros(0, dtype=torch.long)
    return Part(kind="text", segment=Segment(length=0, attention="full", advance=advance), ids=none, labels=none)
