"""The parts of a training batch: tasks, examples, images as tensors, packed parts, and kinds of samples."""

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
from unimm.sequence.parts import Part, text_part
from unimm.tokenizers.kl import AutoencoderKL

# packed rows are filled up to a multiple of this: new shapes cost a CPU more than these rows
ROW_MULTIPLE = 256
# the question and the reasoning of a reasoning task, as a text without an image: more text than the facts have
THOUGHT_TASKS = {f"fact.{kind}{level}": f"reason.{kind}{level}" for kind in ("math", "map") for level in (1, 2, 3)}


def sample_tasks(tasks: Mapping[str, int], size: int, rng: random.Random) -> list[str]:
    """The task of each of `size` samples, given how often each should occur.

    Every task occurs as often as its number, and what is left of the batch is sampled by these numbers as weights.
    Where they add up to more than `size`, so many are sampled without replacement.
    """
    repeated = [task for task, n in tasks.items() for _ in range(n)]
    if len(repeated) > size:
        return rng.sample(repeated, size)
    return repeated + rng.choices(repeated, k=size - len(repeated))


def training_example(task: str, index: int, *, seed: int) -> Example:
    """A training example of a task of the shapes world, or of THOUGHT_TASKS."""
    one = example(THOUGHT_TASKS.get(task, task), index, seed=seed)
    return replace(one, task=task, answer=one.think, target=None) if task in THOUGHT_TASKS else one


def uint8_to_image(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 [B, h, w, 3] -> image [B, 3, h, w] in [-1, 1]"""
    image = rearrange(torch.from_numpy(pixels).float() / 127.5 - 1, "B h w C -> B C h w")
    # a mere view would be channels-last, which takes three times as long in bfloat16 on a CPU
    return image.contiguous()


def image_to_uint8(image: Tensor) -> NDArray[np.uint8]:
    """image [B, 3, h, w] in [-1, 1] -> uint8 [B, h, w, 3]"""
    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return rearrange(pixels, "B C h w -> B h w C").cpu().numpy()


def stack_images(arrays: Sequence[NDArray[np.uint8]]) -> Tensor:
    """uint8 [h, w, 3] of one size -> images [P, 3, h, w] in [-1, 1]; [0, 3, 0, 0] for none."""
    return uint8_to_image(np.stack(arrays)) if arrays else torch.zeros(0, 3, 0, 0)


def pad_rows(samples: Sequence[Sequence[Part]], pad_id: int) -> list[Sequence[Part]]:
    """The samples, and one more, without labels, that fills up their rows to a multiple of ROW_MULTIPLE."""
    n_rows = sum(part.segment.length for parts in samples for part in parts)
    n_missing = -n_rows % ROW_MULTIPLE
    return [*samples, [text_part([pad_id] * n_missing)]] if n_missing else [*samples]


def label_counts(samples: Sequence[Sequence[Part]]) -> list[int]:
    """The number of labelled rows of each sample."""
    return [sum(int((part.labels >= 0).sum()) for part in parts) for parts in samples]


def gen_token_counts(samples: Sequence[Sequence[Part]]) -> list[int]:
    """The number of generated image tokens of each sample."""
    return [sum(part.n_tokens for part in parts if part.kind == "gen_image") for parts in samples]


def kind_indices(names: Sequence[str], examples: Sequence[Example], counts: Sequence[int]) -> Tensor:
    """The index of each example's kind among the names, -1 for none, repeated by the example's count."""
    return name_indices(names, [one.task.split(".")[0] for one in examples], counts)


def name_indices(names: Sequence[str], kinds: Sequence[str], counts: Sequence[int]) -> Tensor:
    """The index of each kind among the names, -1 for none, repeated by its count."""
    indices = [names.index(kind) if kind in names else -1 for kind in kinds]
    return torch.tensor(indices, dtype=torch.long).repeat_interleave(torch.tensor(counts, dtype=torch.long))


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, images: Tensor, posterior: Tensor) -> Tensor:
    """Latents [P, C, h', w'] of images [P, 3, h, w]: samples of the posterior, by its noise [P, C, h', w']."""
    device = next(vae.parameters()).device
    return vae.encode(images.to(device), noise=posterior.to(device)).float().cpu()


def place_latent_tokens(pack: PackedBatch, latents: Tensor, *, patch: int) -> PackedBatch:
    """The pack, in whose image tokens (image, index of the token) is replaced by the latents of `patch` x `patch`.

    latents [P, C, h', w']. A pack that generates no image stays as it is.
    """
    if pack.gen_images is None:
        return pack
    tokens = rearrange(latents, "P C (h p) (w q) -> P (h w) (p q C)", p=patch, q=patch)
    image, token = pack.gen_images.content.unbind(-1)
    return replace(pack, gen_images=replace(pack.gen_images, content=tokens[image, token]))
