"""Released checkpoints: key tables, strict loading into a model built on meta, saving in the same layout."""
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

# where transformers and the hub keep a model's weights, the first that is there
HUB_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# files that a folder may hold or not, and a model is another one with them
OPTIONAL = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model"),
    *("vae_config.json", "ae.safetensors", "vit_config.json", "llm_config.json", "preprocessor_config.json"),
    *("task_head_final.pt", "task_head_final.safetensors"),
)
OPTIONAL_FOLDERS = ("siglip", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
LARGE = 2**30  # bytes of weights that take long enough to load for a progress bar

# a released name -> ours, or None where it may be there and nothing reads it. `{}` is one dotted part or a piece of it,
# `{*}` is the rest. Ours may end in `[0/3]`: theirs holds the first third of its rows; in `[1:3/3]`: the other two; in
# `[...]`: theirs lacks its axes of length 1; in `[swap]`: theirs has the second half of its rows first. Ours may be
# `a + b`: theirs holds the rows of several of ours, one above the other
Table = Mapping[str, str | None]


class CheckpointError(ValueError):
    """A file of weights that cannot be loaded as it is: truncated, keys missing or too many, wrong shapes."""


@dataclass(frozen=True)
class Place:
    """Where a released tensor lies in ours: all of a parameter, `length` of `parts` equal shares of its rows from `part` on,
    its numbers without the axes of length 1 (`squeezed`), its rows with the halves the other way round (`swapped`), or
    the rows of a `stack` of parameters, one above the other."""

    name: str
    part: int = 0
    parts: int = 1
    length: int = 1
    squeezed: bool = False
    swapped: bool = False
    stack: tuple[str, ...] = ()

    @classmethod
    def of(cls, target: str) -> "Place":
        """Read a target of a table, `name`, `name[0/3]`, `name[1:3/3]`, `name[...]`, `name[swap]` or `name + name`."""
        if " + " in target:
            return cls(target, stack=tuple(target.split(" + ")))
        name, _, how = target.removesuffix("]").partition("[")
        if "/" in how:
            share, _, parts = how.partition("/")
            first, _, stop = share.partition(":")
            return cls(name, int(first), int(parts), int(stop) - int(first) if stop else 1)
        return cls(name, squeezed=how == "...", swapped=how == "swap")

    def shape(self, ours: Sequence[int]) -> tuple[int, ...]:
        """The shape that the released tensor has where ours has this one."""
        if self.squeezed:
            return tuple(n for n in ours if n != 1)
        return (ours[0] // self.parts * self.length, *ours[1:]) if self.parts > 1 else tuple(ours)

    def take(self, ours: Tensor) -> Tensor:
        """The released tensor out of ours."""
        if self.swapped:
            return torch.cat(ours.chunk(2)[::-1])
        return self.share(ours) if self.parts > 1 else ours.reshape(self.shape(ours.shape))

    def share(self, ours: Tensor) -> Tensor:
        """The rows of ours that the released tensor holds."""
        rows = len(ours) // self.parts
        return ours[self.part * rows : (self.part + self.length) * rows]


def released_names(name: str, table: Table) -> dict[str, Place]:
    """The released keys of one of our parameters, each with its place in it; none where no row knows the name."""
    found: dict[str, Place] = {}
    for source, target in table.items():
        if target is None:
            continue
        place = Place.of(target)
        if match := next(filter(None, (_pattern(one).fullmatch(name) for one in place.stack or (place.name,))), None):
            found[_filled(source, match)] = replace(place, name=name)
            if sum(place.length for place in found.values()) == place.parts:
                break
    return found


def unread(key: str, table: Table) -> bool:
    """Whether the table says that nothing reads a key."""
    return any(target is None and _pattern(source).fullmatch(key) for source, target in table.items())


def _filled(template: str, match: re.Match[str]) -> str:
    return template.replace("{*}", "{}").format(*match.groups())


@lru_cache(maxsize=4096)
def _pattern(source: str) -> re.Pattern[str]:
    return re.compile(re.escape(source).replace(r"\{\*\}", "(.+)").replace(r"\{\}", "([^.]+?)"))


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
def opened(path: Path) -> Iterator:
    """A file of weights, safetensors or the older .bin and .pt, read tensor by tensor; CheckpointError for a broken one."""
    try:
        with _open(path) as file:
            yield file
    except (SafetensorError, FileNotFoundError) as error:
        message = f"cannot read {path}: {error}; the file is cut short or not safetensors, fetch it again"
        raise CheckpointError(message) from error


def _open(path: Path) -> AbstractContextManager:
    if path.suffix not in (".bin", ".pt") or not path.exists():
        return safe_open(path, framework="pt")
    try:
        return nullcontext(Pickled(torch.load(path, map_location="cpu", weights_only=True, mmap=True)))
    except (UnpicklingError, EOFError, RuntimeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; expected tensors alone, as torch.save wrote them") from error


@dataclass(frozen=True)
class Pickled:
    """A state dict of torch.save, read as a safetensors file is."""

    state: Mapping[str, Tensor]

    def keys(self) -> list[str]:
        return list(self.state)

    def get_tensor(self, key: str) -> Tensor:
        return self.state[key]

    def get_slice(self, key: str) -> "Pickled":
        return Pickled({"": self.state[key]})

    def get_shape(self) -> list[int]:
        return list(self.state[""].shape)


def read_shapes(paths: list[Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in the files, from their headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        with opened(path) as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    return shapes


def check_keys(
    shapes: Mapping[str, tuple[int, ...]], table: Table, wanted: Mapping[str, Tensor], where: str
) -> dict[str, Place]:
    """Match released keys with our parameters, strictly; {released: where it goes}. Keys that nothing reads are left out.

    Raises CheckpointError unless every key meets a row, every row a key, every parameter is met once, and shapes agree.
    """
    expected: dict[str, Place] = {}
    for name in wanted:
        expected |= released_names(name, table)
    names = {key: expected[key] for key in shapes if key in expected}
    unused = [row for row, to in table.items() if to is not None and not any(_pattern(row).fullmatch(key) for key in shapes)]
    shaped = {key: _shape(place, wanted) for key, place in names.items()}
    problems = [
        _few("unexpected keys", sorted(key for key in shapes if key not in names and not unread(key, table))),
        _few("missing keys", sorted(expected.keys() - names.keys())),
        _few("rows of the key table that no key meets", sorted(unused)),
        _few(
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


def load_into(
    model: nn.Module, paths: list[Path], table: Table, *, prefix: str = "", dtype: torch.dtype, device: torch.device
) -> None:
    """Load files into the parameters of `model` (on meta) whose names begin with one of `table`'s targets, strictly.

    Tensors are read one at a time, cast and moved, so the peak is the model and one tensor. `prefix`, where every key
    of the files carries it, is left out. Raises CheckpointError, before anything is assigned, where files do not fit.
    """
    shapes = read_shapes(paths)
    strip = len(prefix) if prefix and all(key.startswith(prefix) for key in shapes) else 0
    wanted = {name: tensor for name, tensor in model.state_dict().items() if released_names(name, table)}
    names = check_keys({k[strip:]: s for k, s in shapes.items()}, table, wanted, str(paths[0]))
    needed = sum(v.numel() for v in wanted.values()) * dtype.itemsize
    check_memory(needed, device)
    with tqdm(total=len(names), desc="loading", unit="tensor", disable=needed < LARGE, leave=False) as bar:
        for path in paths:
            with opened(path) as file:
                for key in file.keys():
                    if place := names.get(key[strip:]):
                        tensor = file.get_tensor(key).to(device=device, dtype=dtype, copy=True)
                        _assign(model, place, tensor, wanted)
                        bar.update()


def _assign(model: nn.Module, place: Place, tensor: Tensor, wanted: Mapping[str, Tensor]) -> None:
    if place.stack:
        for name, rows in zip(place.stack, tensor.split([len(wanted[name]) for name in place.stack]), strict=True):
            put(model, name, rows.clone())  # parameters that share memory could not be saved
        return
    shape = wanted[place.name].shape
    if place.parts > 1:
        whole = model.get_parameter(place.name).data
        whole = torch.empty(shape, dtype=tensor.dtype, device=tensor.device) if whole.is_meta else whole
        place.share(whole).copy_(tensor)
        tensor = whole
    elif place.swapped:
        tensor = place.take(tensor)
    put(model, place.name, tensor.reshape(shape))


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make a tensor the parameter, or the buffer, of that name."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    else:
        module._buffers[leaf] = tensor


def fill(model: nn.Module, spare: Sequence[str], *, dtype: torch.dtype, device: torch.device) -> None:
    """Zeros for the parameters of `spare` (name patterns) that no file held, since nothing reads them; and to the device
    what a module computes for itself.

    Raises CheckpointError where another parameter was not loaded.
    """
    state = model.state_dict()
    for name, table in list(model.named_buffers()):
        if name not in state:
            put(model, name, table.to(device))
    for name, tensor in state.items():
        if tensor.is_meta:
            if not any(_pattern(pattern).fullmatch(name) for pattern in spare):
                raise CheckpointError(f"no file holds {name}: the model's key tables leave it out")
            put(model, name, torch.zeros(tensor.shape, dtype=dtype, device=device))


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


def released_state(model: nn.Module, table: Table) -> dict[str, Tensor]:
    """The parameters that `table` knows, under their released names."""
    ours, found = model.state_dict(), {}
    for name, tensor in ours.items():
        for key, place in released_names(name, table).items():
            if place.stack and key not in found:
                found[key] = torch.cat([ours[one].detach() for one in place.stack])
            elif not place.stack:
                found[key] = place.take(tensor.detach()).contiguous()
    return found


@contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """A folder to write into; its files move into `folder` only when the body has ended well.

    Raises ValueError where `folder` holds files of another model that would be read together with these.
    """
    folder = folder.expanduser()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield partial
        if stale := leftovers(folder, partial):
            raise ValueError(
                f"{folder} holds {', '.join(stale)} of another model, which would be read with this one: "
                "save into another folder, or remove them first"
            )
        folder.mkdir(exist_ok=True)
        for path in sorted(path for path in partial.rglob("*") if path.is_file()):
            place = folder / path.relative_to(partial)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
    finally:
        shutil.rmtree(partial)


def leftovers(folder: Path, fresh: Path) -> list[str]:
    """What a folder holds that would be read together with the files of `fresh`, which do not replace it."""
    written = [path for path in fresh.rglob("*") if path.is_dir()]
    beside = [folder / path.relative_to(fresh) / name for path in (fresh, *written) for name in OPTIONAL]
    below = [path for name in OPTIONAL_FOLDERS for path in (folder / name).rglob("*") if path.is_file()]
    found = sorted({path.relative_to(folder) for path in (*beside, *below) if path.exists()})
    return [str(name) for name in found if not (fresh / name).exists()]


def save_state(state: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file."""
    save_file(state, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes files that only their owner can read


def _few(what: str, items: list[str], n: int = 5) -> str:
    more = f" and {len(items) - n} more" if len(items) > n else ""
    return f"{what}: {', '.join(items[:n])}{more}" if items else ""


def read_json(path: Path) -> dict:
    """A config, or nothing where there is no file. Raises ValueError for a file that is no JSON."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}; fetch it again") from error
