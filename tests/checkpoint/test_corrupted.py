"""Corrupted checkpoints: whatever the bytes, an error that names the file and the tensor, and nothing is half loaded."""

import json
import os
import resource
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import unimm
from tests.helpers.corrupted import FILE, TENSORS, WHOLE, corpus
from unimm.checkpoint.keymap import renames
from unimm.checkpoint.load import HUB_WEIGHT_FILES, CheckpointError, load_weights, weight_files

KEY_MAP = renames({"layer.{}": "layer.{}", "norm.{}": "norm.{}"})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def toy() -> nn.Module:
    with torch.device("meta"):
        net = nn.Module()
        net.layer = nn.Linear(3, 5)
        net.norm = nn.RMSNorm(4)
    return net


def load(folder: Path, net: nn.Module) -> None:
    load_weights(net, weight_files(folder, HUB_WEIGHT_FILES), KEY_MAP, dtype=torch.float32, device=torch.device("cpu"))


def test_the_corpus(tmp_path):
    """Over 500 files in one process: no crash, no hang, no other kind of error."""
    cases = corpus()
    assert len(cases) >= 500
    net, wrong, found = toy(), [], Counter()
    (tmp_path / FILE).write_bytes(WHOLE)
    load(tmp_path, net)
    assert all(torch.equal(x, TENSORS[name].float()) for name, x in net.state_dict().items())
    for i, case in enumerate(cases):
        folder, net = tmp_path / str(i), toy()
        folder.mkdir()
        case.make(folder)
        start = time.thread_time()
        try:
            load(folder, net)
        except CheckpointError as error:
            found["refused"] += 1
            message = str(error)
            if not all(name in message for name in case.named):
                wrong.append(f"{case.what}: does not name {case.named}: {message[:200]}")
            if len(message) > 2000 or not all(p.is_meta for p in net.parameters()):
                wrong.append(f"{case.what}: a message of {len(message)} characters, or a model that is half loaded")
        except Exception as error:  # noqa: BLE001 - any other kind is what the test is for
            wrong.append(f"{case.what}: {type(error).__name__}: {error!s:.100}")
        else:
            found["loaded"] += 1
            same = all(torch.equal(x, TENSORS[name].float()) for name, x in net.state_dict().items())
            wrong += [] if same and case.may_load else [f"{case.what}: loaded"]
        if time.thread_time() - start > 2:
            wrong.append(f"{case.what}: took {time.thread_time() - start:.1f} s")
        shutil.rmtree(folder)
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong[:40])
    assert found["refused"] > 0.8 * len(cases)


NUMBERS = (10**6, 10**12, 10**30, -1, 0, 2.5, 1e308, "7", None, [], {}, True)


@pytest.mark.parametrize("name", ["bagel-nano", "janus-nano"])
def test_absurd_numbers_in_configs(name, tmp_path):
    """Every number of a config, in turn, made absurd: an error that names the folder, before memory is asked for."""
    unimm.load(name).save_pretrained(tmp_path)
    file = tmp_path / ("llm_config.json" if name == "bagel-nano" else "config.json")
    config = json.loads(file.read_text())
    part = config if name == "bagel-nano" else config["language_config"]
    keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    family = getattr(unimm, {"bagel-nano": "Bagel", "janus-nano": "Janus"}[name])
    wrong = []
    for key in keys:
        before = part[key]
        for number in NUMBERS:
            part[key] = number
            file.write_text(json.dumps(config))
            try:
                family.from_pretrained(tmp_path)
            except (ValueError, MemoryError) as error:
                wrong += [] if str(tmp_path) in str(error) else [f"{key} {number!r}: {error!s:.150}"]
            else:
                wrong.append(f"{key} {number!r}: loaded")
        part[key] = before
    assert not wrong, "\n".join(wrong)


def test_a_disk_that_fills_leaves_the_old_files_whole(tmp_path):
    """Whichever file meets the limit: that of a process on the size of its files, which is met as a full disk is."""
    model = unimm.load("janus-nano")
    model.save_pretrained(tmp_path / "a", max_shard_size="300KB")
    before = files(tmp_path / "a")
    sizes = {len(contents) for contents in before.values()}
    limits = [*(size - 1 for size in sorted(sizes)[-4:]), 100_000, 10_000]
    for limit in limits:
        if not (child := os.fork()):
            code = 1
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                model.save_pretrained(tmp_path / "a", max_shard_size="300KB")
            except OSError as error:
                code = 0 if "safetensors" in str(error.filename) else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0, limit
        assert files(tmp_path / "a") == before
