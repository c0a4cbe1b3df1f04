"""A cache of what frozen parts compute: the same losses as without it, every sample once an epoch, exact to resume."""

import dataclasses
import json
import pickle
import random

import pytest
import torch
from helpers import janus_recipes

from tests.training.test_janusflow_training import recipe as janusflow_recipe  # noqa: F401
from tests.training.test_metaquery_training import recipe as metaquery_recipe  # noqa: F401
from tests.training.test_uniworld_training import recipe as uniworld_recipe  # noqa: F401
from unimm.training.cache import SHARD_SIZE, CacheShard, FeatureCache, epoch_order, use_feature_cache
from unimm.training.config import CacheConfig
from unimm.training.losses import mean_losses
from unimm.training.tasks import janus, janusflow
from unimm.training.tasks.base import build_task
from unimm.training.trainer import Trainer, train

FROZEN = {"metaquery": ["queries"], "uniworld": ["auxiliary.siglip."]}
STEPS = {"schedule": "constant", "steps": 4, "save_every": 2, "sample_every": 4, "log_every": 1}


@pytest.fixture(params=FROZEN)
def cached(request, tmp_path):
    """A recipe with a cache of one shard."""
    recipe = request.getfixturevalue(f"{request.param}_recipe")
    options = {**recipe.options, "frozen": FROZEN[request.param]}
    cache = CacheConfig(samples=100, folder=str(tmp_path / "cache"))
    return dataclasses.replace(recipe, **STEPS, options=options, cache=cache)


def trained_weights(recipe, out, **options):
    """The run's averaged weights."""
    task = build_task(recipe)
    train(task, recipe, out, workers=0, **options)
    *_, folder = sorted((out / "checkpoints").glob("*"))
    return (folder / "average.safetensors").read_bytes(), task


def test_losses_are_those_of_the_samples_themselves(cached, tmp_path):
    task = build_task(cached)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in task.model.denoiser.parameters():  # a denoiser from scratch says nothing
            p.add_(0.1 * torch.randn_like(p))
    inputs = task.cache_inputs(0)
    fresh = task.batch
    use_feature_cache(task, cached, tmp_path, workers=0)
    batch = pickle.loads(pickle.dumps(task.batch))(3)  # noqa: S301, as for a worker process
    indices = task.batch.cache.batch_indices(3, cached.batch_size, cached.seed)
    assert max(indices) < 100
    with torch.no_grad():
        encoded = task.encode(inputs)
        records = task.cache_records(inputs)
        for place, index in enumerate(indices):
            latents = encoded.latents[index]
            assert torch.equal(batch.samples.latents[place], latents)
            assert torch.equal(records[index]["latents"], latents)
        found = mean_losses(task.losses(batch))
        # the same samples and noise, encoded in the step
        task.batch = fresh
        whole = dataclasses.replace(batch, samples=inputs, sample_indices=torch.tensor(indices).repeat_interleave(2))
        expected = mean_losses(task.losses(whole))
    assert found.keys() == expected.keys()
    for name, loss in found.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-4, atol=1e-5)


def test_a_run_goes_on_exactly(cached, tmp_path):
    whole, task = trained_weights(cached, tmp_path / "whole")
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1
    half = dataclasses.replace(cached, steps=2)
    trained_weights(half, tmp_path / "halves")
    resumed, _ = trained_weights(cached, tmp_path / "halves", resume=True)
    assert whole == resumed
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4] and log[0]["losses"].keys() <= set(task.loss_names)


def test_a_run_computes_nothing_that_is_cached(cached, tmp_path):
    trained_weights(dataclasses.replace(cached, steps=1), tmp_path / "first")
    task = build_task(cached)
    task.encode = lambda samples: pytest.fail("what is cached is computed")
    train(task, cached, tmp_path / "second", workers=0)


@pytest.fixture(params=["janus", "janusflow"])
def cached_chat(request, tmp_path, monkeypatch):
    """A recipe of Janus or JanusFlow with a cache of one shard, of drawings, edits, questions and facts."""
    module = {"janus": janus, "janusflow": janusflow}[request.param]
    monkeypatch.setattr(module, "train_tokenizer", janus_recipes.text_model)
    if request.param == "janus":
        folder = tmp_path / "parts"
        folder.mkdir()
        recipe = janus_recipes.small("janus-nano", janus_recipes.parts(folder))
    else:
        recipe = request.getfixturevalue("janusflow_recipe")
    tasks = {"draw.one": 2, "edit.recolour": 2, "answer.count": 2, "caption": 1, "fact.forward": 1}
    options = {**recipe.options, "tasks": tasks, "dropout": 0.2}
    cache = CacheConfig(samples=100, folder=str(tmp_path / "cache"))
    return dataclasses.replace(recipe, **STEPS, options=options, batch_size=8, cache=cache)


def test_conversations_have_the_losses_of_their_examples(cached_chat, tmp_path):
    task = build_task(cached_chat)
    fresh = task.batch
    examples, _ = task.cache_inputs(0)
    use_feature_cache(task, cached_chat, tmp_path, workers=0)
    step = 3
    batch = pickle.loads(pickle.dumps(task.batch))(step)  # noqa: S301, as for a worker process
    indices = task.batch.cache.batch_indices(step, 8, cached_chat.seed)
    direct = fresh.batch([examples[i] for i in indices], random.Random(f"{cached_chat.seed}/{step}"))
    if isinstance(task, janusflow.JanusFlowTask):
        direct = dataclasses.replace(direct, latents=batch.latents)  # whose noise is the shard's
    assert batch.pack.und_images.encoded and not direct.pack.und_images.encoded
    with torch.no_grad():
        found = mean_losses(task.losses(batch))
        expected = mean_losses(task.losses(direct))
    assert found.keys() == expected.keys() and {"draw", "edit", "answer"} <= found.keys()
    for name, loss in found.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tasks", [{"caption": 1, "fact.forward": 1}, {"fact.forward": 1}, {"draw.one": 1}])
