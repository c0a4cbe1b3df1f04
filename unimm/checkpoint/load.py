"""Released checkpoints: key tables, strict loading into a model built on meta, saving in the same layout."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from unimm.checkpoint.keymap import KeyMap, Place, _pattern, is_ignored, released_names

# where transformers and the hub keep a model's weights, the first that is there
HUB_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
PROGRESS_BAR_BYTES = 2**30  # bytes of weights that take long enough to load for a progress bar


class CheckpointError(ValueError):
    """A file of weights that cannot be loaded as it is: truncated, keys missing or too many, wrong shapes."""


def weight_files(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """The first of `names` that the folder holds; the shards, where that is an index. Raises CheckpointError for none."""
    for name in names:
        path = folder / name
        if not path.exists():
            continue
        if not name.endswith(".index.json"):
            return [path]
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        return [path.parent / shard for shard in shards]
    raise CheckpointError(f"no weights in {folder}: expected {' or '.join(names)}")


@contextmanager
def open_weights(path: Path) -> Iterator:
    """A file of weights, safetensors or the older .bin and .pt, read tensor by tensor; CheckpointError for a broken one."""
    try:
        with _open_file(path) as file:
            yield file
    except (SafetensorError, FileNotFoundError) as error:
        message = f"cannot read {path}: {error}; the file is cut short or not safetensors, fetch it again"
        raise CheckpointError(message) from error


def _open_file(path: Path) -> AbstractContextManager:
    if path.suffix not in (".bin", ".pt") or not path.exists():
        return safe_open(path, framework="pt")
    try:
        return nullcontext(TorchStateDict(torch.load(path, map_location="cpu", weights_only=True, mmap=True)))
    except (UnpicklingError, EOFError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot read {path}: {error}; expected tensors alone, as torch.save wrote them"
        ) from error


@dataclass(frozen=True)
class TorchStateDict:
    """A state dict of torch.save, read as a safetensors file is."""

    state: Mapping[str, Tensor]

    def keys(self) -> list[str]:
        return list(self.state)

    def get_tensor(self, key: str) -> Tensor:
        return self.state[key]

    def get_slice(self, key: str) -> "TorchStateDict":
        return TorchStateDict({"": self.state[key]})

    def get_shape(self) -> list[int]:
        return list(self.state[""].shape)


def read_shapes(paths: list[Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in the files, from their headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        with open_weights(path) as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    return shapes


def check_keys(
    shapes: Mapping[str, tuple[int, ...]], key_map: KeyMap, wanted: Mapping[str, Tensor], where: str
) -> dict[str, Place]:
    """Match released keys with our parameters, strictly; {released: where it goes}. Keys that nothing reads are left out.

    Raises CheckpointError unless every key meets a row, every row a key, every parameter is met once, and shapes agree.
    """
    expected: dict[str, Place] = {}
    for name in wanted:
        expected |= released_names(name, key_map)
    names = {key: expected[key] for key in shapes if key in expected}
    unused = [
        row for row, to in key_map.items() if to is not None and not any(_pattern(row).fullmatch(key) for key in shapes)
    ]
    shaped = {key: _shape(place, wanted) for key, place in names.items()}
    problems = [
        _list_some(
            "unexpected keys", sorted(key for key in shapes if key not in names and not is_ignored(key, key_map))
        ),
        _list_some("missing keys", sorted(expected.keys() - names.keys())),
        _list_some("rows of the key table that no key meets", sorted(unused)),
        _list_some(
            "wrong shapes",
            [f"{key}: got {list(shapes[key])}, expected {list(to)}" for key, to in shaped.items() if shapes[key] != to],
        ),
    ]
    if any(problems):
        raise CheckpointError(f"{where} does not fit the model: {'; '.join(filter(None, problems))}")
    return names


def _shape(place: Place, wanted: Mapping[str, Tensor]) -> tuple[int, ...]:
    if not place.stack:
        return place.shape(wanted[place.name].shape)
    return (sum(len(wanted[name]) for name in place.stack), *wanted[place.name].shape[1:])


def load_weights(
    model: nn.Module, paths: list[Path], key_map: KeyMap, *, prefix: str = "", dtype: torch.dtype, device: torch.device
) -> None:
    """Load files into the parameters of `model` (on meta) whose names begin with one of `table`'s targets, strictly.

    Tensors are read one at a time, cast and moved, so the peak is the model and one tensor. `prefix`, where every key
    of the files carries it, is left out. Raises CheckpointError, before anything is assigned, where files do not fit.
    """
    shapes = read_shapes(paths)
    strip = len(prefix) if prefix and all(key.startswith(prefix) for key in shapes) else 0
    wanted = {name: tensor for name, tensor in model.state_dict().items() if released_names(name, key_map)}
    names = check_keys({k[strip:]: s for k, s in shapes.items()}, key_map, wanted, str(paths[0]))
    needed = sum(v.numel() for v in wanted.values()) * dtype.itemsize
    check_memory(needed, device)
    with tqdm(total=len(names), desc="loading", unit="tensor", disable=needed < PROGRESS_BAR_BYTES, leave=False) as bar:
        for path in paths:
            with open_weights(path) as file:
                for key in file.keys():
                    if place := names.get(key[strip:]):
                        tensor = file.get_tensor(key).to(device=device, dtype=dtype, copy=True)
                        _assign_tensor(model, place, tensor, wanted)
                        bar.update()


def _assign_tensor(model: nn.Module, place: Place, tensor: Tensor, wanted: Mapping[str, Tensor]) -> None:
    if place.stack:
        for name, rows in zip(place.stack, tensor.split([len(wanted[name]) for name in place.stack]), strict=True):
            set_tensor(model, name, rows.clone())  # parameters that share memory could not be saved
        return
    shape = wanted[place.name].shape
    if place.parts > 1:
        whole = model.get_parameter(place.name).data
        whole = torch.empty(shape, dtype=tensor.dtype, device=tensor.device) if whole.is_meta else whole
        place.share(whole).copy_(tensor)
        tensor = whole
    elif place.swapped:
        tensor = place.take(tensor)
    set_tensor(model, place.name, tensor.reshape(shape))


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make a tensor the parameter, or the buffer, of that name."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    else:
        module._buffers[leaf] = tensor


def materialize(model: nn.Module, unused: Sequence[str], *, dtype: torch.dtype, device: torch.device) -> None:
    """Zeros for the parameters of `spare` (name patterns) that no file held, since nothing reads them; and to the device
    what a module computes for itself.

    Raises CheckpointError where another parameter was not loaded.
    """
    state = model.state_dict()
    for name, table in list(model.named_buffers()):
        if name not in state:
            set_tensor(model, name, table.to(device))
    for name, tensor in state.items():
        if tensor.is_meta:
            if not any(_pattern(pattern).fullmatch(name) for pattern in unused):
                raise CheckpointError(f"no file holds {name}: the model's key tables leave it out")
            set_tensor(model, name, torch.zeros(tensor.shape, dtype=dtype, device=device))


def check_memory(needed: int, device: torch.device) -> None:
    """Raise MemoryError, with figures, where `needed` bytes of weights cannot fit the device's free memory."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif Path("/proc/meminfo").exists():
        free = 1024 * int(re.findall(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[0])
    else:
        return
    if needed > free:
        raise MemoryError(
            f"the weights need {needed / 2**30:.1f} GiB on {device}, {free / 2**30:.1f} GiB are free; "
            'load them with dtype="bfloat16", or on a larger device'
        )


def _list_some(what: str, items: list[str], n: int = 5) -> str:
    more = f" and {len(items) - n} more" if len(items) > n else ""
    return f"{what}: {', '.join(items[:n])}{more}" if items else ""


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A floating dtype from itself or its name. Raises ValueError for another."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"got dtype {dtype!r}: expected float32, bfloat16 or float16")
    return found
