"""Files of weights as others leave them: indexes and their shards, torch.save's files, and what is no weights at all."""

import json
import logging
import os
import random
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unimm.checkpoint.keymap import renames
from unimm.checkpoint.load import HUB_WEIGHT_FILES, CheckpointError, load_weights, read_shapes, weight_files

KEY_MAP = renames({"layer.{}": "{}"})
INDEX = "model.safetensors.index.json"
# how files begin that are not what their names say -> what the error says
IMPOSTORS = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n": "a Git LFS pointer.*git lfs pull",
    b"<!DOCTYPE html>\n<html><body>Sign in</body></html>": "an HTML page.*download it again",
    b"\n  <html>": "an HTML page",
    b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>': "an XML page",
    b"\x1f\x8b\x08\x00rest": "gzip: unpack it",
    b"GGUF\x03\x00\x00\x00": "a GGUF file",
    b"": "it is empty",
}


def state() -> dict[str, torch.Tensor]:
    return {f"layer.{name}": tensor.detach() for name, tensor in torch.nn.Linear(3, 5).named_parameters()}


def load(folder: Path) -> dict[str, torch.Tensor]:
    """The released names and tensors that a folder's files load as."""
    with torch.device("meta"):
        model = torch.nn.Linear(3, 5)
    load_weights(
        model, weight_files(folder, HUB_WEIGHT_FILES), KEY_MAP, dtype=torch.float32, device=torch.device("cpu")
    )
    return {f"layer.{name}": tensor for name, tensor in model.state_dict().items()}


def assert_equal(loaded: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key].to_dense()) for key in expected)


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# ---- indexes


@pytest.mark.parametrize("seed", range(12))
def test_the_index_decides_which_shard_holds_a_tensor(tmp_path, seed):
    """Whatever the order of the shards' names, and however many hold an older tensor of a name."""
    dice, weights = random.Random(seed), state()
    shards = [f"{letter}{seed}.safetensors" for letter in "abc"]
    weight_map = {key: dice.choice(shards) for key in weights}
    for shard in set(weight_map.values()):
        held = {key: x for key, x in weights.items() if weight_map[key] == shard}
        stale = {key: torch.full_like(x, 9) for key, x in weights.items() if key not in held and dice.random() < 0.8}
        # of other shapes, too
        stale = {key: x if dice.random() < 0.5 else x[:1] for key, x in stale.items()}
        save_file(held | stale, tmp_path / shard)
    write_index(tmp_path, weight_map)
    assert_equal(load(tmp_path), weights)
    assert read_shapes(weight_files(tmp_path, HUB_WEIGHT_FILES)) == {key: tuple(x.shape) for key, x in weights.items()}


