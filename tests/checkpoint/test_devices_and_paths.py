"""Devices that are not there, and paths that lead nowhere: refused at once, in words, and nobody is asked."""

from pathlib import Path

import pytest
import torch

import unimm
from unimm.checkpoint import hub
from unimm.checkpoint.devices import parse_device


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setattr(hub, "_download", lambda *args, **options: pytest.fail("asked the hub"))


@pytest.mark.parametrize("device", ["gpu", "auto", "meta", "cuda:99", "cuda:-2", "", None, 99, 1.5, [], {}], ids=repr)
def test_a_device_that_is_not_there(device):
    for call in (
        lambda: parse_device(device),
        lambda: unimm.load("bagel-nano", device=device),
        lambda: unimm.load("deepseek-ai/Janus-Pro-7B", device=device),
        lambda: unimm.Janus.from_pretrained("deepseek-ai/Janus-Pro-7B", device=device),
    ):
        with pytest.raises(ValueError, match=r"got device .*expected cpu, or cuda"):
            call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, torch.device("cuda")], ids=repr)
def test_no_gpu(device):
    with pytest.raises(ValueError, match=r"got device .*it sees 0\)"):
        unimm.load("janus-nano", device=device)


def test_devices():
    assert parse_device("cpu") == parse_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", ["runs/release", "release", "a/b/c", "janus-nano", "./x", "owner/name"])
def test_a_path_is_a_folder(name, tmp_path, monkeypatch):
    """Also where its name is a hub id's, or a bundled model's."""
    monkeypatch.chdir(tmp_path)
    for load in (unimm.load, unimm.Janus.from_pretrained, hub.resolve):
        with pytest.raises(ValueError, match="no folder .*expected a model's"):
            load(Path(name))


@pytest.mark.parametrize("name", [None, 5, b"janus-nano", True, ["janus-nano"]], ids=str)
def test_what_names_no_model(name):
    with pytest.raises(ValueError, match=r"got .* for a model: expected a folder"):
        unimm.load(name)
    with pytest.raises(ValueError, match=r"got .* for a model: expected a folder"):
        unimm.Janus.from_pretrained(name)


@pytest.mark.parametrize("components", [5, [], "vae", {"vae": 5}, {"vae": ""}, {"vae": True}, {1: "x"}], ids=str)
def test_components_that_are_none(components):
    with pytest.raises(ValueError, match="got .*component"):
        unimm.JanusFlow.from_pretrained("janusflow-nano", components=components)


def test_a_name_of_two_parts_that_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "file").touch()
    with pytest.raises(ValueError, match="got the file runs/file: expected the folder"):
        unimm.load("runs/file")
