"""Weights under their released names, written to files tensor by tensor; what would be lost by it is refused."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from unimm.checkpoint.atomic import name_file
from unimm.checkpoint.filling import loadable_tensors
from unimm.checkpoint.json_files import write_json
from unimm.checkpoint.keymap import KeyMap, Transform, matches
from unimm.checkpoint.safetensors_file import DTYPE_NAMES, LENGTH_BYTES
from unimm.kernels.weight_formats import StoredRows

MAX_SHARD_SIZE = "5GB"  # as on the hub
HEADER_ALIGNMENT = 64  # bytes: tensors then lie in the file as PyTorch aligns its own
NO_VALUES = "it is on meta and has no values; load the model first"
SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
COMPILED = "_orig_mod"  # torch.compile puts a module into another one, under this name
# a parameter -> its value, where that is not the parameter itself
ReadValue = Callable[[Tensor], Tensor]
_read_value: ContextVar[ReadValue | None] = ContextVar("unimm_read_value", default=None)


def own_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict under the names that the parts have where they are not compiled."""
    return {own_name(name): tensor for name, tensor in model.state_dict().items()}


def own_name(name: str) -> str:
    """The name that a parameter has where no part is compiled."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


@dataclass(frozen=True)
class PendingTensor:
    """A tensor that is made when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "PendingTensor":
        """One that is there."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


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


def released_tensors(
    model: nn.Module, key_map: KeyMap, *, dtype: torch.dtype | None = None
) -> dict[str, PendingTensor]:
    """The parameters that `key_map` knows as released tensors, under their released names. dtype: cast to, if given.

    Raises ValueError where a released tensor is made of several parameters and one of them is not there.
    """
    ours = _saved_tensors(model)
    released = _quantized_tensors(model, key_map)
    for name in ours:
        for key, transform in key_map.released_tensors(name).items():
            if key in released:  # a tensor made of several parameters is found by each of them
                continue
            if missing := [one for one in transform.our_names if one not in ours]:
                raise ValueError(f"cannot save {key}: the model has no {', '.join(missing)}; {_how_to_repair(ours)}")
            parts = [ours[one] for one in transform.our_names]
            sketch = transform.to_released([torch.empty(x.shape, dtype=x.dtype, device="meta") for x in parts])
            make = partial(_make_released, transform, parts, dtype or sketch.dtype)
            released[key] = PendingTensor(tuple(sketch.shape), dtype or sketch.dtype, make)
    return released


@runtime_checkable
class HoldsQuantized(Protocol):
    """A linear whose weights are in few bits."""

    def stored_part(self, suffix: str) -> Tensor:
        """The weights as files hold them: their codes, or what stands beside them."""

    def stored_layout(self) -> StoredRows:
        """All parts without values, by their suffixes."""


def _quantized_linears(model: nn.Module) -> dict[str, HoldsQuantized]:
    """The linears in few bits, by the names that their weights would have."""
    parts = {f"{own_name(name)}.weight": part for name, part in model.named_modules(remove_duplicate=False)}
    return {name: part for name, part in parts.items() if isinstance(part, HoldsQuantized)}


def _saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters themselves, by which `read_values_by` knows them, and the buffers that files hold."""
    found = loadable_tensors(model) if _quantized_linears(model) else model.state_dict(keep_vars=True)
    return {own_name(name): x for name, x in found.items()}


