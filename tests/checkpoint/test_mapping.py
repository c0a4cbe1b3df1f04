"""Weights that are mapped from their files, or read ahead and converted: values, memory, and what happens to the files."""

import copy
import io
import os
import pickle
import subprocess
import sys
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import unimm
from tests.helpers.toys import toy
from unimm.checkpoint import filling, load, streaming
from unimm.checkpoint.filling import weights_stay_in_files
from unimm.checkpoint.keymap import Concat, KeyMap, equal_slices, renames
from unimm.checkpoint.load import keep_weights_open, load_weights
from unimm.checkpoint.safetensors_file import SafetensorsFile
from unimm.checkpoint.save import PendingTensor, parse_bytes, released_tensors, save_safetensors, save_weights
from unimm.models.base import UnifiedModel

CPU = torch.device("cpu")
SIDE = 512  # a matrix of it has the size from which weights are mapped, in bfloat16


@pytest.fixture
def path(tmp_path):
    """A file of two large matrices, a small vector and an empty tensor."""
    torch.manual_seed(0)
    state = {
        "a": torch.randn(SIDE, SIDE).bfloat16(),
        "b": torch.randn(2 * SIDE, SIDE).bfloat16(),
        "bias": torch.randn(SIDE).bfloat16(),
        "empty": torch.zeros(0, 3).bfloat16(),
    }
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def stored_in(path: Path) -> dict[str, torch.Tensor]:
    """A file's tensors, which stay as they are when it is overwritten: safetensors maps them, too."""
    return {key: x.clone() for key, x in load_file(path).items()}


