"""How a call of UniWorld paints: its options, one a picture, and what samples are told as one batch.

Axes: B pictures, m tokens of what the painter is told, C channels.
"""
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Self

from unimm.processing.requests import drawable, each, seeds

LARGEST = 4096  # pixels a side of what is drawn
References = Literal["tokens", "condition"]


@dataclass(frozen=True, kw_only=True)
class Painting:
    """How pictures are painted; sizes, seeds and guidances are one a picture, (height, width) None for the pictures' own.

    t5, clip: whether they are told the prompt; None: where they are. references: see `UniWorld.generate`.
    """

    steps: int
    sizes: Sequence[tuple[int, int] | None] = ()
    seeds: Sequence[int] = ()
    guidances: Sequence[float] = ()
    text_guidances: Sequence[float] = ()
    t5: bool | None = None
    clip: bool | None = None
    references: References | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or not all(scale >= 0 for scale in (*self.guidances, *self.text_guidances)):
            raise ValueError(
                f"got steps {self.steps}, guidances {[*self.guidances]}, text guidances {[*self.text_guidances]}: expected a "
                "step, and scales of 0 or more"
            )
        if self.references not in (None, *get_args(References)):
            raise ValueError(f"got references {self.references!r}: expected None, 'tokens' or 'condition'")

    def of(
        self,
        prompts: int,
        n: int,
        *,
        stride: int,
        size: tuple[int, int] | None,
        seed: int | Sequence[int],
        guidance: float | Sequence[float],
        text_guidance: float | Sequence[float],
    ) -> Self:
        """These options for `n` pictures of each prompt, in the order of the prompts; a guidance is one, or one a prompt.

        Raises ValueError for other lengths, and for a size that is no multiple of `stride`.
        """
        if n < 1:
            raise ValueError(f"got n {n}: expected a picture of each prompt, or more")
        fits = None if size is None else drawable(size, stride, LARGEST)
        scales = [each(guidance, prompts, "guidances"), each(text_guidance, prompts, "text guidances")]
        guidances, text_guidances = ([float(one) for one in some for _ in range(n)] for some in scales)
        return replace(
            self,
            sizes=[fits] * (n * prompts),
            seeds=seeds(seed, prompts, copies=n),
            guidances=guidances,
            text_guidances=text_guidances,
        )


def padded(told: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """What samples are told [m, C] as one batch [B, M, C], and which of it is no padding [B, M]; None where all is."""
    lengths = torch.tensor([len(one) for one in told])
    batch = nn.utils.rnn.pad_sequence(list(told), batch_first=True)
    if lengths.unique().numel() == 1:
        return batch, None
    return batch, (torch.arange(batch.shape[1]) < lengths[:, None]).to(batch.device)
