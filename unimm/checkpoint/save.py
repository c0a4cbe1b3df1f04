"""Weights under their released names, written to files; what would be lost by it is refused."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from unimm.checkpoint.keymap import KeyMap, matches

COMPILED = "_orig_mod"  # torch.compile puts a module into another one, under this name


def own_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict under the names that the parts have where they are not compiled."""
    return {own_name(name): tensor for name, tensor in model.state_dict().items()}


def own_name(name: str) -> str:
    """The name that a parameter has where no part is compiled."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def released_state_dict(model: nn.Module, key_map: KeyMap) -> dict[str, Tensor]:
    """The parameters that `key_map` knows as released tensors, under their released names.

    Raises ValueError where a released tensor is made of several parameters and one of them is not there.
    """
    ours = own_state_dict(model)
    released: dict[str, Tensor] = {}
    for name in ours:
        for key, transform in key_map.released_tensors(name).items():
            if key in released:  # a tensor made of several parameters is found by each of them
                continue
            if missing := [one for one in transform.our_names if one not in ours]:
                raise ValueError(f"cannot save {key}: the model has no {', '.join(missing)}; {_how_to_repair(ours)}")
            released[key] = transform.to_released([ours[one].detach() for one in transform.our_names]).contiguous()
    return released


def check_all_saved(model: nn.Module, key_maps: Iterable[KeyMap], *, unused: Sequence[str] = ()) -> None:
    """Raise ValueError, with their names, for parameters that no key map knows, or whose values no file can hold.

    Such are those of adapters and of parametrized or quantized layers: they would be left out of the files. unused:
    patterns of those that nothing reads, which a layout may leave out.
    """
    key_maps = tuple(key_maps)
    ours = own_state_dict(model)
    parameters = {own_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    unknown = [name for name in ours if not any(key_map.released_tensors(name) for key_map in key_maps)]
    wrong = [name for name in unknown if not any(matches(pattern, name) for pattern in unused)]
    wrong += [name for name, p in parameters.items() if not _is_plain(p)]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"cannot save {', '.join(sorted(wrong)[:5])}{more}: expected the parameters of a released "
            f"{type(model).__name__} alone, in floating point; {_how_to_repair(ours)}"
        )


def _is_plain(p: nn.Parameter) -> bool:
    # a subclass of Parameter is a quantized one; of Tensor, one that is quantized or on several devices
    return type(p) is nn.Parameter and type(p.data) is Tensor and p.is_floating_point() and p.layout == torch.strided


def _how_to_repair(names: Iterable[str]) -> str:
    if any("parametrizations" in name.split(".") for name in names):
        return "call torch.nn.utils.parametrize.remove_parametrizations on that part first"
    return "merge adapters into the weights and undo what replaced the parts first"


def save_safetensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file; tensors that share memory are written each. Raises OSError, which names the file."""
    if empty := [name for name, tensor in state.items() if tensor.is_meta]:
        raise ValueError(f"cannot write {empty[0]}: it is on meta and has no values; load the model first")
    try:
        save_file(_unshared(state), path, metadata={"format": "pt"})
    except SafetensorError as error:
        if not (found := re.search(r"^(?:.*: )?(.+) \(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(found[2]), found[1], str(path)) from error
    path.chmod(0o644)  # safetensors makes files that only their owner can read


def save_torch(state: Mapping[str, Any], path: Path) -> None:
    """Write a file of torch.save. Raises OSError, which names the file."""
    try:
        with path.open("wb") as file:
            torch.save(dict(state), file)
    except (RuntimeError, OSError) as error:
        # torch closes its archive after the write that failed, and says only that this went wrong, too
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.errno is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of the same values, no two of which share memory, as safetensors asks for."""
    found = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    end: dict[torch.device, int] = {}  # the last byte of a device's memory that was met
    for name in sorted(found, key=lambda name: found[name].data_ptr()):
        tensor = found[name]
        first = tensor.data_ptr()
        if first < end.get(tensor.device, 0):
            found[name] = tensor.clone()
        end[tensor.device] = max(end.get(tensor.device, 0), first + tensor.nbytes)
    return found