class Net(nn.Module):
    """Parameters for `path`; b is two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(SIDE, SIDE))
        self.first = nn.Parameter(torch.zeros(SIDE, SIDE))
        self.second = nn.Parameter(torch.zeros(SIDE, SIDE))
        self.bias = nn.Parameter(torch.zeros(SIDE))
        self.empty = nn.Parameter(torch.zeros(0, 3))


NAMES = ("a", "bias", "empty")
KEY_MAP = KeyMap(Concat("b", ("first", "second"))) + renames(dict(zip(NAMES, NAMES, strict=True)))


def loaded(path: Path, dtype: torch.dtype = torch.bfloat16, key_map: KeyMap = KEY_MAP) -> Net:
    with torch.device("meta"):
        net = Net()
    load_weights(net, [path], key_map, dtype=dtype, device=CPU)
    return net


def in_file(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory is mapped from a file."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, place = line.split(maxsplit=5)
        first, end = (int(one, 16) for one in span.split("-"))
        if first <= address < end:
            return ".safetensors" in place or ".bin" in place
    raise AssertionError("memory that is nowhere")


# ---- mapping


def test_weights_are_mapped_where_nothing_is_converted(path):
    net, stored = loaded(path), load_file(path)
    both = torch.cat((net.first, net.second))
    assert torch.equal(net.a, stored["a"]) and torch.equal(both, stored["b"]) and torch.equal(net.bias, stored["bias"])
    assert all(in_file(x) for x in (net.a, net.first, net.second)) and not in_file(net.bias)
    # copies and pickles of a part hold that part
    assert {x.untyped_storage().nbytes() for x in (net.a, net.first, net.second)} == {2 * SIDE * SIDE}
    assert not any(in_file(x) for x in loaded(path, torch.float32).parameters() if x.numel())


def test_what_is_written_to_stays_in_this_process(path):
    before, net, other = path.read_bytes(), loaded(path), loaded(path)
    with torch.no_grad():
        net.a.zero_()
        net.second.add_(1)
    assert path.read_bytes() == before and torch.equal(other.a, load_file(path)["a"]) and not net.a.any()
    assert torch.equal(net.first, load_file(path)["b"][:SIDE]), "the neighbours in the file are as they were"
    path.chmod(0o444)
    with torch.no_grad():
        loaded(path).a.zero_()
    assert path.read_bytes() == before


@keep_weights_open()
def test_one_open_file_gives_no_tensor_twice(path):
    one, two = loaded(path), loaded(path)
    with torch.no_grad():
        one.a.zero_()
    assert torch.equal(two.a, load_file(path)["a"])


def test_a_file_that_is_replaced_or_deleted_stays_as_it_was_for_those_who_map_it(path):
    net, stored = loaded(path), stored_in(path)
    save_safetensors({"a": torch.zeros(1)}, path.with_name("new"))
    path.with_name("new").replace(path)
    assert torch.equal(net.a, stored["a"])
    path.unlink()
    assert torch.equal(net.second, stored["b"][SIDE:])


def test_a_model_is_saved_over_the_files_that_it_is_mapped_from(tmp_path):
    """Twice, the second time in another form, which leaves nothing of the first."""
    model = unimm.load("janus-nano")
    model.save_pretrained(tmp_path, dtype="bfloat16")
    mapped = unimm.load(tmp_path, dtype="bfloat16")
    assert any(in_file(p) for p in mapped.parameters())
    expected = {name: x.clone() for name, x in mapped.state_dict().items()}
    mapped.save_pretrained(tmp_path, max_shard_size="400KB")
    assert not (tmp_path / "model.safetensors").exists() and len(list(tmp_path.glob("model-*"))) > 3
    again = unimm.load(tmp_path, dtype="bfloat16")
    again.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    for found in (mapped, again, unimm.load(tmp_path, dtype="bfloat16")):
        assert all(torch.equal(x, expected[name]) for name, x in found.state_dict().items())


def test_copies_of_mapped_weights(path):
    net, stored = loaded(path), load_file(path)["a"]
    copied, pickled = copy.deepcopy(net), pickle.loads(pickle.dumps(net))  # noqa: S301
    buffer = io.BytesIO()
    torch.save(net.first, buffer)
    assert len(buffer.getvalue()) < 2 * SIDE * SIDE + 10_000
    shared = loaded(path).share_memory()
    for other in (copied, pickled, shared):
        assert torch.equal(other.a, stored) and not in_file(other.a)
    if not (child := os.fork()):  # writes to its own pages
        net.a.data.zero_()
        os._exit(0 if not net.a.any() else 1)
    assert os.waitpid(child, 0)[1] == 0 and torch.equal(net.a, stored)


@pytest.mark.parametrize("padding", [1, 2, 7])
def test_tensors_that_are_not_aligned_are_copied(path, padding):
    """A header may have any length."""
    raw, stored = path.read_bytes(), stored_in(path)
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes(
        (length + padding).to_bytes(8, "little") + raw[8 : 8 + length] + b" " * padding + raw[8 + length :]
    )
    net = loaded(path)
    assert in_file(net.a) == (padding == 2)
    assert torch.equal(net.a, stored["a"]) and torch.equal(net.second, stored["b"][SIDE:])
    assert net.a.data_ptr() % 2 == 0 and torch.equal(SafetensorsFile(path).get_tensor("a"), stored["a"])


def test_torch_files_are_mapped_but_for_tied_weights(tmp_path):
    a, b = torch.randn(2, SIDE, SIDE).bfloat16().unbind()
    path, key_map = tmp_path / "model.bin", renames({name: name for name in ("a", "first", "second", *NAMES[1:])})
    rest = {"bias": torch.zeros(SIDE).bfloat16(), "empty": torch.zeros(0, 3).bfloat16()}
    torch.save({"a": a.clone(), "first": b, "second": b, **rest}, path)
    net = loaded(path, key_map=key_map)
    assert in_file(net.a) and torch.equal(net.a, a)
    with torch.no_grad():
        net.first.zero_()
    assert torch.equal(net.second, b), "tied in the file, two parameters of ours"


# ---- converting


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensors_are_read_in_pieces(tmp_path, monkeypatch, stored, dtype):
    """Larger than every buffer, and than what may be ahead."""
    monkeypatch.setattr(streaming, "PIECE_BYTES", 2**17)
    monkeypatch.setattr(streaming, "BUFFER_BYTES", 3 * 2**14)
    monkeypatch.setattr(streaming, "READ_AHEAD_BYTES", 2**18)
    state = {name: torch.randn(n, 331).to(stored) for name, n in (("a", 511), ("first", 7), ("second", 1033))}
    state["bias"] = torch.tensor(3.0).to(stored)
    save_safetensors(state, tmp_path / "m.safetensors")
    net = nn.Module()
    for name, x in state.items():
        net.register_parameter(name, nn.Parameter(torch.empty(x.shape, device="meta")))
    load_weights(net, [tmp_path / "m.safetensors"], renames({name: name for name in state}), dtype=dtype, device=CPU)
    assert all(torch.equal(getattr(net, name), x.to(dtype)) for name, x in state.items())


def test_parts_of_a_parameter_are_read_into_it(path):
    net = nn.Module()
    net.rows = nn.Parameter(torch.empty(3 * SIDE, SIDE, device="meta"))
    state = {name: torch.randn(SIDE, SIDE).bfloat16() for name in "qkv"}
    save_file(state, path)
    load_weights(net, [path], equal_slices("qkv", "rows"), dtype=torch.bfloat16, device=CPU)
    assert torch.equal(net.rows, torch.cat([state[name] for name in "qkv"]))


@pytest.mark.parametrize("place", [0, SIDE * SIDE - 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nan_is_found_in_large_tensors(path, caplog, place, dtype):
    state = stored_in(path)
    state["a"].view(-1)[place] = float("nan")
    save_file(state, path)
    loaded(path, dtype)
    assert ["NaN in: a;" in message for message in caplog.messages] == [True]


def test_mapped_files_beyond_a_size_are_not_read_for_nan(path, caplog, monkeypatch):
    state = stored_in(path)
    state["a"][0] = float("nan")
    save_file(state, path)
    monkeypatch.setattr(filling, "MAX_CHECKED_BYTES", 1000)
    loaded(path)
    assert not caplog.messages


CHILD = """
import sys, threading, torch
from pathlib import Path
from torch import nn
from unimm.checkpoint.keymap import KeyMap, Rename
from unimm.checkpoint.load import load_weights
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
def load(name, dtype):
    with torch.device("meta"):
        net = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(8)))
    load_weights(net, [Path(sys.argv[1], name)], KeyMap(Rename("{*}", "{*}")), dtype=dtype, device=torch.device("cpu"))
    return net
