"""Training MetaQuery on the little world: batches, dropped conditions, what learns and what does not, steps, the
release."""

import dataclasses
import functools
import pickle
import random

import pytest
import torch
from helpers import metaquery_toys as toys
from helpers.adapters import move_trained, slope_against_gradient
from helpers.flops import check_counts
from helpers.metaquery_training_toys import DENOISER
from helpers.paths import RECIPES
from PIL import Image

from unimm.adapters.config import AdapterConfig
from unimm.data.image_text_pairs import RECONSTRUCTION
from unimm.data.shapes import example
from unimm.generation.flow import shift_timesteps
from unimm.generation.text_sampling import TextSampling
from unimm.models.metaquery.config import DEFAULT_SYSTEM_PROMPT
from unimm.models.metaquery.model import MetaQuery
from unimm.processing.images.io import tensor_to_pil
from unimm.sequence.packing import pack_sequences
from unimm.training.alignment import resize_features
from unimm.training.cache import use_feature_cache
from unimm.training.config import CacheConfig, from_mapping, read_recipe
from unimm.training.init import train_tokenizer
from unimm.training.losses import mean_losses
from unimm.training.optim import Optimizers
from unimm.training.tasks.base import build_task
from unimm.training.tasks.metaquery_data import MetaQueryEncoded
from unimm.training.tasks.metaquery_records import MetaQueryRecordConfig
from unimm.training.trainer import Trainer, train

TASKS = {"draw.one": 2, "draw.two": 1, "edit.recolour": 2, "reason.math1": 1, RECONSTRUCTION: 1}


