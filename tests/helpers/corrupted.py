"""A corpus of corrupted checkpoints of a toy model, each made in a folder of its own from the same whole files."""

import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

TENSORS = {
    "layer.weight": torch.arange(15.0).view(5, 3),
    "layer.bias": torch.arange(5.0) - 2,
    "norm.weight": torch.arange(4.0).bfloat16(),
}
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
WHOLE = save(TENSORS, {"format": "pt"})
LENGTH = int.from_bytes(WHOLE[:8], "little")
HEADER: dict[str, Any] = json.loads(WHOLE[8 : 8 + LENGTH])
DATA = WHOLE[8 + LENGTH :]
DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000


@dataclass(frozen=True)
class Corruption:
    """make: writes the files into an empty folder. named: what an error has to name. may_load: whether the weights may
    also load, as they were."""

    what: str
    make: Callable[[Path], None]
    named: tuple[str, ...] = (FILE,)
    may_load: bool = False


def whole_file(contents: bytes) -> Callable[[Path], None]:
    return lambda folder: bytes_into(folder / FILE, contents)


def bytes_into(path: Path, contents: bytes) -> None:
    path.write_bytes(contents)


def with_header(header: Any, data: bytes = DATA, *, length: int | None = None) -> bytes:
    """A file of any header: bytes, or what is to be JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def changed_entry(key: str, **fields: Any) -> dict[str, Any]:
    """The header with other fields of a tensor; `...` for none."""
    entry = {name: value for name, value in (HEADER[key] | fields).items() if value is not ...}
    return HEADER | {key: entry}


def cut_and_flipped() -> Iterator[Corruption]:
    """Cut at every byte; every byte of length and header with its lowest and highest bit, and all bits, turned."""
    for size in range(len(WHOLE)):
        yield Corruption(f"cut after {size} bytes", whole_file(WHOLE[:size]))
    for place in range(8 + LENGTH):
        for bits in (1, 0x80, 0xFF):
            flipped = bytearray(WHOLE)
            flipped[place] ^= bits
            # the metadata, and blanks, have no meaning
            yield Corruption(f"byte {place} ^ {bits}", whole_file(bytes(flipped)), may_load=True)


def lengths_and_headers() -> Iterator[Corruption]:
    """Lengths that are wrong, and headers that are something else."""
    text = WHOLE[8 : 8 + LENGTH]
    for length in (0, 1, LENGTH - 1, LENGTH + 1, len(WHOLE), 10**8, 2**31, 2**32 + 7, 2**63 - 1, 2**63, 2**64 - 1):
        yield Corruption(f"length {length}", whole_file(with_header(text, length=length)))
    headers: dict[str, Any] = {"a list": [1], "a number": 3, "a text": "x", "null": None, "nothing": b"", "deep": DEEP}
    headers |= {"a deep list": b"[" * 100_000, "not UTF-8": b'{"\xff\xfe": 1}', "open": b'{"a": ', "zeros": bytes(64)}
    headers |= {
        "many digits": b'{"a": ' + b"9" * 10_000 + b"}",
        "NaN": b'{"a": NaN}',
        "UTF-16": text.decode().encode("utf-16"),
    }
    headers |= {"two objects": text.strip() + text, "code": b"__import__('os').system('true')"}
    headers |= {
        "tensors twice": b'{"layer.bias": 1, ' + text.strip()[1:],
        "metadata of numbers": HEADER | {"__metadata__": {"a": 1}},
    }
    headers |= {"metadata of a list": HEADER | {"__metadata__": []}, "huge": b'{"' + b"a" * 10**6 + b'": 1}'}
    for what, header in headers.items():
        yield Corruption(what, whole_file(with_header(header)))
    for extra in (b"\0", b"more than there was", bytes(10**5)):
        yield Corruption(f"{len(extra)} bytes more", whole_file(WHOLE + extra))


def entries() -> Iterator[Corruption]:
    """Tensors' entries with other dtypes, shapes and places."""
    for key, entry in HEADER.items():
        if key == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        values: dict[str, list[Any]] = {
            "dtype": ["F64", "I8", "BOOL", "F4", "f32", "", 7, None, [], {}, "x" * 10**5, ...],
            "shape": [
                *([-1], [0], [10**9], [2**63], [2**200], [2**32, 2**32], ["5"], [5.0], [[5]], [True]),
                *(5, None, {}, "5", ...),
            ],
            "data_offsets": [
                *([begin, end + 4], [begin + 4, end + 4], [begin - 4, end], [end, begin], [begin, begin], [-4, end]),
                *([begin], [begin, end, end], [0.0, 8.0], [begin, 2**63], [2**64, 2**65], [str(begin), str(end)]),
                *(None, {}, 5, ...),
            ],
        }  # fmt: skip
        for name, some in values.items():
            for value in some:
                header = changed_entry(key, **{name: value})
                yield Corruption(f"{key} {name} {value!r:.40}", whole_file(with_header(header)), (FILE, key))
        others: list[Any] = [None, 3, [], "x", {}, entry | {"more": 1}]
        for other in others:
            yield Corruption(f"{key} is {other!r:.40}", whole_file(with_header(HEADER | {key: other})), (FILE, key))
        for twin in ({**HEADER, "other": entry}, {(k if k != key else "other"): v for k, v in HEADER.items()}):
            yield Corruption(f"{key} under another name", whole_file(with_header(twin)), (FILE, "other"))
        lost = {k: v for k, v in HEADER.items() if k != key}
        yield Corruption(f"{key} is lost", whole_file(with_header(lost)))


