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
from unimm.sequence.packing import PackedBatch
from unimm.sequence.parts import Part
from unimm.tokenizers.kl import AutoencoderKL

# rows that packs are filled up to a multiple of: new shapes cost a CPU more than these rows
ROW_MULTIPLE = 256
# a reasoning task's question and the thoughts about it, as a text without a picture: more text than the facts have
THOUGHT_TASKS = {f"fact.{kind}{level}": f"reason.{kind}{level}" for kind in ("math", "map") for level in (1, 2, 3)}


def sample_tasks(tasks: Mapping[str, int], size: int, rng: random.Random) -> list[str]:
    """The task of each of `size` samples: every task as often as it says, and what is left drawn by these weights.

    Tasks that say more than `size` together are a deck, and a batch is a hand of it: a share of each, on average.
    """
    deck = [task for task, n in tasks.items() for _ in range(n)]
    if len(deck) > size:
        return rng.sample(deck, size)
    return deck + rng.choices(deck, k=size - len(deck))


def uint8_to_image(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 [B, H, W, 3] -> image [B, 3, H, W] in [-1, 1]"""
    image = rearrange(torch.from_numpy(pixels).float() / 127.5 - 1, "B H W C -> B C H W")
    # a mere view would be channels-last, which takes three times as long in bfloat16 on a CPU
    return image.contiguous()


def image_to_uint8(image: Tensor) -> NDArray[np.uint8]:
    """image [B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3]"""
    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return rearrange(pixels, "B C H W -> B H W C").cpu().numpy()


def stack_images(arrays: Sequence[np.ndarray]) -> Tensor:
    """Pictures uint8 [h, w, 3] -> [P, 3, h, w] in [-1, 1]; no pixels where there is no picture."""
    if not arrays:
        return torch.zeros(0, 3, 0, 0)
    return rearrange(torch.from_numpy(np.stack(arrays)), "n h w c -> n c h w").contiguous().float() / 127.5 - 1


def training_example(task: str, index: int, *, seed: int) -> Example:
    """A training example of a task of the little world, or of THOUGHTS."""
    one = example(THOUGHT_TASKS.get(task, task), index, seed=seed)
    return replace(one, task=task, answer=one.think, target=None) if task in THOUGHT_TASKS else one


def label_counts(samples: Sequence[Sequence[Part]]) -> list[int]:
    """How many rows of each sample carry a label."""
    return [sum(int((item.labels >= 0).sum()) for item in items) for items in samples]


def gen_token_counts(samples: Sequence[Sequence[Part]]) -> list[int]:
    """How many tokens of each sample are drawn."""
    return [sum(item.n_tokens for item in items if item.kind == "gen_image") for items in samples]


def kind_indices(names: Sequence[str], examples: Sequence[Example], counts: Sequence[int]) -> Tensor:
    """The place of each example's group among the names (-1 for none), as often as said."""
    found = [names.index(g) if (g := one.task.split(".")[0]) in names else -1 for one in examples]
    return torch.tensor(found).repeat_interleave(torch.tensor(counts))


def mean_by_kind(names: Sequence[str], kinds: Tensor, losses: Tensor) -> dict[str, Tensor]:
    """The mean loss of every group that is there."""
    return {name: losses[at].mean() for i, name in enumerate(names) if (at := kinds == i).any()}


@torch.no_grad()
def encode_latent_tokens(
    pack: PackedBatch, vae: AutoencoderKL, images: Tensor, posterior: Tensor, *, patch: int
) -> PackedBatch:
    """The pack; if it draws, with latent tokens in place of (picture, token). images [P, 3, H, W], posterior [P, z, h, w]."""
    if pack.gen_images is None:
        return pack
    device = next(vae.parameters()).device
    latents = vae.encode(images.to(device), noise=posterior.to(device)).float().cpu()
    tokens = rearrange(latents, "n c (h p) (w q) -> n (h w) (p q c)", p=patch, q=patch)
    picture, token = pack.gen_images.content.unbind(-1)
    return replace(pack, gen_images=replace(pack.gen_images, content=tokens[picture, token]))
