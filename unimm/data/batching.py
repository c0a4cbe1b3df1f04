"""Which tasks a batch is made of."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor


def dealt(tasks: Mapping[str, int], size: int, dice: random.Random) -> list[str]:
    """The task of each of `size` samples: every task as often as it says, and what is left drawn by these weights.

    Tasks that say more than `size` together are a deck, and a batch is a hand of it: a share of each, on average.
    """
    deck = [task for task, n in tasks.items() for _ in range(n)]
    if len(deck) > size:
        return dice.sample(deck, size)
    return deck + dice.choices(deck, k=size - len(deck))


def to_image(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 [B, H, W, 3] -> image [B, 3, H, W] in [-1, 1]"""
    image = rearrange(torch.from_numpy(pixels).float() / 127.5 - 1, "B H W C -> B C H W")
    # a mere view would be channels-last, which takes three times as long in bfloat16 on a CPU
    return image.contiguous()


def to_pixels(image: Tensor) -> NDArray[np.uint8]:
    """image [B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3]"""
    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return rearrange(pixels, "B C H W -> B H W C").cpu().numpy()
