"""Weights under their released names, written to files."""

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from unimm.checkpoint.keymap import KeyMap


def released_state_dict(model: nn.Module, key_map: KeyMap) -> dict[str, Tensor]:
    """The parameters that `key_map` knows as released tensors, under their released names."""
    ours = model.state_dict()
    released: dict[str, Tensor] = {}
    for name in ours:
        for key, transform in key_map.released_tensors(name).items():
            if key not in released:  # a tensor made of several parameters is found by each of them
                released[key] = transform.to_released([ours[one].detach() for one in transform.our_names]).contiguous()
    return released


def save_safetensors(state: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file."""
    save_file(state, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes files that only their owner can read
