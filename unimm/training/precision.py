"""The precision of a training: what a recipe names, or what the device is quickest in."""

from __future__ import annotations

import dataclasses

import torch

from unimm.training.config import TrainConfig


def resolve_precision(recipe: TrainConfig, device: torch.device) -> TrainConfig:
    """The recipe, with a precision in place of "auto": bfloat16 on a GPU and on a CPU with tiles for it, else float32.

    Of CPUs without tiles (AMX), those that have bfloat16 instructions (AVX-512) too multiply matrices in bfloat16 at
    half the speed of float32.
    """
    if recipe.precision != "auto":
        return recipe
    return dataclasses.replace(recipe, precision="bfloat16" if prefers_bfloat16(device) else "float32")


def prefers_bfloat16(device: torch.device) -> bool:
    """Whether matrix products on a device are quicker in bfloat16."""
    return device.type != "cpu" or torch.cpu._is_amx_tile_supported()


def precision_dtype(recipe: TrainConfig) -> torch.dtype:
    """What the products of a run are computed in."""
    assert recipe.precision != "auto", "resolve_precision comes first"
    return torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
