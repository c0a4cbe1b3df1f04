"""Weights under their released names, written to files; what would be lost by it is refused."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from unimm.checkpoint.atomic import name_file
from unimm.checkpoint.keymap import KeyMap, Transform, matches

COMPILED = "_orig_mod"  # torch.compile puts a module into another one, under this name
SAFETENSORS_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
# a parameter -> its value, where that is not the parameter itself
ReadValue = Callable[[Tensor], Tensor]
_read_value: ContextVar[ReadValue | None] = ContextVar("unimm_read_value", default=None)


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
    transforms = _transforms(ours, key_map)
    return {
        key: transform.to_released([ours[one].detach() for one in transform.our_names]).contiguous()
        for key, transform in transforms.items()
    }


def _transforms(ours: Mapping[str, Tensor], key_map: KeyMap) -> dict[str, Transform]:
    """Which parameters each released tensor is made of, and how."""
    found: dict[str, Transform] = {}
    for name in ours:
        for key, transform in key_map.released_tensors(name).items():
            if key in found:  # a tensor made of several parameters is found by each of them
                continue
            if missing := [one for one in transform.our_names if one not in ours]:
                raise ValueError(f"cannot save {key}: the model has no {', '.join(missing)}; {_how_to_repair(ours)}")
            found[key] = transform
    return found


@contextmanager
def read_values_by(read: ReadValue) -> Iterator[None]:
    """Let what saves ask `read` for the value of every parameter, for the length of the body."""
    token = _read_value.set(read)
    try:
        yield
    finally:
        _read_value.reset(token)


def parameter_value(p: Tensor) -> Tensor:
    """The value of a parameter: its own, or what `read_values_by` says."""
    return (_read_value.get() or Tensor.detach)(p)


def write_released(model: nn.Module, key_map: KeyMap, path: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the released tensors that `key_map` knows into a safetensors file, one after the other: no more than one is
    held beside the model. dtype: what they are cast to, if given.

    Raises ValueError as `released_state_dict` does; OSError, which names the file.
    """
    # the parameters themselves, by which `read` knows them
    ours = {own_name(name): x for name, x in model.state_dict(keep_vars=True).items()}
    transforms = _transforms(ours, key_map)
    described = {}
    for key, transform in transforms.items():
        on_meta = [torch.empty(ours[one].shape, dtype=ours[one].dtype, device="meta") for one in transform.our_names]
        x = transform.to_released(on_meta)
        described[key] = x if dtype is None else x.to(dtype)

    def value(key: str) -> Tensor:
        parts = [parameter_value(ours[one]) for one in transforms[key].our_names]
        if empty := [one for one, x in zip(transforms[key].our_names, parts, strict=True) if x.is_meta]:
            raise ValueError(f"cannot write {empty[0]}: it is on meta and has no values; load the model first")
        return transforms[key].to_released(parts).to(described[key].dtype)

    write_tensors(path, described, value)


def write_tensors(path: Path, described: Mapping[str, Tensor], value: Callable[[str], Tensor]) -> None:
    """Write a safetensors file of tensors that are asked for one by one. described: on meta, of their shapes and types.

    The format: https://huggingface.co/docs/safetensors, "Format".
    """
    # as safetensors' own files have them: the widest types first, so that every tensor is aligned
    names = sorted(described, key=lambda name: (-described[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        x = described[name]
        offsets = [end, end + x.numel() * x.element_size()]
        header[name] = {"dtype": SAFETENSORS_TYPES[x.dtype], "shape": list(x.shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with name_file(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            x = value(name).contiguous().cpu()
            assert x.shape == described[name].shape and x.dtype == described[name].dtype, "as it was described"
            file.write(x.reshape(-1).view(torch.uint8).numpy().data)


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
    if _read_value.get() is None:
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
