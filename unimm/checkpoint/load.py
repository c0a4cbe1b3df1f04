"""Strict loading of released weights into a model built on meta: every tensor once, in its shape, and no other."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor, nn
from tqdm import tqdm

from unimm.checkpoint.atomic import is_interrupted
from unimm.checkpoint.contents import CheckpointError, describe_unreadable, is_there
from unimm.checkpoint.filling import (
    LoadQuantization,
    ModelFiller,
    OpenWeights,
    loadable_tensors,
    set_tensor,
    weights_stay,
)
from unimm.checkpoint.json_files import read_json
from unimm.checkpoint.keymap import KeyMap, Transform, matches
from unimm.checkpoint.quantized_tensors import QuantizedTensor, quantized_formats, side_names, whole_headers
from unimm.checkpoint.safetensors_file import DTYPES, SafetensorsFile, TensorHeader
from unimm.checkpoint.torch_file import open_torch_file
from unimm.checkpoint.valueless import values_left_out

logger = logging.getLogger(__name__)

# where transformers and the hub keep a model's weights; the first that a folder holds counts
HUB_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
PROGRESS_BAR_BYTES = 2**30  # weights of this size take long enough to load for a progress bar

MAX_CONVERTED_BYTES = 2**30  # of weights that are to stay in their files: small parts may be copied
MAX_NAME_BYTES = 255  # of a file, on Linux

Shapes = Mapping[str, tuple[int, ...]]

_kept_open: ContextVar[dict[Path, OpenWeights] | None] = ContextVar("unimm_open_weights", default=None)


@dataclass(frozen=True)
class Shard:
    """One of the files of an index, which says for each tensor which of them holds it."""

    index: Path
    name: str
    weight_map: Mapping[str, str]

    @property
    def path(self) -> Path:
        return self.index.parent / self.name


WeightFile = Path | Shard


def file_path(source: WeightFile) -> Path:
    """Where a file of weights lies."""
    return source if isinstance(source, Path) else source.path


def weight_files(folder: Path, names: tuple[str, ...]) -> list[WeightFile]:
    """The first of `names` that the folder holds, or its shards for an index.

    Raises CheckpointError for none, unless values are left out, and for a broken index.
    """
    check_not_interrupted(folder)
    for name in names:
        path = folder / name
        if is_there(path):
            return _read_index(path) if name.endswith(".index.json") else [path]
    if values_left_out():
        return []
    raise CheckpointError(f"no weights in {folder}: expected {' or '.join(names)}")


def check_not_interrupted(folder: Path) -> None:
    """Raise CheckpointError for a folder that holds the files of two models, since saving into it was interrupted."""
    if is_interrupted(folder):
        raise CheckpointError(
            f"{folder} holds files of two models, since saving into it was interrupted: expected those of one; save "
            "into it again, or take another folder"
        )


def _read_index(path: Path) -> list[WeightFile]:
    """The shards of an index. Raises CheckpointError where it has no map to files below its folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map, or an empty one: expected each tensor's file; fetch it again")
    shards = list(weight_map.values())
    for shard in shards:
        if not isinstance(shard, str) or not _is_below(shard):
            raise CheckpointError(
                f"{path} names the file {shard!r:.80}: expected files in its own folder; put them there and correct the "
                "index, or fetch it again"
            )
    return [Shard(path, shard, weight_map) for shard in sorted(set(shards))]


def _is_below(name: str) -> bool:
    """Whether a name can be that of a file below a folder."""
    place = PurePosixPath(name)
    fits = all(len(part.encode(errors="ignore")) <= MAX_NAME_BYTES for part in place.parts)
    return bool(place.parts) and not place.is_absolute() and ".." not in place.parts and fits and _is_path(name)


def _is_path(name: str) -> bool:
    try:
        return b"\0" not in name.encode()
    except UnicodeEncodeError:  # half a character, as JSON can hold it
        return False


