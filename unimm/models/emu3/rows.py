"""The rows of images while they are generated: which images predict a code next, and which end a row.

Axes: P images, h w the grid of an image.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unimm.generation.numbers import to_python
from unimm.models.emu3.text_tokenizer import Emu3SpecialTokens
from unimm.processing.requests import check_size

# codes a side: an image of 1024 * 1024 pixels that is 5 times as long as wide has 286
MAX_GRID_SIDE = 288


def parse_grids(size: Any, n_prompts: int, *, stride: int, default: tuple[int, int]) -> list[tuple[int, int]]:
    """The grid (h, w) of each prompt's images: of one (height, width) in pixels for all, or one (or None) a prompt.

    default: the size where it is None. Raises ValueError for sizes that are no multiples of `stride`, and too large ones.
    """
    given = to_python(size)
    # (height, width) holds numbers, a list of sizes does not
    is_list = isinstance(given, Sequence) and not isinstance(given, str | bytes) and not _holds_numbers(given)
    sizes = list(given) if is_list else [given] * n_prompts
    if len(sizes) != n_prompts:
        raise ValueError(f"got {len(sizes)} sizes for {n_prompts} prompts: give one, or one for each")
    checked = [check_size(default if one is None else one, stride, MAX_GRID_SIDE * stride) for one in sizes]
    return [(height // stride, width // stride) for height, width in checked]


def _holds_numbers(given: Sequence) -> bool:
    return any(isinstance(one, int | float) for one in given)


class ImageRows:
    """The codes of images of several grids, one token of each at a time.

    A row of w codes is followed by the id that ends it, behind the last one too. That one is not fed, nor are the three
    ids that end an image: nothing is predicted behind them.
    """

    def __init__(self, grids: Sequence[tuple[int, int]], special_tokens: Emu3SpecialTokens) -> None:
        self.grids = list(grids)
        self.special_tokens = special_tokens
        self.n_appended = 0
        self.tokens: list[Tensor] = []

    @property
    def n_steps(self) -> int:
        """How many tokens are fed: the one that begins the rows, and all of the largest grid but the last two."""
        return max(h * (w + 1) - 1 for h, w in self.grids)

    @property
    def wanted(self) -> list[int]:
        """The images whose next token is a code."""
        n = self.n_appended + 1
        return [i for i, (h, w) in enumerate(self.grids) if n % (w + 1) and n < h * (w + 1)]

    def append(self, codes: Tensor) -> Tensor:
        """The next token of each image [P], from the codes of those that are `wanted`; an end of a row for the others."""
        wanted = self.wanted
        ids = codes.new_full((len(self.grids),), self.special_tokens.eol)
        if len(wanted) == len(self.grids):
            ids = codes + self.special_tokens.code0
        elif wanted:
            ids[wanted] = codes + self.special_tokens.code0
        self.tokens.append(ids)
        self.n_appended += 1
        return ids

    def codes(self, *, missing: int | None = None) -> list[Tensor]:
        """The codes [h, w] of each image. missing: an id for tokens that were not appended yet."""
        # without values the first step stands for all
        last = self.tokens[-1:]
        if missing is not None:
            last = [last[0].new_full((len(self.grids),), missing) if last else torch.full((len(self.grids),), missing)]
        tokens = torch.stack(self.tokens + last * (self.n_steps - len(self.tokens)), 1)
        found = []
        for row, (h, w) in zip(tokens, self.grids, strict=True):
            # the end of the last row was left out; without values an end of a row may stand for a code
            whole = torch.cat((row[: h * (w + 1) - 1], row[:1])).view(h, w + 1)[:, :w]
            found.append(whole - self.special_tokens.code0)
        return found