def test_a_tensor_that_no_index_places(tmp_path):
    weights = state()
    save_file(weights, tmp_path / "a.safetensors")
    save_file(weights, tmp_path / "b.safetensors")
    write_index(tmp_path, {"layer.weight": "a.safetensors", "more": "b.safetensors"})
    with pytest.raises(CheckpointError, match=rf"b\.safetensors lacks tensors that {INDEX} gives it: more"):
        load(tmp_path)
    save_file({**weights, "more": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"b\.safetensors holds tensors that another file holds.*layer\.bias"):
        load(tmp_path)
    write_index(tmp_path, dict.fromkeys(weights, "a.safetensors"))
    save_file({**weights, "more": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="unexpected keys: more"):
        load(tmp_path)


@pytest.mark.parametrize("held", ['{"metadata": {}}', '{"weight_map": {}}', '{"weight_map": null}', '{"weight_map": []}',
                                  '{"weight_map": "a"}', "[]", "7", '"a"', "null", "{", "[" * 100_000, "\xff"])  # fmt: skip
def test_an_index_without_a_map(tmp_path, held):
    (tmp_path / INDEX).write_bytes(held.encode("latin-1"))
    with pytest.raises(CheckpointError, match=INDEX):
        load(tmp_path)


@pytest.mark.parametrize(
    "name", ["../elsewhere/a.safetensors", "sub/../../elsewhere/a.safetensors", "{}/elsewhere/a.safetensors", "..", "",
             None, 7, ["a.safetensors"]]
)  # fmt: skip
def test_an_index_names_files_in_its_own_folder(tmp_path, name):
    weights, folder, elsewhere = state(), tmp_path / "model", tmp_path / "elsewhere"
    (folder / "sub").mkdir(parents=True)
    elsewhere.mkdir()
    save_file(weights, elsewhere / "a.safetensors")
    name = name.format(tmp_path) if isinstance(name, str) else name
    write_index(folder, dict.fromkeys(weights, name))
    with pytest.raises(CheckpointError, match=f"{INDEX} names the file .* expected files in its own folder"):
        load(folder)


@pytest.mark.parametrize("name", ["a.safetensors", "sub/a.safetensors"])
def test_a_shard_may_be_a_link(tmp_path, name):
    """As the hub's cache has them."""
    weights, folder = state(), tmp_path / "model"
    (folder / name).parent.mkdir(parents=True)
    save_file(weights, tmp_path / "blob")
    (folder / name).symlink_to(tmp_path / "blob")
    write_index(folder, dict.fromkeys(weights, name))
    assert_equal(load(folder), weights)


# ---- files that are something else


@pytest.mark.parametrize("name", ["model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("start", IMPOSTORS)
def test_a_file_is_named_for_what_it_is(tmp_path, name, start):
    (tmp_path / name).write_bytes(start)
    with pytest.raises(CheckpointError, match=rf"(?s)cannot read .*/{name}.*{IMPOSTORS[start]}"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", INDEX, "pytorch_model.bin"])
def test_a_file_that_is_not_there_for_this_user(monkeypatch, tmp_path, name):
    (tmp_path / name).symlink_to("/nowhere/blobs/123")
    with pytest.raises(CheckpointError, match=rf"cannot read .*/{name}.*a link to nothing"):
        load(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(b"\x00" * 100)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    with pytest.raises(CheckpointError, match=rf"cannot read .*/{name}.*this user may not read it"):
        load(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=rf"cannot read .*/{name}.*a folder"):
        load(tmp_path)


# ---- torch.save


def test_older_and_repacked_torch_files_load(tmp_path):
    weights, path = state(), tmp_path / "pytorch_model.bin"
    torch.save(weights, path)
    assert_equal(load(tmp_path), weights)
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    assert_equal(load(tmp_path), weights)
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(path, "w", compression) as new:
            for name, part in parts.items():
                new.writestr(name, part)
        assert_equal(load(tmp_path), weights)
    for compression in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):  # which torch cannot unpack
        with zipfile.ZipFile(path, "w", compression) as new:
            for name, part in parts.items():
                new.writestr(name, part)
        with pytest.raises(CheckpointError, match=path.name):
            load(tmp_path)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_a_torch_file_that_is_cut_or_overwritten(tmp_path, is_zip, seed):
    """Whatever the bytes, it is the weights, other numbers in them, or an error that names the file."""
    path, dice = tmp_path / "pytorch_model.bin", random.Random(seed)
    torch.save(state(), path, _use_new_zipfile_serialization=is_zip)
    whole = bytearray(path.read_bytes())
    if seed % 2:
        whole = whole[: dice.randrange(len(whole))]
    else:
        start = dice.randrange(len(whole))
        whole[start : start + 8] = dice.randbytes(8)
    path.write_bytes(whole)
    try:
        loaded = load(tmp_path)
    except CheckpointError as error:
        message = str(error)
    else:
        message = f"{path.name}, loaded" if loaded.keys() == state().keys() else ""
    assert path.name in message and "weights_only" not in message


@pytest.mark.parametrize("nested", ["state_dict", "model", "module", "anything"])
@pytest.mark.parametrize("beside", [{}, {"epoch": 3}])
def test_a_nested_state_dict_is_named(tmp_path, nested, beside):
    torch.save({nested: state(), **beside}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin holds '{nested}' \((Ordered)?[dD]ict\).*expected"):
        load(tmp_path)


@pytest.mark.parametrize(
    "held",
    [
        *([torch.zeros(2)], torch.zeros(2), 7, None, "text", {0: torch.zeros(2)}, {"layer.weight": [0.0]}),
        {"layer.weight": torch.zeros(5, 3), "step": 7},
    ],
)
def test_a_torch_file_of_something_else(tmp_path, held):
    torch.save(held, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin holds .*: expected a dict of tensors by their names"
    ):
        load(tmp_path)


@pytest.mark.filterwarnings("ignore")  # torch's own, of sparse and quantized tensors
@pytest.mark.parametrize("odd", ["sparse", "csr", "quantized", "meta"])
def test_tensors_without_plain_values(tmp_path, odd):
    weights = state()
    x = weights["layer.weight"]
    weights["layer.weight"] = {
        "sparse": x.to_sparse,
        "csr": x.to_sparse_csr,
        "quantized": lambda: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "meta": lambda: x.to("meta"),
    }[odd]()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*(layer\.weight, which is|expected tensors alone)"):
        load(tmp_path)


# ---- what are no weights


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64]
)
def test_whole_numbers_are_no_weights(tmp_path, name, dtype):
    weights = state()
    weights["layer.weight"] = weights["layer.weight"].to(dtype)
    (save_file if name.endswith("safetensors") else torch.save)(weights, tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name} does not fit the model: dtypes: layer\.weight: .*quantized"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_floats_of_every_width_are_weights(tmp_path, name, dtype):
    weights = {key: x.to(dtype) for key, x in state().items()}
    (save_file if name.endswith("safetensors") else torch.save)(weights, tmp_path / name)
    assert_equal(load(tmp_path), {key: x.float() for key, x in weights.items()})


def test_whole_numbers_for_a_buffer_of_whole_numbers(tmp_path):
    """As batch norm counts its batches."""
    norm = torch.nn.BatchNorm1d(3)
    save_file({f"layer.{name}": x for name, x in norm.state_dict().items()}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        loaded = torch.nn.BatchNorm1d(3)
    paths = weight_files(tmp_path, HUB_WEIGHT_FILES)
    load_weights(loaded, paths, KEY_MAP, dtype=torch.float32, device=torch.device("cpu"))
    assert all(torch.equal(x, norm.state_dict()[name]) for name, x in loaded.state_dict().items())


def test_nan_is_a_warning_that_names_the_tensor_once(tmp_path, caplog):
    weights = state()
    weights["layer.weight"][2, 1:] = float("nan")
    weights["layer.bias"][0] = -float("inf")
    save_file(weights, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING, logger="unimm"):
        loaded = load(tmp_path)
    assert loaded["layer.weight"].isnan().sum() == 2
    assert len(caplog.messages) == 1 and "model.safetensors: NaN in: layer.weight;" in caplog.messages[0]
    caplog.clear()
    save_file(state(), tmp_path / "model.safetensors")
    load(tmp_path)
    assert not caplog.messages


def test_what_is_saved_again_has_no_stale_copy(tmp_path):
    """A shard's stale tensors are of no model: what was loaded is what is written."""
    weights = state()
    save_file({"layer.weight": weights["layer.weight"], "layer.bias": torch.zeros(5)}, tmp_path / "a.safetensors")
    save_file({"layer.bias": weights["layer.bias"]}, tmp_path / "b.safetensors")
    write_index(tmp_path, {"layer.weight": "a.safetensors", "layer.bias": "b.safetensors"})
    save_file(load(tmp_path), tmp_path / "again.safetensors")
    assert_equal(load_file(tmp_path / "again.safetensors"), weights)


@pytest.mark.parametrize("scale", [torch.ones(4), torch.ones(5, 1), torch.ones(5).half(), torch.ones(5)])
def test_scales_of_int8(tmp_path, scale):
    weights = state() | {"layer.weight": torch.arange(15, dtype=torch.int8).view(5, 3), "layer.weight_scale": scale}
    save_file(weights, tmp_path / "model.safetensors")
    if scale.dtype == torch.float32 and scale.shape == (5,):
        assert torch.equal(load(tmp_path)["layer.weight"], torch.arange(15.0).view(5, 3))
        return
    with pytest.raises(CheckpointError, match="model.safetensors holds layer.weight_scale .* expected a number in F32"):
        load(tmp_path)