def test_conversations_need_neither_images_nor_targets(cached_chat, tmp_path, tasks):
    recipe = dataclasses.replace(cached_chat, options={**cached_chat.options, "tasks": tasks})
    task = build_task(recipe)
    use_feature_cache(task, recipe, tmp_path, workers=0)
    batch = task.batch(0)
    assert (batch.pack.und_images is None) == ("caption" not in tasks)
    assert (batch.pack.gen_images is None) == ("draw.one" not in tasks)
    assert mean_losses(task.losses(batch)).keys() == {name.split(".")[0] for name in tasks}


def test_a_run_of_conversations_goes_on_exactly(cached_chat, tmp_path):
    whole, _ = trained_weights(cached_chat, tmp_path / "whole")
    trained_weights(dataclasses.replace(cached_chat, steps=2), tmp_path / "halves")
    resumed, _ = trained_weights(cached_chat, tmp_path / "halves", resume=True)
    assert whole == resumed
    recipe = dataclasses.replace(cached_chat, options={**cached_chat.options, "frozen": []})
    with pytest.raises(ValueError, match=r"a vision encoder that is trained, .* add `vision\.` to frozen"):
        use_feature_cache(build_task(recipe), recipe, tmp_path, workers=0)


def test_only_what_is_missing_is_computed(cached, tmp_path, monkeypatch):
    recipe = dataclasses.replace(cached, cache=dataclasses.replace(cached.cache, samples=SHARD_SIZE + 1))
    task = build_task(recipe)
    made = []
    compute = type(task).cache_records
    monkeypatch.setattr(type(task), "cache_records", lambda self, inputs: made.append(1) or compute(self, inputs))
    use_feature_cache(task, recipe, tmp_path, workers=0)
    assert len(made) == 2
    kept = [path.read_bytes() for path in sorted((tmp_path / "cache").glob("*.safetensors"))]
    (tmp_path / "cache" / "000001.safetensors").unlink()
    use_feature_cache(build_task(recipe), recipe, tmp_path, workers=0)
    assert len(made) == 3
    assert kept == [path.read_bytes() for path in sorted((tmp_path / "cache").glob("*.safetensors"))]


def test_a_cache_of_other_weights_or_samples_is_refused(cached, tmp_path):
    use_feature_cache(build_task(cached), cached, tmp_path, workers=0)
    faster = dataclasses.replace(cached, lr=1e-2, steps=100, batch_size=3)
    use_feature_cache(build_task(faster), faster, tmp_path, workers=0)
    other = build_task(cached)
    with torch.no_grad():
        other.model.mllm.decoder.embed.weight[0] += 1
    with pytest.raises(ValueError, match="was made of other weights: delete it, or give `cache` another folder"):
        use_feature_cache(other, cached, tmp_path, workers=0)
    seeded = dataclasses.replace(cached, seed=1)
    with pytest.raises(ValueError, match="was made of other samples"):
        use_feature_cache(build_task(seeded), seeded, tmp_path, workers=0)


def test_a_part_that_is_trained_is_not_cached(cached, tmp_path):
    recipe = dataclasses.replace(cached, options={**cached.options, "frozen": []})
    with pytest.raises(ValueError, match=r"got a cache, and .* trained, .* to frozen"):
        use_feature_cache(build_task(recipe), recipe, tmp_path, workers=0)
    assert not list((tmp_path / "cache").glob("*.safetensors")), "refused before anything is computed"


def test_a_task_without_frozen_parts_has_no_cache(cached, tmp_path):
    class Bare:
        name, loss_names, batch = "bare", ("draw",), None

    with pytest.raises(ValueError, match="which caches nothing: leave `cache` out"):
        use_feature_cache(Bare(), cached, tmp_path, workers=0)


def test_an_epoch_has_every_sample_once_and_its_own_order():
    cache = FeatureCache(folder=None, n_samples=30)
    seen = [i for step in range(15) for i in cache.batch_indices(step, 4, seed=0)]
    assert sorted(seen[:30]) == sorted(seen[30:]) == list(range(30)) and seen[:30] != seen[30:]
    assert epoch_order(30, 0, 0) != epoch_order(30, 0, 1) == epoch_order(30, 0, 1)


def test_records_of_any_lengths_come_back(tmp_path):
    records = [{"a": torch.randn(n, 3), "b": torch.tensor([n % 2 == 0])} for n in (2, 0, 5)]
    shard = CacheShard.from_records(records)
    for place, record in enumerate(records):
        found = shard.record(place)
        assert found.keys() == record.keys() and all(torch.equal(found[name], record[name]) for name in record)


def test_trainer_is_not_needed_to_read(cached, tmp_path):
    """What a worker process gets is the folder's name, not its tensors."""
    task = build_task(cached)
    use_feature_cache(task, cached, tmp_path, workers=0)
    assert task.batch.cache[99]["latents"].shape == task.batch(0).noise.shape[1:]
    assert len(pickle.dumps(task.batch.cache)) < 300
    assert Trainer(task, cached, torch.device("cpu")).params