@functools.cache
def words():
    return train_tokenizer(400, lines=2000, special_tokens=toys.SPECIAL_TOKENS)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The recipe with small numbers, around an untrained MLLM and autoencoder."""
    folder, full = tmp_path_factory.mktemp("trained"), read_recipe(RECIPES / "metaquery-nano-queries.yaml")
    config = full.model["config"] | dict(num_metaqueries=5, connector_num_hidden_layers=1)
    config |= {"generation": config["generation"] | {"steps": 2}}
    model = {"config": config, "denoiser": DENOISER, "scheduler": full.model["scheduler"]}
    paths = dict(mllm=str(toys.save_mllm(folder / "reader", words())), dcae=str(toys.save_dcae(folder / "dcae")))
    options = dict(full.options) | paths | dict(compile=False, tasks=TASKS, timesteps_per_image=2)
    return dataclasses.replace(
        full, model=model, options=options, batch_size=9, precision="float32", warmup_steps=0, lr=3e-3
    )


@pytest.fixture(scope="module")
def objective(recipe):
    return build_task(recipe)


def dropping(objective, part: float):
    """The batches with another part of their conditions dropped."""
    return dataclasses.replace(objective.batch, builder=dataclasses.replace(objective.batch.builder, dropout=part))


@pytest.mark.parametrize(("name", "warmup", "batch"), [("pretrain", 5000, 32), ("instruct", 2000, 1)])
def test_the_recipes_hold_the_released_numbers(name, warmup, batch):
    """docs/originals/metaquery.md, "Stages and numbers", the row of Qwen2.5-VL-3B."""
    full = read_recipe(RECIPES / f"metaquery-{name}.yaml")
    assert (full.lr, full.lr * full.min_lr_ratio, full.warmup_steps, full.batch_size) == (
        1e-4,
        pytest.approx(1e-5),
        warmup,
        batch,
    )
    assert (full.betas, full.eps, full.weight_decay, full.max_grad_norm, full.seed) == ((0.9, 0.95), 1e-8, 0.1, 0.5, 42)
    config = full.model["config"]
    assert (config["num_metaqueries"], config["connector_num_hidden_layers"], config["system_prompt"]) == (
        256,
        24,
        DEFAULT_SYSTEM_PROMPT,
    )
    assert from_mapping(MetaQueryRecordConfig, full.options, where="options").dropout == 0.1


def test_batches_are_a_function_of_seed_and_step_without_the_model(objective):
    worlds = pickle.loads(pickle.dumps(objective.batch))  # noqa: S301, as for a worker process
    a, b, other = worlds(3), objective.batch(3), worlds(4)
    for name in ("noise", "times", "sample_indices"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert torch.equal(a.samples.queries.prompts.ids, b.samples.queries.prompts.ids)
    assert torch.equal(a.samples.images, b.samples.images) and not torch.equal(a.noise, other.noise)
    assert not torch.equal(a.samples.images, dataclasses.replace(worlds, seed=1)(3).samples.images)


def test_a_batch_holds_every_kind_and_fits_its_losses(objective):
    batch = objective.batch(0)
    n = objective.model.config.n_queries
    samples = batch.samples
    assert set(samples.image_kinds.tolist()) == {0, 1, 2} and batch.sample_indices.tolist() == [
        i // 2 for i in range(18)
    ]
    assert samples.queries.queries.layout.lengths == (n + 3,) * 9
    assert len(samples.queries.prompts.layout.position_ids) % 256 == 0 and len(samples.images) == 9
    losses = mean_losses(objective.losses(batch))
    assert set(losses) == {"draw", "edit", "reason"} and all(torch.isfinite(loss) for loss in losses.values())


def test_times_are_whole_thousandths_and_even(objective):
    unshifted = dataclasses.replace(
        objective.batch, builder=dataclasses.replace(objective.batch.builder, timestep_shift=1.0)
    )
    times = 1000 * torch.cat([unshifted(step).times for step in range(20)])
    torch.testing.assert_close(
        objective.batch(3).times, shift_timesteps(unshifted(3).times, objective.batch.builder.timestep_shift)
    )
    assert (times - times.round()).abs().max() < 1e-3 and times.round().min() >= 1 and times.max() <= 1000
    assert abs(times.mean() - 500) < 3 * 1000 / (12 * len(times)) ** 0.5


def test_texts_and_images_are_dropped_as_published(objective):
    def kinds(task, p):
        found, one = [], objective.batch.pairs.from_example(example(task, 1))
        for i in range(400):
            items = dropping(objective, p).builder.sample(one, random.Random(i)).parts
            look = [item.tokens for item in items if item.kind == "und_image"]
            # a black image is one colour in every channel
            dark = bool(look) and all(x.unique().numel() == 3 for x in look)
            found.append((bytes(one.text, "utf8") not in said(objective, items), dark))
        return {kind: found.count(kind) / 400 for kind in set(found)}

    # four deviations of 400 draws
    near = functools.partial(pytest.approx, abs=4 * (0.2 * 0.8 / 400) ** 0.5)
    assert kinds("draw.one", 0.2) == {(True, False): near(0.2), (False, False): near(0.8)}
    thirds = {(True, False): near(0.2), (True, True): near(0.2), (False, True): near(0.2), (False, False): near(0.4)}
    assert kinds("edit.recolour", 0.2) == thirds


def said(objective, items) -> bytes:
    vocab = objective.model.config.mllm.decoder.vocab_size
    ids = [one for item in items for one in item.ids.tolist() if one < vocab]
    return bytes(objective.model.mllm.tokenizer.decode(ids), "utf8")


def test_again_shows_the_image_that_it_draws(objective):
    one = objective.batch.pairs.training_pair(RECONSTRUCTION, 0, random.Random(0))
    assert one.text == "" and one.images == (one.target,) and one.kind == "edit"
    with pytest.raises(ValueError, match=r"the task caption, which generates no image: the MLLM is frozen"):
        objective.batch.pairs.training_pair("caption", 0, random.Random(0))


def test_only_new_rows_connector_and_denoiser_learn_and_old_rows_keep_every_bit(recipe):
    objective = build_task(recipe)
    trainer = Trainer(objective, recipe, torch.device("cpu"))
    before = {name: x.clone() for name, x in objective.model.state_dict().items()}
    for step in range(3):
        trainer.update(objective.batch(step))
    after = objective.model.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in same} <= {"mllm", "vae", "denoiser"}
    assert all(name in same for name in before if name.startswith(("mllm.", "vae.")))
    # the velocity begins as 0, so only the way out learns in the first step; all else has moved by the third
    assert "queries" not in same and not any(name.startswith(("connector.", "denoiser.out")) for name in same)


def groups_of(model, recipe):
    return [group for one in Optimizers(model, recipe).optimizers.values() for group in one.param_groups]


def test_weight_decay_leaves_the_queries_alone(recipe):
    objective = build_task(recipe)
    groups = groups_of(objective.model, recipe)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert (
        decay[id(objective.model.queries)] == 0
        and decay[id(objective.model.connector.fc1.weight)] == recipe.weight_decay
    )
    undone = dataclasses.replace(recipe, no_weight_decay=())
    groups = groups_of(objective.model, undone)
    assert next(g["weight_decay"] for g in groups if any(p is objective.model.queries for p in g["params"]))


@pytest.mark.parametrize("part", ["queries", "connector.", "denoiser."])
def test_each_part_can_be_frozen(recipe, part):
    objective = build_task(dataclasses.replace(recipe, options=dict(recipe.options) | {"frozen": [part]}))
    left = {name.split(".")[0] for name, p in objective.model.named_parameters() if p.requires_grad}
    assert left == {"queries", "connector", "denoiser"} - {part.rstrip(".")}


def test_a_few_steps_learn_and_the_release_draws_and_answers(recipe, tmp_path):
    few = dataclasses.replace(
        recipe, steps=15, save_every=15, sample_every=15, log_every=5, no_weight_decay=("queries",)
    )
    objective = build_task(few)
    first = sum(mean_losses(objective.losses(objective.batch(100))).values())
    assert train(objective, few, tmp_path / "run", workers=0) == 15
    assert sum(mean_losses(objective.losses(objective.batch(100))).values()) < 0.9 * first
    model = MetaQuery.from_pretrained(tmp_path / "run" / "release")
    drawn = model.generate(["a red circle", "a blue square"], seed=1)
    assert [image.size for image in drawn.images] == [(64, 64)] * 2
    assert model.generate("make it red", images=drawn.image, steps=1).image.size == (64, 64)
    assert isinstance(
        model.understand(Image.new("RGB", (64, 64)), "what is it?", text_sampling=TextSampling(max_tokens=4)), str
    )
    assert torch.equal(model.mllm.decoder.embed.weight, objective.model.mllm.decoder.embed.weight.bfloat16().float())


def test_a_run_starts_from_a_release(recipe, tmp_path):
    source = build_task(recipe)
    with torch.no_grad():
        for p in source.model.parameters():
            p.add_(0.01 * torch.randn_like(p)).copy_(p.bfloat16())  # as it is released
    source.save(tmp_path)
    trainer = Trainer(build_task(dataclasses.replace(recipe, seed=1)), recipe, torch.device("cpu"))
    trainer.init_from(str(tmp_path))
    found = trainer.model.state_dict()
    assert all(torch.equal(found[name], x) for name, x in source.model.state_dict().items())
    assert all(torch.equal(found[name], x) for name, x in trainer.ema.weights.items()) and trainer.step == 0
    with pytest.raises(ValueError, match="whose tokenizer is not the recipe's"):
        trainer.init_from("metaquery-nano")
    with pytest.raises(
        ValueError, match="expected a run, one of its checkpoints, or a release: no model 'metaquery-nan'"
    ):
        trainer.init_from("metaquery-nan")
    trainer.model.mllm.tokenizer = train_tokenizer(400, special_tokens=("<|im_start|>",))
    with pytest.raises(ValueError, match="whose tokenizer is not the recipe's"):
        trainer.init_from(str(tmp_path))


@pytest.mark.parametrize("frozen", [(), ("queries",), ("connector.", "denoiser.blocks.0.")])
def test_flops_are_those_that_torch_counts(recipe, frozen):
    objective = build_task(dataclasses.replace(recipe, options=dict(recipe.options) | {"frozen": list(frozen)}))
    check_counts(objective, objective.batch(0))


def test_an_adapter_of_the_mllm_gets_its_whole_gradient(recipe):
    """Through the prompt and its images, which run without gradients where the MLLM is frozen."""
    task = build_task(recipe)
    move_trained(task.model)  # the velocity is 0 where training begins, and so are gradients before it
    task.model.add_adapter(AdapterConfig(rank=2, alpha=4, targets=("mllm_vision",)))
    move_trained(task.model, std=0.2)
    batch = task.batch(0)
    # differences in float32, of a loss about 1, a hundredth apart
    slope = slope_against_gradient(
        task.model, lambda: torch.stack([x.total for x in task.losses(batch).values()]).sum()
    )
    assert slope == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("targets", [("mllm.attention",), ("mllm.mlp", "mllm_vision.out", "connector.out")])
def test_flops_of_adapters_are_those_that_torch_counts(recipe, targets):
    """Of the MLLM's, for which the prompts have gradients, too."""
    objective = build_task(recipe)
    objective.model.add_adapter(AdapterConfig(rank=2, alpha=4, targets=targets))
    check_counts(objective, objective.batch(0))


