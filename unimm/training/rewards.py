"""Rewards of generated images, and the advantages that follow: how training learns from a judge in place of targets.

A reward is any callable from images and what they were asked for to one number an image. Advantages compare the images
of one prompt with each other: Shao et al. 2024, arXiv 2402.03300, section 4.1.1 (GRPO).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unimm.data.shapes import Example
from unimm.data.shapes.scoring import judge

# added to the deviation of a group's rewards before dividing by it
EPSILON = 1e-4


@dataclass(frozen=True, kw_only=True, eq=False)
class RewardRequest:
    """What an image was asked for. example: of the shapes world, which has an exact answer; None for another prompt."""

    prompt: str
    example: Example | None = None


class RewardFunction(Protocol):
    """What rewards are computed by."""

    def __call__(self, images: Sequence[Image.Image], requests: Sequence[RewardRequest]) -> Sequence[float]:
        """One finite number an image, larger for better ones."""


def exact_reward(images: Sequence[Image.Image], requests: Sequence[RewardRequest]) -> list[float]:
    """1 for an image of the shapes world that shows exactly what its prompt asks for, else 0.

    Raises ValueError for a prompt that is none of the shapes world's.
    """
    rewards = []
    for image, request in zip(images, requests, strict=True):
        if request.example is None:
            raise ValueError(
                f"got the prompt {request.prompt!r:.80}, expected one of the shapes world's tasks: the exact reward "
                "judges these alone; name another reward, module:function"
            )
        rewards.append(float(judge(request.example, np.asarray(image.convert("RGB")))))
    return rewards


def load_reward(name: str) -> RewardFunction:
    """The reward that a recipe names: "exact", or module:function. Raises ValueError for what cannot be imported."""
    if name == "exact":
        return exact_reward
    module, colon, function = name.partition(":")
    try:
        if not colon:
            raise AttributeError("no colon between a module and a function")
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"got reward {name!r}, expected exact, or module:function of what can be imported: {error}; a module of "
            "the working folder needs `PYTHONPATH=.`"
        ) from error
    if not callable(found):
        raise ValueError(f"got reward {name!r}, a {type(found).__name__}, expected a function")
    return found


def compute_rewards(reward: RewardFunction, images: Sequence[Image.Image], requests: Sequence[RewardRequest]) -> Tensor:
    """The reward of every image [n], float32. Raises ValueError for another number of them, or one that is not
    finite."""
    found = torch.as_tensor(list(reward(images, requests)), dtype=torch.float32)
    if found.shape != (len(images),) or not bool(found.isfinite().all()):
        raise ValueError(
            f"the reward returned {found.tolist()!r:.80}, expected a finite number for each of {len(images)} images"
        )
    return found


def group_advantages(rewards: Tensor) -> Tensor:
    """Rewards [P, G] of P groups, less their group's mean, in units of its deviation; 0 where all of it are equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True, correction=0) + EPSILON)
