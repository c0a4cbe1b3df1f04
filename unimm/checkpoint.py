"""Released checkpoints: key tables, strict loading into a model built on meta, saving in the same layout."""
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

LARGE = 2**30  # bytes of weights that take long enough to load for a progress bar

Table = Mapping[str, str]  # a released name -> ours; `{}` is one dotted part or a piece of it, `{*}` is the rest


class CheckpointError(ValueError):
    """A file of weights that cannot be loaded as it is: truncated, keys missing or too many, wrong shapes."""


def rename(key: str, table: Table) -> str | None:
    """The name that the first matching row of `table` gives a key, or None where no row matches."""
    for source, target in table.items():
        if match := _pattern(source).fullmatch(key):
            return target.replace("{*}", "{}").format(*match.groups())
    return None


def inverse(table: Table) -> dict[str, str]:
    """The table that leads back. Placeholders keep their order, so a row can be read from either side."""
    return {target: source for source, target in table.items()}


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
        return [folder / shard for shard in shards]
    raise CheckpointError(f"no weights in {folder}: expected {' or '.join(names)}")


@contextmanager
def opened(path: Path) -> Iterator:
    """A safetensors file, open for reading tensor by tensor; a broken one raises CheckpointError."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, FileNotFoundError) as error:
        message = f"cannot read {path}: {error}; the file is cut short or not safetensors, fetch it again"
        raise CheckpointError(message) from error


def read_shapes(paths: list[Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in the files, from their headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        with opened(path) as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    return shapes


def check_keys(shapes: Mapping[str, tuple[int, ...]], table: Table, wanted: Mapping[str, Tensor], where: str) -> dict[str, str]:
    """Match released keys with our parameters, strictly; {released: ours}.

    Raises CheckpointError unless every key meets a row, every row a key, every parameter is met once, and shapes agree.
    """
    names = {key: name for key in shapes if (name := rename(key, table)) in wanted and name is not None}
    extra = sorted(set(shapes) - set(names))
    missing = sorted(set(wanted) - set(names.values()))
    unused = sorted(row for row in table if not any(_pattern(row).fullmatch(key) for key in shapes))
    back = inverse(table)
    wrong = [
        f"{key}: got {list(shapes[key])}, expected {list(wanted[name].shape)}"
        for key, name in names.items()
        if shapes[key] != tuple(wanted[name].shape)
    ]
    problems = [
        _few("unexpected keys", extra),
        _few("missing keys", [str(rename(name, back)) for name in missing]),
        _few("rows of the key table that no key meets", unused),
        _few("wrong shapes", wrong),
    ]
    if any(problems):
        raise CheckpointError(f"{where} does not fit the model: {'; '.join(filter(None, problems))}")
    return names


def load_into(
    model: nn.Module, paths: list[Path], table: Table, *, prefix: str = "", dtype: torch.dtype, device: torch.device
) -> None:
    """Load files into the parameters of `model` (on meta) whose names begin with one of `table`'s targets, strictly.

    Tensors are read one at a time, cast and moved, so the peak is the model and one tensor. `prefix`, where every key
    of the files carries it, is left out. Raises CheckpointError, before anything is assigned, where files do not fit.
    """
    shapes = read_shapes(paths)
    strip = len(prefix) if prefix and all(key.startswith(prefix) for key in shapes) else 0
    targets = [_pattern(target) for target in table.values()]
    wanted = {k: v for k, v in model.state_dict().items() if any(t.fullmatch(k) for t in targets)}
    names = check_keys({k[strip:]: s for k, s in shapes.items()}, table, wanted, str(paths[0]))
    needed = sum(v.numel() for v in wanted.values()) * dtype.itemsize
    check_memory(needed, device)
    with tqdm(total=len(names), desc="loading", unit="tensor", disable=needed < LARGE, leave=False) as bar:
        for path in paths:
            with opened(path) as file:
                for key in file.keys():
                    tensor = file.get_tensor(key).to(device=device, dtype=dtype, copy=True)
                    _assign(model, names[key[strip:]], tensor)
                    bar.update()


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    else:
        module._buffers[leaf] = tensor


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
    back = inverse(table)
    named = {rename(name, back): tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    return {key: tensor for key, tensor in named.items() if key is not None}


@contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """A folder to write into; its files move into `folder` only when the body has ended well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield partial
        folder.mkdir(exist_ok=True)
        for path in sorted(partial.iterdir()):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(partial)


def save_state(state: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file."""
    save_file(state, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes files that only their owner can read


def _few(what: str, items: list[str], n: int = 5) -> str:
    more = f" and {len(items) - n} more" if len(items) > n else ""
    return f"{what}: {', '.join(items[:n])}{more}" if items else ""
