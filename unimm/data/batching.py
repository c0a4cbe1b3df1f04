"""What a batch is made of, and what its samples and losses are sorted by."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from unimm.data.shapes.goal import Example
from unimm.data.shapes.tasks import example
from unimm.sequence.packing import Pack
from unimm.sequence.parts import Item
from unimm.tokenizers.kl import VAE

# rows that packs are filled up to a multiple of: new shapes cost a CPU more than these rows
ROUND_ROWS = 256
# a reasoning task's question and the thoughts about it, as a text without a picture: more text than the facts have
THOUGHTS = {f"fact.{kind}{level}": f"reason.{kind}{level}" for kind in ("math", "map") for level in (1, 2, 3)}


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


def to_images(drawn: Sequence[np.ndarray]) -> Tensor:
    """Pictures uint8 [h, w, 3] -> [P, 3, h, w] in [-1, 1]; no pixels where there is no picture."""
    if not drawn:
        return torch.zeros(0, 3, 0, 0)
    return rearrange(torch.from_numpy(np.stack(drawn)), "n h w c -> n c h w").contiguous().float() / 127.5 - 1


def taken(task: str, index: int, *, seed: int) -> Example:
    """A training example of a task of the little world, or of THOUGHTS."""
    one = example(THOUGHTS.get(task, task), index, seed=seed)
    return replace(one, task=task, answer=one.think, target=None) if task in THOUGHTS else one


def labels(samples: Sequence[Sequence[Item]]) -> list[int]:
    """How many rows of each sample carry a label."""
    return [sum(int((item.labels >= 0).sum()) for item in items) for items in samples]


def drawn_tokens(samples: Sequence[Sequence[Item]]) -> list[int]:
    """How many tokens of each sample are drawn."""
    return [sum(item.n_tokens for item in items if item.kind == "draw") for items in samples]


def groups(names: Sequence[str], examples: Sequence[Example], times: Sequence[int]) -> Tensor:
    """The place of each example's group among the names (-1 for none), as often as said."""
    found = [names.index(g) if (g := one.task.split(".")[0]) in names else -1 for one in examples]
    return torch.tensor(found).repeat_interleave(torch.tensor(times))


def by_group(names: Sequence[str], groups: Tensor, losses: Tensor) -> dict[str, Tensor]:
    """The mean loss of every group that is there."""
    return {name: losses[at].mean() for i, name in enumerate(names) if (at := groups == i).any()}


@torch.no_grad()
def encoded(pack: Pack, vae: VAE, images: Tensor, posterior: Tensor, *, patch: int) -> Pack:
    """The pack; if it draws, with latent tokens in place of (picture, token). images [P, 3, H, W], posterior [P, z, h, w]."""
    if pack.draw is None:
        return pack
    device = next(vae.parameters()).device
    latents = vae.encode(images.to(device), noise=posterior.to(device)).float().cpu()
    tokens = rearrange(latents, "n c (h p) (w q) -> n (h w) (p q c)", p=patch, q=patch)
    picture, token = pack.draw.content.unbind(-1)
    return replace(pack, draw=replace(pack.draw, content=tokens[picture, token]))