load("whole.safetensors", torch.float32)  # whatever is imported, and kept by the allocator, the first time
for dtype in (torch.bfloat16, torch.float32):
    before, peak, done = anonymous(), [0], threading.Event()
    def sample():
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())
    thread = threading.Thread(target=sample)
    thread.start()
    net = load("whole.safetensors", dtype)
    done.set()
    thread.join()
    print((max(peak[0], anonymous()) - before) / sum(p.nbytes for p in net.parameters()))
    del net
"""


def test_anonymous_memory_of_a_load(tmp_path):
    """Mapped weights take none; converted ones their own size, and the buffers of four threads."""
    state = {f"{i}.weight": torch.full((2048, 2048), float(i)).bfloat16() for i in range(8)}
    save_safetensors(state, tmp_path / "whole.safetensors")
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    mapped, converted = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert float(mapped) < 0.05 and 0.9 < float(converted) < 1.05


# ---- staying in the file

OFFLOADED = """
import resource, sys, torch, unimm
from unimm.generation.kv_cache import EMPTY_CACHE
from unimm.sequence.parts import text_part
def status(key):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key + ":"))
torch.set_num_threads(1)
unimm.load(sys.argv[1] + "/small", dtype="bfloat16")  # what is imported and allocated the first time
limit = status("VmData") + 2**26
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    unimm.load(sys.argv[1] + "/large", dtype="bfloat16")
    sys.exit("the limit is too large")
except MemoryError as error:
    assert "offload" in str(error), error
model = unimm.load(sys.argv[1] + "/large", dtype="bfloat16", offload="disk")
with torch.inference_mode():
    (cache,) = model.prefill([EMPTY_CACHE], [[text_part([5, 6, 7])]])
    assert model.decoder.head(torch.ones(1, model.config.decoder.dim).bfloat16()).isfinite().all()
