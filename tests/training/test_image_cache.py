"""A cache of one's own images as frozen encoders encode them: the same losses, nothing encoded twice, exact to resume."""

import dataclasses
import json

import pytest
import torch
from helpers.bagel_record_toys import recipe_numbers
from helpers.family_recipes import CODES
from helpers.trainer_toy import assert_same_files

from examples.data import make
from unimm.tokenizers.kl import AutoencoderKL, KLEncoder
from unimm.tokenizers.vq import VQModel
from unimm.training.config import CacheConfig, TrainConfig, from_mapping
from unimm.training.image_cache import ImageCache, use_image_cache
from unimm.training.tasks.base import build_task
from unimm.training.trainer import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("data")
    names = ("bagel-t2i", "bagel-edit", "bagel-vlm")
    return {name: getattr(make, f"make_{name.replace('-', '_')}")(folder) for name in names}


@pytest.fixture
def recipe(data):
    return from_mapping(TrainConfig, recipe_numbers(data, save_every=3, cache={}), where="here")


def run(recipe, out, **options):
    task = build_task(recipe)
    train(task, recipe, out, workers=0, **options)
    # the method is the class's again
    assert "moments" not in vars(task.model.vae)
    return [json.loads(line)["losses"] for line in (out / "log.jsonl").read_text().splitlines()]


def refuse(*args):
    pytest.fail("what is cached is encoded")


def test_a_second_run_encodes_nothing(recipe, tmp_path, monkeypatch):
    expected = run(dataclasses.replace(recipe, cache=None), tmp_path / "plain")
    cached = dataclasses.replace(recipe, cache=CacheConfig(folder=str(tmp_path / "cache")))
    found = run(cached, tmp_path / "first")
    for line, other in zip(found, expected, strict=True):
        # alone or in a batch: the last bits of sums
        assert line == pytest.approx(other, rel=1e-4)
    assert len(list((tmp_path / "cache/AutoencoderKL").glob("*.safetensors"))) == 1
    monkeypatch.setattr(KLEncoder, "forward", refuse)
    assert run(cached, tmp_path / "second") == found


def test_a_resumed_run_is_the_unbroken_one(recipe, tmp_path):
    run(recipe, tmp_path / "whole")
    run(dataclasses.replace(recipe, steps=3), tmp_path / "halves")
    run(recipe, tmp_path / "halves", resume=True)
    for name in ("model", "average"):
        assert_same_files(*(tmp_path / out / f"checkpoints/00000006/{name}.safetensors" for out in ("whole", "halves")))


def test_what_an_encoder_returns(tmp_path):
    """Whole ids of a VQ tokenizer, in memory and from files; of a folder that two processes fill."""
    vq = VQModel(CODES).eval()
    images = torch.rand(5, 3, 32, 32) * 2 - 1
    expected = vq.encode_ids(images)
    first, second = ImageCache(tmp_path, vq.encode_ids), ImageCache(tmp_path, vq.encode_ids, rank=1)
    assert torch.equal(first(images[:3]), expected[:3]) and torch.equal(first(images[[2, 0]]), expected[[2, 0]])
    assert torch.equal(second(images[2:]), expected[2:])
    assert (first.n_encoded, second.n_encoded) == (3, 3)
    first.flush()
    second.flush()
    both = ImageCache(tmp_path, refuse)
    assert torch.equal(both(images), expected) and len(both.places) == 5
    with pytest.raises(pytest.fail.Exception):
        both(images + 0.01)


def test_files_are_written_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr("unimm.training.image_cache.FILE_SIZE", 2)
    cache = ImageCache(tmp_path, lambda image: (image.mean((1, 2, 3)), image.amax((1, 2, 3))))
    images = torch.rand(5, 3, 2, 2)
    mean, most = cache(images)
    assert torch.equal(most, images.amax((1, 2, 3))) and mean.shape == (5,)
    assert len(list(tmp_path.iterdir())) == 2 and len(cache.new) == 1


def test_mistakes(recipe, data, tmp_path):
    cached = dataclasses.replace(recipe, steps=1, cache=CacheConfig(folder=str(tmp_path / "cache")))
    run(cached, tmp_path / "run")
    task = build_task(cached)
    torch.nn.init.ones_(next(task.model.vae.parameters()))
    with pytest.raises(ValueError, match=r"AutoencoderKL was made of other weights: delete it, or give `cache`"):
        train(task, cached, tmp_path / "other", workers=0)
    for module in task.model.modules():
        module.requires_grad_(isinstance(module, AutoencoderKL))
    task.model.vae.requires_grad_(True)
    with (
        pytest.raises(ValueError, match="got a cache for the task .*: leave `cache` out"),
        use_image_cache(task, cached, tmp_path, ranks=None),
    ):
        pass
    numbers = recipe_numbers(data)
    for changes, message in (
        ({"cache": {"samples": 10}}, "got cache.samples 10 and data"),
        ({"cache": {}, "data": None, "packing": None}, "got cache.samples None without data"),
    ):
        with pytest.raises(ValueError, match=message):
            from_mapping(TrainConfig, numbers | changes, where="here")
