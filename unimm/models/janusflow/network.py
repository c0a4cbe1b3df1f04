"""JanusFlow's network: a causal decoder with a flow head between two U-ViTs."""
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unimm.sequence.packing import Tokens
from unimm.sequence.parts import Item, gap_item, image_item, text_item


@dataclass(frozen=True)
class Losses:
    """Cross entropy of every labelled row [m], squared error of every noised token [n, p*p*C]."""

    text: Tensor
    mse: Tensor


@dataclass(frozen=True)
class Entered:
    """Noised latents inside the language model: a row for the time, one for each token, and what skips it."""

    time: Tensor  # [B, D]
    rows: Tensor  # [B, n, D]
    skip: Tensor  # [B, C, h, w]

    def __getitem__(self, at: Tensor) -> "Entered":
        return Entered(self.time[at], self.rows[at], self.skip[at])


def target(tokens: Tensor, boi: int, *, time: float) -> Item:
    """Tokens [n, ...] of a latent to be noised up to `time`, 0 data and 1 noise; the row of its marker holds the time.

    Nothing sees them and the clock does not count them, so copies at other times may follow the same prompt, exactly.
    """
    item = image_item("draw", tokens, torch.arange(len(tokens)), markers=(boi,), causal=True, time=time, noised=True)
    return replace(item, segment=replace(item.segment, advance=0))


def unconditional(prompt: Sequence[Item]) -> list[Item]:
    """What guidance compares with, in place of a prompt: its first id, and nothing until where the prompt ends."""
    length = sum(item.segment.length for item in prompt)
    return [text_item([int(prompt[0].ids[0])]), gap_item(length - 1)]


def starts(tokens: Tokens) -> Tensor:
    """Which of a pack's image tokens begin a picture, [pictures]."""
    lengths = torch.tensor(tokens.lengths, device=tokens.rows.device)
    return lengths.cumsum(0) - lengths


def before(tokens: Tokens) -> Tensor:
    """The row before each picture of a pack, [pictures]."""
    return tokens.rows[starts(tokens)] - 1