print(cache.length, sum(p.nbytes for p in model.parameters()) / 2**26)
"""


def write_zeros(model: UnifiedModel, folder: Path) -> None:
    """A folder of a model on meta."""
    folder.mkdir()
    model.save_config(folder)
    for names, key_map in model.key_maps().items():
        state = released_tensors(model, key_map, dtype=torch.bfloat16)
        zeros = {key: replace(x, make=partial(torch.zeros, x.shape, dtype=x.dtype)) for key, x in state.items()}
        save_weights(zeros, folder, names, max_shard_size=None)


def test_a_model_larger_than_its_memory(tmp_path):
    """A BAGEL of 200 MB runs in a process that may have 64 MB more of data than it has."""
    for name, vocab in (("small", 256), ("large", 2**20)):
        with torch.device("meta"):
            model = toy(llm={"vocab_size": vocab})
        write_zeros(model, tmp_path / name)
    command = [sys.executable, "-c", OFFLOADED, str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    length, size = done.stdout.split()
    assert int(length) == 3 and float(size) > 3


def test_weights_that_stay_have_the_dtype_of_the_file(path, monkeypatch):
    monkeypatch.setattr(load, "MAX_CONVERTED_BYTES", 10_000)
    with weights_stay_in_files(True):
        assert in_file(loaded(path).a)
        with pytest.raises(ValueError, match=r"model.safetensors holds BF16, got dtype float32 .* take the dtype"):
            loaded(path, torch.float32)


@pytest.mark.parametrize("offload", ["gpu", "", True, 3])
def test_other_places_are_refused(offload):
    with pytest.raises(ValueError, match="expected 'cpu', 'disk', or None"):
        unimm.load("janus-nano", offload=offload)


# ---- writing


def test_shards_are_written_one_tensor_at_a_time(tmp_path):
    """At most one of the tensors that are made for it is there at a time."""
    there = []

    class Made:
        def __init__(self, value: float):
            self.value = value

        def __call__(self) -> torch.Tensor:
            assert not there, "the one before is gone"
            x = torch.full((100,), self.value)
            there.append(1)
            weakref.finalize(x, there.clear)
            return x

    state = {f"layer.{i}": PendingTensor((100,), torch.float32, Made(float(i))) for i in range(7)}
    names = ("model.safetensors", "model.safetensors.index.json")
    save_weights(state, tmp_path, names, max_shard_size=1000)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [*(f"model-{i}-of-00004.safetensors" for i in ("00001", "00002", "00003", "00004")), names[1]]
    weights = {key: x for path in tmp_path.glob("*.safetensors") for key, x in load_file(path).items()}
    assert {key: x[0].item() for key, x in weights.items()} == {f"layer.{i}": float(i) for i in range(7)}
    save_weights(state, tmp_path, names[:1], max_shard_size=1000)  # a layout without an index
    assert load_file(tmp_path / names[0]).keys() == state.keys()


def test_files_are_aligned_and_as_safetensors_reads_them(tmp_path):
    state = {
        "half": torch.randn(3).half(),
        "flags": torch.tensor([True, False]),
        "wide": torch.randn(5, dtype=torch.float64),
        "eight": torch.randn(4).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(7),
        "umlaut \u00e4": torch.ones(1),
    }
    save_safetensors(state, tmp_path / "a.safetensors")
    theirs, ours = load_file(tmp_path / "a.safetensors"), SafetensorsFile(tmp_path / "a.safetensors")
    assert theirs.keys() == state.keys() == set(ours.keys())
    for key, x in state.items():
        assert torch.equal(theirs[key].float(), x.float()) and torch.equal(ours.get_tensor(key).float(), x.float())
        assert ours.tensors[key].is_aligned
    assert min(one.start for one in ours.tensors.values()) % 64 == 0


@pytest.mark.parametrize(
    ("size", "expected"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("7kb", 7000), (3, 3), (None, None)]
)
def test_sizes(size, expected):
    assert parse_bytes(size) == expected


@pytest.mark.parametrize("size", ["5", "GB", "-1GB", "1TB", 0, -3, 2.5, True, "0GB"])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match="expected a positive number of bytes"):
        parse_bytes(size)