def held_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All that a model holds for files, one after the other in the order of our names: of linears in few bits the codes,
    and what stands beside them."""
    plain = _saved_tensors(model)
    quantized = _quantized_linears(model)
    for name in sorted((*plain, *quantized)):
        if name in plain:
            yield name, plain[name].detach()
        else:
            for suffix in quantized[name].stored_layout():
                yield name + suffix, quantized[name].stored_part(suffix)


def _quantized_tensors(model: nn.Module, key_map: KeyMap) -> dict[str, PendingTensor]:
    """The released tensors of linears in few bits, and what stands beside them."""
    linears = _quantized_linears(model)
    released: dict[str, PendingTensor] = {}
    for name in linears:
        for key, transform in key_map.released_tensors(name).items():
            if lost := [one for one in transform.our_names if one not in linears]:
                raise ValueError(f"cannot save {key}: {name} is in few bits, {lost[0]} is not: expected both or none")
            parts = [linears[one] for one in transform.our_names]
            layouts = [part.stored_layout() for part in parts]
            if any(layout.keys() != layouts[0].keys() for layout in layouts):
                raise ValueError(f"cannot save {key}: {', '.join(transform.our_names)} are in several formats")
            for suffix in layouts[0]:
                sketch = transform.to_released([layout[suffix] for layout in layouts])
                make = partial(_released_rows, transform, parts, suffix)
                released[key + suffix] = PendingTensor(tuple(sketch.shape), sketch.dtype, make)
    return released


def _released_rows(transform: Transform, parts: Sequence[HoldsQuantized], suffix: str) -> Tensor:
    """The released codes, or what stands beside them: rows of a scale go where the rows of their weights go."""
    return transform.to_released([part.stored_part(suffix) for part in parts]).contiguous()


def _make_released(transform: Transform, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    values = [parameter_value(part) for part in parts]
    if empty := [name for name, value in zip(transform.our_names, values, strict=True) if value.is_meta]:
        raise ValueError(f"cannot write {empty[0]}: {NO_VALUES}")
    return transform.to_released(values).to(dtype).contiguous()


def released_state_dict(model: nn.Module, key_map: KeyMap) -> dict[str, Tensor]:
    """The tensors of `released_tensors`, all at once."""
    return {key: one.make() for key, one in released_tensors(model, key_map).items()}


def check_all_saved(model: nn.Module, key_maps: Iterable[KeyMap], *, unused: Sequence[str] = ()) -> None:
    """Raise ValueError, with their names, for parameters that no key map knows, or whose values no file can hold.

    Such are those of adapters and of parametrized or quantized layers: they would be left out of the files. unused:
    patterns of those that nothing reads, which a layout may leave out.
    """
    key_maps = tuple(key_maps)
    ours: dict[str, Any] = {**_saved_tensors(model), **_quantized_linears(model)}
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


def save_weights(
    state: Mapping[str, PendingTensor], folder: Path, names: Sequence[str], *, max_shard_size: int | str | None
) -> None:
    """Write weights into a folder, as the first of a layout's names of files; as shards with an index, if the layout
    has one and they are larger than `max_shard_size` together: bytes, a text such as "5GB", or None for no limit.

    Raises ValueError for another size, and OSError, which names the file.
    """
    limit = parse_bytes(max_shard_size)
    index = next((name for name in names if name.endswith(".safetensors.index.json")), None)
    shards = _split(state, limit) if index else [state]
    if len(shards) == 1 or index is None:
        save_safetensors(state, folder / names[0])
        return
    stem = index.removesuffix(".safetensors.index.json")
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_safetensors(shard, folder / name)
        weight_map |= dict.fromkeys(shard, Path(name).name)
    total = sum(tensor.n_bytes for tensor in state.values())
    write_json(folder / index, {"metadata": {"total_size": total}, "weight_map": weight_map})


def parse_bytes(size: int | str | None) -> int | None:
    """A number of bytes, from itself or from a text such as "5GB" or "24GiB"; None stays None. Raises ValueError for
    another."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)\s*", size.upper()) if isinstance(size, str) else None
    if found:
        size = int(float(found[1]) * SIZE_UNITS[found[2]])
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError(f"got {size!r:.80} for a size: expected a positive number of bytes, or a text such as '5GB'")
    return size


def _split(state: Mapping[str, PendingTensor], limit: int | None) -> list[dict[str, PendingTensor]]:
    """Tensors in their order, in parts of at most `limit` bytes each, or of one larger tensor."""
    shards: list[dict[str, PendingTensor]] = [{}]
    n_bytes = 0
    for key, tensor in state.items():
        if limit is not None and shards[-1] and n_bytes + tensor.n_bytes > limit:
            shards.append({})
            n_bytes = 0
        shards[-1][key] = tensor
        n_bytes += tensor.n_bytes
    return shards


def save_safetensors(state: Mapping[str, Tensor | PendingTensor], path: Path) -> None:
    """Write a safetensors file, tensor by tensor; those that share memory are written each.

    Raises ValueError for tensors without values, and OSError, which names the file.
    """
    pending = {key: PendingTensor.of(one) if isinstance(one, Tensor) else one for key, one in state.items()}
    # the widest first, which keeps every tensor aligned
    ordered = sorted(pending.items(), key=lambda item: -item[1].dtype.itemsize)
    with name_file(path), path.open("wb") as file:
        file.write(_header(ordered))
        for key, one in ordered:
            tensor = one.make()
            assert tuple(tensor.shape) == one.shape and tensor.dtype == one.dtype, "as it was described"
            file.write(_bytes_of(tensor, key))
            del tensor


def _header(ordered: Sequence[tuple[str, PendingTensor]]) -> bytes:
    """The first bytes of a file of these tensors."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, one in ordered:
        if one.dtype not in DTYPE_NAMES:
            raise ValueError(f"cannot write {key} in {one.dtype}: expected one of {', '.join(map(str, DTYPE_NAMES))}")
        begin = end
        end += one.n_bytes
        entries[key] = {"dtype": DTYPE_NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-(LENGTH_BYTES + len(header)) % HEADER_ALIGNMENT)
    return len(header).to_bytes(LENGTH_BYTES, "little") + header


def _bytes_of(tensor: Tensor, key: str) -> memoryview:
    if tensor.is_meta:
        raise ValueError(f"cannot write {key}: {NO_VALUES}")
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


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
