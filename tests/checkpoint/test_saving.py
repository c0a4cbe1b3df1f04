"""Saving loses nothing and leaves nothing: parts that were changed, folders in odd places, saves that were killed."""

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers.cases import small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations

import unimm
from unimm.checkpoint.atomic import atomic_directory, copy_file
from unimm.checkpoint.keymap import Concat, KeyMap
from unimm.checkpoint.save import released_state_dict, save_safetensors
from unimm.models.registry import FAMILIES

each_family = pytest.mark.parametrize("name", [small_model(family) for family in FAMILIES], ids=list(FAMILIES))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = (list(model.key_maps().values()) for model in (a, b))
    states = [
        {key: x for key_map in maps for key, x in released_state_dict(model, key_map).items()}
        for model, maps in ((a, ours), (b, theirs))
    ]
    return states[0].keys() == states[1].keys() and all(torch.equal(x, states[1][key]) for key, x in states[0].items())


# ---- parts that were changed


@each_family
def test_compiled_parts_are_saved_under_their_own_names(name, tmp_path):
    """Every part of a model, and one within a part that is compiled itself."""
    model, plain = unimm.load(name), unimm.load(name)
    inner = next(path for path, part in model.named_modules() if isinstance(part, nn.Linear) and path.count(".") > 1)
    model.set_submodule(inner, torch.compile(model.get_submodule(inner), backend="eager"))
    for child, part in list(model.named_children()):
        setattr(model, child, torch.compile(part, backend="eager"))
    model.save_pretrained(tmp_path)
    assert same(unimm.load(tmp_path), plain)


class LowRank(nn.Module):
    """An adapter beside a linear, as libraries of adapters make them."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 1, bias=False)


class LowRankLinear(nn.Linear):
    """An adapter that keeps the names of the linear."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(torch.zeros(1, linear.in_features))


