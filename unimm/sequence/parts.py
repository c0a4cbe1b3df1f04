"""The parts of an interleaved sequence: texts, images and position gaps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unimm.sequence.segments import Segment

IGNORE = -100  # a label without loss; torch.nn.functional.cross_entropy's own default


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