def indexed(folder: Path, index: Any) -> None:
    """Two shards, and an index of any contents."""
    for name, keys in zip(SHARDS, (["layer.weight"], ["layer.bias", "norm.weight"]), strict=True):
        (folder / name).write_bytes(save({key: TENSORS[key] for key in keys}))
    (folder / INDEX).write_bytes(index if isinstance(index, bytes) else json.dumps(index).encode())


def indices() -> Iterator[Corruption]:
    """Indices of something else, and of files elsewhere."""
    right = {"layer.weight": SHARDS[0], "layer.bias": SHARDS[1], "norm.weight": SHARDS[1]}
    places: list[Any] = [
        "../x.safetensors",
        "/etc/passwd",
        "a/../../x",
        "..",
        ".",
        "",
        "/",
        None,
        3,
        [],
        {},
        True,
        1.5,
        [SHARDS[0]],
    ]
    for place in places:
        for key in right:
            index = {"weight_map": right | {key: place}}
            yield Corruption(f"{key} in {place!r}", lambda folder, index=index: indexed(folder, index), (INDEX,))  # type: ignore[misc]
    for place in ("none.safetensors", "sub/none.safetensors", "x" * 300, "a\0b", "\ud800"):
        index = {"weight_map": right | {"layer.bias": place}}
        yield Corruption(
            f"a shard {place[:20]!r}", lambda folder, index=index: indexed(folder, index), ("safetensors",)
        )  # type: ignore[misc]
    swapped = {"weight_map": right | {"layer.bias": SHARDS[0]}}
    yield Corruption("the wrong shard", lambda folder: indexed(folder, swapped), (SHARDS[0], "layer.bias"))
    lost = {"weight_map": right | {"other.weight": SHARDS[0]}}
    yield Corruption("more than there is", lambda folder: indexed(folder, lost), (SHARDS[0], "other.weight"))
    others: list[Any] = [
        {},
        [],
        3,
        None,
        {"weight_map": None},
        {"weight_map": []},
        {"weight_map": {}},
        {"weight_map": 5},
    ]
    others += [DEEP, b"[" * 100_000, b"\xff\xfe{", b"", b"{", b'{"weight_map": {"a": ', bytes(100), b"9" * 10_000]
    for other in others:
        yield Corruption(f"an index {other!r:.30}", lambda folder, other=other: indexed(folder, other), (INDEX,))  # type: ignore[misc]


def odd_files() -> Iterator[Corruption]:
    """Files that are something else: folders, pipes, devices, links to nothing, in a circle, or out of the folder."""
    yield Corruption("a folder", lambda folder: (folder / FILE).mkdir())
    yield Corruption("a pipe", lambda folder: os.mkfifo(folder / FILE))
    for target in ("/dev/zero", "/dev/null", "/nowhere/at/all", "/etc/hostname", "/", FILE):
        yield Corruption(f"a link to {target}", lambda folder, target=target: (folder / FILE).symlink_to(target))  # type: ignore[misc]
    dice = random.Random(0)
    for n in (8, 16, 100, 1000, 10_000):
        for _ in range(6):
            yield Corruption(f"{n} random bytes", whole_file(dice.randbytes(n)))


def corpus() -> list[Corruption]:
    """All of them."""
    return [*cut_and_flipped(), *lengths_and_headers(), *entries(), *indices(), *odd_files()]