# ---- alignment with what the MLLM's vision encoder sees in the target


def aligned(recipe, block: int = 1, **options):
    """The recipe with hidden states aligned behind a block."""
    options = {**recipe.options, "alignment_block": block, **options}
    return dataclasses.replace(recipe, options=options, loss_weights={**recipe.loss_weights, "align": 0.5})


def test_alignment_is_the_distance_of_each_tokens_state_from_its_targets_feature(recipe):
    objective = build_task(aligned(recipe))
    batch = objective.batch(0)
    model = objective.model
    move_trained(model)
    seen = []
    handle = model.denoiser.blocks[0].register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        found = objective.losses(batch)["align"]
    handle.remove()
    n_tokens = seen[0].shape[1]
    expected = []
    for i, sample in enumerate(batch.sample_indices.tolist()):
        image = tensor_to_pil(batch.samples.images[sample])
        parts = model.mllm.processor.to_parts([image])
        with torch.no_grad():
            features = model.mllm.image_features(pack_sequences([parts]).und_images).float()
            predicted = model.alignment_head(seen[0][i])
        features = resize_features(features[None], objective.token_grid(batch))[0]
        expected.append(1 - torch.nn.functional.cosine_similarity(predicted, features, dim=-1))
    assert found.count == objective.loss_counts(batch)["align"] == len(batch.noise) * n_tokens
    torch.testing.assert_close(found.total, torch.cat(expected).sum(), rtol=1e-4, atol=1e-4)


