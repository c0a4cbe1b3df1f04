"""The precision of a training: what a recipe names, or what the device is quickest in."""

from __future__ import annotations

import dataclasses

import torch

from unimm.nn.cpu_units import prefers_bfloat16
from unimm.training.config import TrainConfig


def resolve_precision(recipe: TrainConfig, device: torch.device) -> TrainConfig:
    """The recipe, with a precision in place of "auto": bfloat16 on a GPU and on a CPU with tiles for it, else
    float32."""
    if recipe.precision != "auto":
        return recipe
    return dataclasses.replace(recipe, precision="bfloat16" if prefers_bfloat16(device) else "float32")


def precision_dtype(recipe: TrainConfig) -> torch.dtype:
    """What the products of a run are computed in."""
    assert recipe.precision != "auto", "resolve_precision comes first"
    return torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
