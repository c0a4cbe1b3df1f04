"""Weights under their released names, written to files."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unimm.checkpoint.keymap import KeyMap, released_names


def released_state_dict(model: nn.Module, key_map: KeyMap) -> dict[str, Tensor]:
    """The parameters that `table` knows, under their released names."""
    ours, found = model.state_dict(), {}
    for name, tensor in ours.items():
        for key, place in released_names(name, key_map).items():
            if place.stack and key not in found:
                found[key] = torch.cat([ours[one].detach() for one in place.stack])
            elif not place.stack:
                found[key] = place.take(tensor.detach()).contiguous()
    return found


def save_safetensors(state: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file."""
    save_file(state, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes files that only their owner can read