def _keys(file: OpenWeights, source: WeightFile) -> list[str]:
    """The names of a file's tensors, without those that the index gives to another of its files.

    Raises CheckpointError where the index gives it one that it lacks.
    """
    keys = list(file.keys())
    if isinstance(source, Path):
        return keys
    named = {key for key, name in source.weight_map.items() if name == source.name}
    if lost := sorted(named.difference(keys)):
        raise CheckpointError(
            f"{source.path} lacks {_list_some('tensors that ' + source.index.name + ' gives it', lost)}; fetch both again"
        )
    return [key for key in keys if source.weight_map.get(key, source.name) == source.name]


@contextmanager
def keep_weights_open() -> Iterator[None]:
    """Keep the files of weights that the body reads open until it ends, so that each header is read once."""
    if _kept_open.get() is not None:
        yield
        return
    token = _kept_open.set({})
    try:
        yield
    finally:
        _kept_open.reset(token)


@contextmanager
def open_weights(source: WeightFile) -> Iterator[OpenWeights]:
    """An open file of weights: safetensors, or torch.save's .bin and .pt.

    Raises CheckpointError for a broken one, which says what it is instead.
    """
    kept = _kept_open.get()
    path = file_path(source)
    file = _open_file(path) if kept is None or path not in kept else kept[path]
    if kept is not None:
        kept[path] = file
    yield file


def _open_file(path: Path) -> OpenWeights:
    try:
        is_torch_file = path.suffix in (".bin", ".pt") and path.exists()
        if is_torch_file:
            return open_torch_file(path)
        return SafetensorsFile(path)
    except OSError as error:
        what = describe_unreadable(path) or "check that it can be read"
        raise CheckpointError(f"cannot read {path}: {error.strerror}; {what}") from error


def read_headers(sources: Sequence[WeightFile]) -> dict[str, TensorHeader]:
    """Names, shapes and dtypes of all tensors in the files, from their headers alone.

    Raises CheckpointError where two files hold a tensor and no index says which counts.
    """
    headers: dict[str, TensorHeader] = {}
    for source in sources:
        with open_weights(source) as file:
            keys = _keys(file, source)
            if twice := sorted(headers.keys() & set(keys)):
                raise CheckpointError(
                    f"{file_path(source)} holds tensors that another file holds, too: {_list_some('keys', twice)}"
                )
            headers |= {key: file.header(key) for key in keys}
    return headers