class WholeNumbers(nn.Module):
    """A quantized linear under the same names."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
        self.bias = linear.bias


def rows_more(linear: nn.Linear) -> nn.Linear:
    return nn.Linear(linear.in_features, linear.out_features + 1, bias=linear.bias is not None)


CHANGES = {
    "adapter": (LowRank, r"cannot save .*lora_A.*merge adapters"),
    "adapter of the same names": (LowRankLinear, r"cannot save.*lora_A.*merge adapters"),
    "parametrized": (parametrizations.weight_norm, r"cannot save .*parametrizations.*remove_parametrizations"),
    "quantized": (WholeNumbers, r"cannot save .*weight: expected .* in floating point"),
    "removed": (lambda linear: nn.Identity(), r"does not fit the model: missing keys|the model has no"),
    "another size": (rows_more, r"wrong shapes"),
}


@pytest.mark.parametrize("change", CHANGES)
@each_family
def test_changed_parts_are_refused_by_name_before_anything_is_replaced(name, change, tmp_path):
    model = unimm.load(name)
    linears = [path for path, part in model.named_modules() if type(part) is nn.Linear]
    make, message = CHANGES[change]
    # one of several equal layers, whose entry in the key map others still meet
    path = next(one for one in linears if re.search(r"\.1\..*(fc1|up)$", one))
    model.set_submodule(path, make(model.get_submodule(path)))
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)
    assert files(tmp_path) == {"config.json": b"mine"}


@pytest.mark.parametrize("name", ["bagel-nano", "janus-nano", "janusflow-nano"])
def test_tied_weights_are_written_each(name, tmp_path):
    model = unimm.load(name)
    model.decoder.head.weight = model.decoder.embed.weight
    model.save_pretrained(tmp_path)
    again = unimm.load(tmp_path)
    assert torch.equal(again.decoder.head.weight, model.decoder.embed.weight) and same(again, model)


def test_tensors_that_overlap_are_written_each(tmp_path):
    memory = torch.arange(12.0)
    state = {
        "whole": memory,
        "first": memory[:6],
        "within": memory[3:9],
        "rows": memory.view(3, 4).T,
        "empty": memory[:0],
    }
    save_safetensors(state, tmp_path / "a.safetensors")
    written = load_file(tmp_path / "a.safetensors")
    assert written.keys() == state.keys() and all(torch.equal(written[name], x) for name, x in state.items())
    with pytest.raises(ValueError, match="cannot write x: it is on meta"):
        save_safetensors({"x": torch.empty(2, device="meta")}, tmp_path / "b.safetensors")


def test_a_tensor_of_several_parameters_needs_them_all():
    model = nn.ModuleDict({"q": nn.Linear(2, 2), "k": nn.Identity()})
    with pytest.raises(ValueError, match=r"cannot save qkv: the model has no k\.weight"):
        released_state_dict(model, KeyMap(Concat("qkv", ("q.weight", "k.weight"))))


# ---- odd places


def write(folder: Path, contents: dict[str, str], **options) -> None:
    with atomic_directory(folder, **options) as partial:
        for name, text in contents.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_text(text)


@pytest.fixture
def other_disk(tmp_path):
    """A folder on another file system."""
    folder = Path("/dev/shm") / f"unimm-test-{os.getpid()}"
    if not os.access(folder.parent, os.W_OK) or folder.parent.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("linked", ["there", "to be made", "a folder below"])
def test_a_link_to_another_disk(tmp_path, other_disk, linked, replace):
    place, folder = other_disk / "place", tmp_path / "model"
    if linked != "to be made":
        place.mkdir()
    if linked == "a folder below":
        folder.mkdir()
        (folder / "vae").symlink_to(place)
        (place / ".unimm-writing-killed-w").touch()
    else:
        folder.symlink_to(place)
    for text in ("old", "new"):
        written = dict.fromkeys(("a", "vae/v", "vae/w"), text)
        write(folder, written, replace=replace)
        assert {name: (folder / name).read_text() for name in written} == written
    assert (place / ("w" if linked == "a folder below" else "vae/w")).read_text() == "new", "the link is kept"
    assert not [path for top in (tmp_path, other_disk) for path in top.rglob(".unimm*")]


def test_only_the_folder_itself_need_be_writable(tmp_path, monkeypatch):
    mine = tmp_path / "me"
    mine.mkdir()
    plain = os.mkdir

    def mkdir(path, *rest, **options):
        if Path(path).parent == tmp_path and not Path(path).exists():
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *rest, **options)

    monkeypatch.setattr(os, "mkdir", mkdir)
    write(mine, {"a": "1", "vae/w": "1"})
    assert files(mine) == {"a": b"1", "vae/w": b"1"}


@pytest.mark.parametrize("blocked", ["a folder", "a file", "above"])
def test_an_error_names_the_file_and_leaves_the_old_ones(tmp_path, blocked):
    folder = tmp_path / "model"
    write(folder, {"a": "old", "w": "old"})
    if blocked == "a folder":
        (folder / "w").unlink()
        (folder / "w").mkdir()
    before = files(folder)
    with pytest.raises(OSError, match=r"model.*/w|/a") as found:
        write(
            folder / "a" if blocked == "above" else folder, {"a": "new", "w/x" if blocked == "a file" else "w": "new"}
        )
    assert ".unimm" not in str(found.value.filename) and files(folder) == before


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path):
    code = "\n".join((
        "import resource, sys, unimm; model = unimm.load('janusflow-nano')",
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))",
        "try: model.save_pretrained(sys.argv[1])",
        "except OSError as error: print(error.filename, error.strerror)",
    ))  # fmt: skip
    for folder in (tmp_path / "new" / "model", tmp_path):
        done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
        assert re.fullmatch(rf"{folder}/[\w.]+ File too large\n", done.stdout)
        assert not list(tmp_path.iterdir())


NEW = ("a", "model.safetensors", "vae/w")


@settings(deadline=None, max_examples=60)
@given(
    old=st.sets(st.sampled_from([*NEW, "other", "more/x"])),
    at=st.integers(0, 12),
    method=st.sampled_from(["replace", "rename", "unlink"]),
    replace=st.booleans(),
)
def test_a_move_that_fails_is_all_of_the_old_or_all_of_the_new(old, at, method, replace):
    """As on a disk that fails between two moves."""
    plain = getattr(Path, method)
    calls = []

    def fails(path, *rest, **options):
        calls.append(path)
        if len(calls) == at + 1:
            raise OSError(5, "Input/output error", str(path))
        return plain(path, *rest, **options)

    with tempfile.TemporaryDirectory() as top, pytest.MonkeyPatch.context() as patch:
        folder = Path(top) / "model"
        write(folder, dict.fromkeys(old, "old"))
        before = files(folder) if folder.exists() else {}
        patch.setattr(Path, method, fails)
        with suppress(OSError):
            write(folder, dict.fromkeys(NEW, "new"), replace=replace)
        patch.undo()
        after = {name: text for name, text in files(folder).items() if ".unimm" not in name} if folder.exists() else {}
        kept = {} if replace else before
        assert after in (before, kept | dict.fromkeys(NEW, b"new"))
        write(folder, dict.fromkeys(NEW, "again"), replace=True)
        assert files(folder) == dict.fromkeys(NEW, b"again"), "nothing is left of what failed"


def test_a_full_disk_behind_a_link_names_the_file_that_is_written(tmp_path, other_disk, monkeypatch):
    """And not the one that it is copied from, which python names."""
    (tmp_path / "vae").symlink_to(other_disk)

    def full(source, target):
        error = OSError(errno.ENOSPC, "No space left on device", str(source))
        error.filename2 = str(target)
        raise error

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left") as found:
        write(tmp_path, {"vae/w": "new"})
    assert found.value.filename == str(tmp_path / "vae" / "w")
    with pytest.raises(OSError, match="No space left") as found:
        copy_file(tmp_path / "here", tmp_path / "there")
    assert found.value.filename == str(tmp_path / "there")


# ---- killed, or two at once


def killed(save, *, at: int) -> None:
    """Run `save` in a process that is killed before it moves its file number `at` into place."""
    if child := os.fork():
        os.waitpid(child, 0)
        return
    moves = []
    plain = Path.replace

    def dies(path, target):
        moves.append(target)
        return os._exit(9) if len(moves) > at else plain(path, target)

    Path.replace = dies
    save()
    os._exit(0)


@pytest.mark.parametrize("replace", [False, True])
def test_a_killed_save_is_the_old_the_new_or_none(tmp_path, replace):
    """And the next one deletes what it left."""
    from unimm.checkpoint.load import CheckpointError, weight_files

    old, new = (dict.fromkeys(("a", "model.safetensors", "vae/w"), text) for text in ("old", "new"))
    for at in range(4):
        folder = tmp_path / str(at)
        write(folder, old)
        killed(lambda folder=folder: write(folder, new, replace=replace), at=at)
        if at < 3:
            with pytest.raises(CheckpointError, match="saving into it was interrupted"):
                weight_files(folder, ("model.safetensors",))
        else:
            assert files(folder) == dict.fromkeys(new, b"new")
        write(folder, old)
        assert files(folder) == dict.fromkeys(old, b"old")
        assert not list(folder.rglob(".unimm*"))


@pytest.mark.parametrize("replace", [False, True])
def test_a_save_inside_of_a_save(tmp_path, replace):
    """As a task saves its model into the release that the trainer is writing: neither waits for the other, and the outer
    one is not taken for dead."""
    with atomic_directory(tmp_path) as outer:
        (outer / "log").write_text("outer")
        write(outer, {"w": "inner"}, replace=replace)
        write(tmp_path, {"other": "beside"})
        assert (outer / "w").read_bytes() == b"inner" and (outer / "log").exists() != replace
    assert files(tmp_path) == {"w": b"inner", "other": b"beside"} | ({} if replace else {"log": b"outer"})


def test_what_killed_saves_wrote_is_deleted_and_what_others_write_is_not(tmp_path):
    for _ in range(3):
        if not (child := os.fork()):
            with atomic_directory(tmp_path) as partial:
                (partial / "w").write_text("killed")
                os._exit(9)
        os.waitpid(child, 0)
    assert len(list(tmp_path.glob(".unimm-writing-*"))) == 1, "each deletes that of the one before"
    with atomic_directory(tmp_path) as first:
        (first / "w").write_text("first")
        write(tmp_path, {"w": "second"}, replace=True)
        assert (first / "w").read_bytes() == b"first"
    assert files(tmp_path) == {"w": b"first"}


def test_two_layouts_at_once(tmp_path, monkeypatch):
    """A model is saved in one layout while another thread saves it in the other: neither changes the model."""
    model = unimm.load("janus-nano")
    begun, ended = threading.Event(), threading.Event()

    def waits(state, path):
        if threading.current_thread().name == "first":
            begun.set()
            ended.wait(60)
        save_safetensors(state, path)

    monkeypatch.setattr("unimm.checkpoint.save.save_safetensors", waits)
    save = lambda: model.save_pretrained(tmp_path / "ported", layout="transformers")  # noqa: E731
    first = threading.Thread(target=save, name="first")
    first.start()
    begun.wait(60)
    model.save_pretrained(tmp_path / "plain")
    ended.set()
    first.join()
    layouts = {name: unimm.load(tmp_path / name).checkpoint_layout for name in ("ported", "plain")}
    assert layouts == {"ported": "transformers", "plain": "original"} and model.checkpoint_layout == "original"