def test_alignment_trains_its_head_and_leaves_no_trace_in_a_release(recipe, tmp_path):
    few = dataclasses.replace(aligned(recipe), steps=1, save_every=1, sample_every=9, log_every=1)
    objective = build_task(few)
    start = objective.model.alignment_head[0].weight.detach().clone()
    assert train(objective, few, tmp_path, workers=0) == 1
    assert not torch.equal(start, objective.model.alignment_head[0].weight)
    assert not hasattr(MetaQuery.from_pretrained(tmp_path / "release"), "alignment_head")


def test_a_cache_holds_the_features_that_hidden_states_are_aligned_with(recipe, tmp_path):
    recipe = aligned(recipe, frozen=["queries"])
    objective = build_task(recipe)
    batch = objective.batch(0)
    with torch.no_grad():
        records = objective.cache_records(batch.samples)
        features = objective.encode(batch.samples).target_features
    assert torch.equal(torch.stack([one["target_features"] for one in records]), features)
    cached = build_task(recipe)
    use_feature_cache(cached, dataclasses.replace(recipe, cache=CacheConfig(samples=8)), tmp_path, workers=0)
    read = cached.batch(0)
    assert isinstance(read.samples, MetaQueryEncoded) and torch.isfinite(mean_losses(cached.losses(read))["align"])
    check_counts(objective, batch)
    check_counts(cached, read)


def test_an_aligned_block_that_the_denoiser_has_not_is_refused(recipe):
    n = len(build_task(recipe).model.denoiser.blocks)
    with pytest.raises(ValueError, match=f"got alignment_block {n + 1} for {n} blocks: expected one of them"):
        build_task(aligned(recipe, n + 1))