def read_shapes(sources: Sequence[WeightFile]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in the files, from their headers alone."""
    return {key: header.shape for key, header in read_headers(sources).items()}


def read_folder_shapes(folder: Path, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in a folder's weights of these names; none where it has no such file."""
    return read_shapes(weight_files(folder, names)) if any(is_there(folder / name) for name in names) else {}


def read_size(shapes: Shapes, key: str, *, axis: int, n_axes: int) -> int:
    """The size of an axis of a tensor that tells a number of the config. Raises CheckpointError for a tensor of other
    axes, or an empty one."""
    shape = shapes[key]
    if len(shape) != n_axes or min(shape) < 1:
        raise CheckpointError(
            f"{key} has shape {list(shape)} in the weights: expected {n_axes} axes, none of them empty; fetch them again"
        )
    return shape[axis]


def check_keys(shapes: Shapes, key_map: KeyMap, parameters: Mapping[str, Tensor], where: str) -> dict[str, Transform]:
    """Match released tensors with our parameters, strictly: {released name: transform}, without those that are ignored.

    Raises CheckpointError unless every tensor meets an entry, every entry a tensor, every parameter is met once, and
    shapes agree. `where` is the file's name for the message.
    """
    expected: dict[str, Transform] = {}
    for name in parameters:
        expected |= key_map.released_tensors(name)
    found = {key: expected[key] for key in shapes if key in expected}
    unmet = [t.released for t in key_map.transforms if not any(matches(t.released, key) for key in shapes)]
    right = {key: released_shape(transform, parameters) for key, transform in found.items()}
    wrong = [
        f"{key}: got {list(shapes[key])}, expected {list(shape)}"
        for key, shape in right.items()
        if shapes[key] != shape
    ]
    problems = [
        _list_some("unexpected keys", sorted(key for key in shapes if key not in found and not key_map.ignores(key))),
        _list_some("missing keys", sorted(expected.keys() - found.keys())),
        _list_some("entries of the key map that no key meets", sorted(unmet)),
        _list_some("wrong shapes", wrong),
    ]
    if any(problems):
        raise CheckpointError(f"{where} does not fit the model: {'; '.join(filter(None, problems))}")
    return found


def released_shape(transform: Transform, parameters: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The shape of the released tensor that these parameters make; computes nothing."""
    return tuple(
        transform.to_released([torch.empty_like(parameters[name], device="meta") for name in transform.our_names]).shape
    )


@keep_weights_open()
def load_weights(
    model: nn.Module,
    paths: Sequence[WeightFile],
    key_map: KeyMap,
    *,
    prefix: str = "",
    dtype: torch.dtype,
    device: torch.device,
    quantization: LoadQuantization | None = None,
) -> None:
    """Load files into those parameters of `model` (on meta) that `key_map` knows, strictly.

    Tensors that a file holds as they are wanted, in `dtype` and on the CPU, are mapped from it; the others are read,
    cast and moved by threads that work ahead, so that the peak is the model and READ_AHEAD_BYTES. `prefix` is left out
    of the keys where every one of them has it. Raises CheckpointError, before anything is assigned, where files do not
    fit. Logs a warning that names the tensors with NaN, but for mapped ones of more than MAX_CHECKED_BYTES together.
    quantization: of linears, each as soon as its weights are there. Where values are left out they stay on meta, in
    `dtype`.
    """
    if values_left_out():
        for name, tensor in model.state_dict().items():
            if key_map.released_tensors(name):
                set_tensor(model, name, torch.empty_like(tensor, dtype=dtype, device="meta"))
        return
    headers = read_headers(paths)
    skip = len(prefix) if prefix and all(key.startswith(prefix) for key in headers) else 0
    headers = {key[skip:]: header for key, header in headers.items()}
    where = str(file_path(paths[0]))
    quantized = _read_quantized(paths, headers, skip, where)
    headers = whole_headers(headers, {key: one.format for key, one in quantized.items()})
    shapes = {key: header.shape for key, header in headers.items()}
    found, parameters = match_weights(model, shapes, key_map, where)
    _check_dtypes(headers, {key: one for key, one in found.items() if key not in quantized}, parameters, where)
    filler = ModelFiller(model, found, dtype, device, quantization=quantization, quantized=quantized)
    wanted: list[tuple[OpenWeights, list[str]]] = []
    for path in paths:
        with open_weights(path) as file:
            wanted.append((file, [key for key in _keys(file, path) if key[skip:] in found]))
    needed = sum(filler.needed_bytes(file, keys, skip) for file, keys in wanted)
    if weights_stay() and needed > MAX_CONVERTED_BYTES:
        held = ", ".join(sorted({headers[key].dtype for key in found}))
        raise ValueError(
            f'{where} holds {held}, got dtype {str(dtype).removeprefix("torch.")} and offload="disk": weights of '
            f"{needed / 2**30:.1f} GiB would have to be converted or copied; take the dtype of the file"
        )
    check_memory(needed, device)
    with tqdm(total=len(found), desc="loading", unit="tensor", disable=needed < PROGRESS_BAR_BYTES, leave=False) as bar:
        for file, keys in wanted:
            for _ in filler.load(file, keys, skip):
                bar.update()
    if filler.with_nan:
        logger.warning(
            "%s: %s; what is computed with them is NaN, fetch the file again",
            where,
            _list_some("NaN in", filler.with_nan),
        )


def _read_quantized(
    paths: Sequence[WeightFile], headers: Mapping[str, TensorHeader], skip: int, where: str
) -> dict[str, QuantizedTensor]:
    """What stands beside the codes of each tensor that is in few bits, by its name. skip: the length of the keys' prefix."""
    formats = quantized_formats(headers, where)
    sides: dict[str, dict[str, Tensor]] = {key: {} for key in formats}
    names = side_names(formats)
    for path in paths:
        with open_weights(path) as file:
            for key in _keys(file, path):
                if key[skip:] in names:
                    owner, suffix = names[key[skip:]]
                    sides[owner][suffix] = file.get_tensor(key).clone()
    return {key: QuantizedTensor(one, sides[key]) for key, one in formats.items()}


def _check_dtypes(
    headers: Mapping[str, TensorHeader], found: Mapping[str, Transform], parameters: Mapping[str, Tensor], where: str
) -> None:
    """Raise CheckpointError where a file holds whole numbers, as a quantized one does, for parameters that are
    floats."""
    floating = [name for name, dtype in DTYPES.items() if dtype.is_floating_point]
    wrong = [
        f"{key}: {headers[key].dtype}"
        for key, transform in found.items()
        if headers[key].dtype not in floating
        and any(parameters[name].is_floating_point() for name in transform.our_names)
    ]
    if wrong:
        raise CheckpointError(
            f"{where} does not fit the model: {_list_some('dtypes', wrong)}; expected one of {', '.join(floating)}: a "
            "quantized file cannot be read, fetch the released one"
        )


def match_weights(
    model: nn.Module, shapes: Shapes, key_map: KeyMap, where: str
) -> tuple[dict[str, Transform], dict[str, Tensor]]:
    """The transforms of released tensors by their names, and those parameters of `model` that `key_map` knows.

    Raises CheckpointError where they do not fit, as `check_keys` does.
    """
    parameters = {name: tensor for name, tensor in loadable_tensors(model).items() if key_map.released_tensors(name)}
    return check_keys(shapes, key_map, parameters, where), parameters


def check_weights(model: nn.Module, paths: Sequence[WeightFile], key_map: KeyMap) -> None:
    """Raise CheckpointError where files that were just written would not load into `model`; computes nothing."""
    try:
        where = f"{paths[0].name} as it would be written"
        headers = read_headers(paths)
        headers = whole_headers(headers, quantized_formats(headers, where))
        match_weights(model, {key: header.shape for key, header in headers.items()}, key_map, where)
    except CheckpointError as error:
        raise CheckpointError(
            f"cannot save: {error}; nothing was replaced; merge adapters into the weights and undo what replaced the "
            "parts first"
        ) from error


def materialize(model: nn.Module, unused: Sequence[str], *, dtype: torch.dtype, device: torch.device) -> None:
    """Fill the parameters that no file held: zeros for those of `unused` (name patterns), which nothing reads.

    Buffers that a module computes for itself are moved to the device. Raises CheckpointError where another parameter
    was not loaded.
    """
    state = loadable_tensors(model)
    for name, buffer in list(model.named_buffers()):
        if name not in state:
            set_tensor(model, name, buffer.to(device))
    for name, tensor in state.items():
        if tensor.is_meta and not values_left_out():
            if not any(matches(pattern, name) for pattern in unused):
                raise CheckpointError(f"no file holds {name}: the model's key maps leave it out")
            set_tensor(model, name, torch.zeros(tensor.shape, dtype=dtype, device=device))


def free_memory(device: torch.device) -> int | None:
    """The bytes that are free on a device; None where this cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if Path("/proc/meminfo").exists():
        return 1024 * int(re.findall(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[0])
    return None


def check_memory(needed: int, device: torch.device) -> None:
    """Raise MemoryError, with figures, where `needed` bytes of weights cannot fit the device's free memory."""
    free = free_memory(device)
    if free is not None and needed > free:
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
