"""A recipe's `lora`: an adapter of a release is trained, and it alone is what checkpoints and the release hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from unimm.adapters.config import AdapterConfig
from unimm.models.base import UnifiedModel
from unimm.training.lora_config import LoRAConfig

ADAPTER = "default"


def add_adapter(model: Any, config: LoRAConfig, *, task: str, seed: int, base: str | None) -> None:
    """Add the recipe's adapter to a task's model, and train it alone. base: the release that the model was loaded from.

    Raises ValueError for a task whose model is no family's, or is not loaded from a release.
    """
    if not isinstance(model, UnifiedModel):
        raise ValueError(f"got lora for the task {task!r}, which trains no whole model: leave it out")
    if not base:
        raise ValueError(
            f"got lora, and a model that is no release: give model.from_pretrained, whose weights an adapter of the task "
            f"{task!r} stands on"
        )
    adapter = AdapterConfig(
        rank=config.rank, alpha=config.alpha, targets=config.targets, dropout=config.dropout, dora=config.dora
    )
    # where the adapter begins, and what its dropout draws
    torch.manual_seed(seed)
    model.add_adapter(adapter, name=ADAPTER)


def release_writer(task: Any) -> Callable[[Path], None]:
    """What writes the release of a task: the task itself, or its model's adapter alone, where it trains one."""
    model = task.model
    if isinstance(model, UnifiedModel) and model.adapters is not None and model.adapters.names:
        return lambda folder: model.save_adapter(folder, name=ADAPTER)
    return task.save
