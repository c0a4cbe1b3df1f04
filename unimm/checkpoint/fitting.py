"""Whether the weights of a model fit a device, known before the first of them is allocated."""

from pathlib import Path
from typing import Any, Protocol

import torch

from unimm.checkpoint.keymap import KeyMap
from unimm.checkpoint.load import check_memory, read_headers, weight_files
from unimm.checkpoint.safetensors_file import DTYPE_NAMES
from unimm.checkpoint.valueless import values_left_out


class MappedModel(Protocol):
    """A model that knows the files of its weights."""

    def state_dict(self) -> dict[str, Any]: ...

    def key_maps(self) -> dict[tuple[str, ...], KeyMap]: ...


def check_weights_fit(
    model: MappedModel,
    folder: Path,
    *,
    keep_float32: tuple[str, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raise MemoryError, with figures, where the weights of all of a folder's files cannot fit a device together.

    keep_float32: prefixes of the parameters that stay in float32, where all of a file do. Files that a CPU takes as they
    are count nothing: they can be mapped.
    """
    if values_left_out():
        return
    needed = 0
    state = model.state_dict()
    for names, key_map in model.key_maps().items():
        mine = [name for name in state if key_map.released_tensors(name)]
        wanted = torch.float32 if all(name.startswith(keep_float32) for name in mine) else dtype
        headers = read_headers(weight_files(folder, names)).values()
        if device.type != "cpu" or any(header.dtype != DTYPE_NAMES[wanted] for header in headers):
            needed += sum(state[name].numel() for name in mine) * wanted.itemsize
    if needed:
        check_memory(needed, device)
