"""The nano recipes: what they read, what their batches hold, and that a few steps teach something."""

import copy
import dataclasses
import json
import random

import pytest
import torch
from helpers.flops import check_counts
from helpers.paths import RECIPES
from safetensors.torch import save_file

from unimm.adapters.config import AdapterConfig
from unimm.data.batching import sample_tasks
from unimm.data.shapes import HELD_OUT, TASKS, example
from unimm.encoders.siglip import SiglipNaViT, navit_config_from_json
from unimm.nn.compiled import compile_experts
from unimm.sequence.parts import IGNORE_INDEX
from unimm.tokenizers.kl import AutoencoderKL, AutoencoderKLConfig
from unimm.training.config import read_recipe
from unimm.training.init import train_tokenizer
from unimm.training.losses import mean_losses
from unimm.training.tasks.bagel import BAGEL_TOKENS, IMAGE_KINDS, TEXT_KINDS
from unimm.training.tasks.base import build_task
from unimm.training.tasks.vit import IGNORED
from unimm.training.trainer import Trainer

SMALL_LLM = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48
)
SMALL_VIT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """bagel-nano's recipe with small numbers, around an untrained VAE and ViT."""
    folder, full = tmp_path_factory.mktemp("trained"), read_recipe(RECIPES / "bagel-nano.yaml")
    model = {name: dict(part) for name, part in full.model.items()}
    model["llm"] |= SMALL_LLM
    model["vit"] |= SMALL_VIT
    vae = AutoencoderKLConfig(
        width=32,
        channel_multipliers=(1, 1, 1, 1),
        n_res_blocks=1,
        latent_channels=4,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    save_file(AutoencoderKL(vae).state_dict(), folder / "ae.safetensors")
    (folder / "vae_config.json").write_text(json.dumps(vae.to_json()))
    save_file(
        SiglipNaViT(navit_config_from_json(model["vit"])).state_dict(),
        folder / "vision.safetensors",
    )
    options = dict(full.options) | dict(vae=str(folder), vit=str(folder), compile=False)
    return dataclasses.replace(full, model=model, options=options, batch_size=104, precision="float32")


@pytest.fixture(scope="module")
def objective(recipe):
    return build_task(recipe)


def test_every_recipe_is_read():
    names = {path.stem: read_recipe(path).task for path in RECIPES.glob("*.yaml")}
    assert names == {
        "bagel-nano": "bagel",
        "bagel-knowledge": "bagel",
        "bagel-nano-finetune": "bagel",
        "bagel-nano-knowledge": "bagel",
        "bagel-nano-grpo": "bagel_grpo",
        "bagel-alignment": "bagel",
        "bagel-pretrain": "bagel",
        "bagel-continue": "bagel",
        "bagel-sft": "bagel",
        "bagel-finetune": "bagel",
        "bagel-lora": "bagel",
        "bagel-nano-vae": "kl_vae",
        "bagel-nano-vit": "vit",
        "emu3-nano": "emu3",
        "emu3-nano-finetune": "emu3",
        "emu3-sft": "emu3",
        "emu3-nano-vq": "emu3_vq",
        "janus-nano": "janus",
        "janus-nano-finetune": "janus",
        "janus-nano-grpo": "janus_grpo",
        "janus-nano-semantic": "semantic_vq",
        "janus-nano-stage1": "janus",
        "janus-nano-stage2": "janus",
        "janus-nano-stage3": "janus",
        "janus-nano-vq": "vq",
        "janus-pro-1b-stage1": "janus",
        "janus-pro-1b-stage2": "janus",
        "janus-pro-1b-stage3": "janus",
        "janus-pro-7b-stage1": "janus",
        "janus-pro-7b-stage2": "janus",
        "janus-pro-7b-stage3": "janus",
        "janus-stage1": "janus",
        "janus-stage2": "janus",
        "janus-stage3": "janus",
        "janusflow-nano": "janusflow",
        "janusflow-nano-finetune": "janusflow",
        "janusflow-stage1": "janusflow",
        "janusflow-stage2": "janusflow",
        "janusflow-stage3": "janusflow",
        "metaquery-instruct": "metaquery",
        "metaquery-nano": "metaquery",
        "metaquery-nano-dcae": "dc_ae",
        "metaquery-nano-finetune": "metaquery",
        "metaquery-nano-mllm": "qwen2_5_vl",
        "metaquery-nano-queries": "metaquery",
        "metaquery-pretrain": "metaquery",
        "showo-clip-stage1": "show_o",
        "showo-clip-stage2": "show_o",
        "showo-llava-pretrain": "show_o",
        "showo-llava-tuning": "show_o",
        "showo-nano": "show_o",
        "showo-nano-finetune": "show_o",
        "showo-stage1": "show_o",
        "showo-stage2": "show_o",
        "showo-stage3": "show_o",
        "showo-nano-vq": "magvit_v2",
        "uniworld-nano": "uniworld",
        "uniworld-nano-finetune": "uniworld",
        "uniworld-nano-task-head": "uniworld_task_head",
        "uniworld-stage1": "uniworld",
        "uniworld-stage2": "uniworld",
    }


def test_tasks_fill_a_batch():
    tasks = {"a": 5, "b": 2, "c": 1}
    few = [sample_tasks(tasks, 8 + 3, random.Random(i)) for i in range(2000)]
    assert all(len(batch) == 11 and all(batch[:8].count(task) == n for task, n in tasks.items()) for batch in few)
    # a hand of a deck: never more of a task than the deck holds, and its share on average
    many = [sample_tasks(tasks, 4, random.Random(i)) for i in range(2000)]
    assert all(len(batch) == 4 and all(batch.count(task) <= n for task, n in tasks.items()) for batch in many)
    for hands in ([batch[8:] for batch in few], many):
        drawn = [task for hand in hands for task in hand]
        assert all(abs(drawn.count(task) / len(drawn) - n / 8) < 0.03 for task, n in tasks.items())


def test_frozen_parts_are_parts(recipe):
    with pytest.raises(ValueError, match=r"got frozen \['visoin'\], expected prefixes"):
        build_task(dataclasses.replace(recipe, options={**recipe.options, "frozen": ["visoin"]}))


def test_missing_parts_are_named(recipe):
    with pytest.raises(ValueError, match=r"no ae.safetensors in /nowhere: run `unimm train bagel-nano-vae"):
        build_task(dataclasses.replace(recipe, options={**recipe.options, "vae": "/nowhere"}))


def test_batches_are_a_function_of_seed_and_step(objective):
    a, b, other = objective.batch(3), objective.batch(3), objective.batch(4)
    assert torch.equal(a.pack.ids, b.pack.ids) and torch.equal(a.noise, b.noise) and torch.equal(a.images, b.images)
    assert a.pack.ids.shape != other.pack.ids.shape or not torch.equal(a.pack.ids, other.pack.ids)


def test_a_batch_holds_every_kind_and_fits_its_losses(objective):
    batch = objective.batch(0)
    assert set(batch.image_kinds.tolist()) == set(range(len(IMAGE_KINDS)))
    assert set(batch.text_kinds.tolist()) == set(range(len(TEXT_KINDS)))
    assert len(batch.image_kinds) == int(batch.pack.noised.sum())
    assert len(batch.text_kinds) == int((batch.pack.labels != IGNORE_INDEX).sum())
    assert all(len(rows) % 256 == 0 for rows in batch.pack.rows_by_expert.values())
    losses = mean_losses(objective.losses(batch))
    assert set(losses) == set(IMAGE_KINDS + TEXT_KINDS) and all(torch.isfinite(loss) for loss in losses.values())


def test_a_batch_that_draws_nothing(objective):
    batch = objective.batch.batch([example("answer.count", 5), example("fact.forward", 0)], random.Random(0))
    assert batch.pack.gen_images is None
    losses = mean_losses(objective.losses(batch))
    assert set(losses) == {"answer", "fact"} and all(torch.isfinite(loss) for loss in losses.values())


def test_latents_are_those_of_each_image_alone(objective):
    batch = objective.batch(1)
    encoded = objective.encode_latents(batch)
    picture, token = batch.pack.gen_images.content[40].tolist()
    alone = objective.model.vae.encode(
        batch.images[picture : picture + 1], noise=batch.posterior[picture : picture + 1]
    )
    h, w = divmod(token, alone.shape[3] // 2)
    expected = alone[0, :, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2].permute(1, 2, 0).flatten()
    torch.testing.assert_close(encoded.gen_images.content[40], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_plan(objective, task):
    batch = objective.batch.batch([example(task, 5), example("draw.one", 0)], random.Random(0))
    assert len(batch.pack.layout.lengths) == 3  # two samples and the filler


def test_steps_teach(recipe, objective):
    # a loss of small weight may rise for some steps while the others fall
    even = dict.fromkeys(recipe.loss_weights, 1.0)
    trainer = Trainer(
        objective, dataclasses.replace(recipe, warmup_steps=0, lr=3e-3, loss_weights=even), torch.device("cpu")
    )
    batch = objective.batch(0)
    before = {name: loss.item() for name, loss in mean_losses(objective.losses(batch)).items()}
    frozen = objective.model.vision.patch_embed.weight.clone()
    for _ in range(12):
        trainer.update(batch)
    after = {name: loss.item() for name, loss in mean_losses(objective.losses(batch)).items()}
    assert all(after[name] < before[name] for name in before), (before, after)
    assert torch.equal(frozen, objective.model.vision.patch_embed.weight)


def test_the_vit_learns_to_see():
    recipe = dataclasses.replace(
        read_recipe(RECIPES / "bagel-nano-vit.yaml"), batch_size=32, precision="float32", warmup_steps=0
    )
    objective = build_task(dataclasses.replace(recipe, model={**recipe.model, **SMALL_VIT}))
    batch = objective.batch(0)
    empty = (batch.targets == 0).all(-1)
    assert (batch.targets[~empty] != 0).all() and 0 < (~empty).float().mean() < 0.4
    trainer = Trainer(objective, recipe, torch.device("cpu"))
    first = sum(loss.item() for loss in mean_losses(objective.losses(batch)).values())
    for step in range(25):
        trainer.update(objective.batch(step))
    assert sum(loss.item() for loss in mean_losses(objective.losses(batch)).values()) < 0.5 * first
    assert 0 <= objective.accuracy() <= 1
    # on another device, too: there its images have to be brought to it
    objective.model.to("meta")
    with pytest.raises(RuntimeError, match=r"item\(\)"):
        objective.accuracy()


def test_nameless_things_teach_what_has_a_name():
    recipe = read_recipe(RECIPES / "bagel-nano-vit.yaml")
    options = recipe.options | {"novel_colours": 0.5, "novel_shapes": 0.5, "noise": 0.0}
    batch = build_task(dataclasses.replace(recipe, options=options, batch_size=16)).batch(0)
    found = batch.targets[batch.targets[:, 2] > 0]  # patches that hold a thing: every size has a name
    shape_missing, colour_missing = (found[:, i] == IGNORED for i in (0, 1))
    assert torch.equal(shape_missing, ~colour_missing) and shape_missing.any() and colour_missing.any()


def test_what_shows_or_draws_things_loses_names(objective):
    worlds, dice = objective.batch, random.Random(0)
    worlds = dataclasses.replace(
        worlds, options=dataclasses.replace(worlds.options, novel_colours=0.5, novel_shapes=0.5)
    )
    for task in TASKS:
        one = example(task, 3)
        changed = worlds.augment(one, dice)
        shows_things = task.startswith(("draw.", "edit.", "answer.", "caption")) and task != "draw.favourite"
        assert (changed is not one) == shows_things


def test_a_vit_is_judged_by_plain_scenes():
    recipe = read_recipe(RECIPES / "bagel-nano-vit.yaml")
    scenes = build_task(dataclasses.replace(recipe, batch_size=8)).batch
    plain, again = scenes.batch(scenes.scenes(3)), scenes.batch(scenes.scenes(3))
    assert torch.equal(plain.patches, again.patches) and int(plain.targets.min()) >= 0
    assert not torch.equal(scenes(3).patches, plain.patches)


# torch's own tracer looks at the gradients of what it traces
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.slow
def test_compiled_streams_equal_plain_ones(recipe):
    plain, fast = build_task(recipe), build_task(recipe)
    compile_experts(fast.model)
    for step in range(2):
        batch = plain.batch(step)
        expected, got = mean_losses(plain.losses(batch)), mean_losses(fast.losses(batch))
        for name, loss in expected.items():
            torch.testing.assert_close(got[name], loss, rtol=1e-4, atol=1e-5)


def test_the_text_model_keeps_markers_out_of_reach():
    tokenizer = train_tokenizer(512, lines=2000, special_tokens=BAGEL_TOKENS)
    bos = tokenizer.token_id("<|im_start|>")
    assert bos is not None and tokenizer.token_id("no such token") is None
    assert bos not in tokenizer.encode("a <|im_start|> red circle")
    for text in ("a red circle left of a blue square", "<think>3 - 2 = 1. draw one red circle.</think>", "caf\u00e9"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("three green stars")) <= 5
    assert len(HELD_OUT) == 6


@pytest.mark.parametrize("tasks", [None, {"draw.one": 2}, {"caption": 2}])
def test_flops_are_those_that_torch_counts(objective, tasks):
    """Also where one expert's last rows reach no loss."""
    options = objective.batch.options
    options = options if tasks is None else dataclasses.replace(options, tasks=tasks)
    check_counts(objective, dataclasses.replace(objective.batch, options=options, batch_size=6)(0))


@pytest.mark.parametrize("targets", [("gen.attention",), ("und", "gen", "vision.mlp", "connector", "latents")])
def test_flops_of_adapters_are_those_that_torch_counts(objective, targets):
    adapted = copy.deepcopy(objective)
    adapted.model.add_adapter(AdapterConfig(rank=2, alpha=4, targets=targets))
    check_counts(adapted, dataclasses.replace(adapted.batch, batch_size=6)(0))
