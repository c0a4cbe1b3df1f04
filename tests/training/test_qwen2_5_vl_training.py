"""Training metaquery-nano's parts: the MLLM's lessons, plans and steps; its autoencoder's batches, scale and
release."""

import dataclasses
import functools
import json
import pickle
import random

import pytest
import torch
from helpers.flops import check_counts
from helpers.paths import RECIPES
from PIL import Image

from unimm.data.shapes import HELD_OUT, example
from unimm.data.shapes.language import FAVOURITES
from unimm.data.shapes.scenes import target_scenes
from unimm.sequence.packing import pack_sequences
from unimm.sequence.parts import IGNORE_INDEX
from unimm.tokenizers.dc_ae import DCAE
from unimm.training.config import read_recipe
from unimm.training.init import train_tokenizer
from unimm.training.losses import mean_losses
from unimm.training.tasks import qwen2_5_vl as reader
from unimm.training.tasks.base import build_task
from unimm.training.tasks.qwen2_5_vl import ATTRIBUTES, TEXT_KINDS, scene_in_words, user_message
from unimm.training.trainer import Trainer, train
from unimm.vlms.qwen2_5_vl.model import QwenVL

TEXT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48)
TOWER = dict(hidden_size=16, depth=2, num_heads=2, intermediate_size=24, fullatt_block_indexes=[1])
TURNS = {"type": "mrope", "mrope_section": [2, 3, 3]}
LEVELS = {
    "latent_channels": 8,
    "attention_head_dim": 8,
    **{f"{side}_{name}": values for side in ("encoder", "decoder") for name, values in {
        "block_out_channels": [8, 8, 16],
        "layers_per_block": [1, 1, 1],
        "block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"],
        "qkv_multiscales": [[], [], []],
    }.items()},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _quick_text_model():
    """One text model for all tests, with less text to learn from."""
    with pytest.MonkeyPatch.context() as patch:
        quick = functools.partial(train_tokenizer, lines=2000)
        patch.setattr(reader, "train_tokenizer", quick)
        yield


@pytest.fixture(scope="module")
def recipe():
    """The MLLM's recipe with small numbers."""
    full = read_recipe(RECIPES / "metaquery-nano-mllm.yaml")
    model = {
        "text": full.model["text"] | TEXT | {"rope_scaling": TURNS},
        "vision": full.model["vision"] | TOWER,
        "pixels": full.model["pixels"],
    }
    options = dict(full.options) | {
        "compile": False,
        "vision_steps": 2,
        "vision_batch_size": 4,
        "scored_examples": 2,
        "vocab_size": 400,
    }
    tasks = ("caption", "answer.count", "answer.where", "fact.forward", "plan.two", "plan.recolour", "plan.favourite")
    options["tasks"] = dict.fromkeys(tasks, 1)
    return dataclasses.replace(
        full, model=model, options=options, batch_size=8, precision="float32", warmup_steps=0, lr=3e-3
    )


@pytest.fixture(scope="module")
def objective(recipe):
    return build_task(recipe)


def test_lessons_are_a_function_of_seed_and_step_without_the_model(objective):
    lessons = pickle.loads(pickle.dumps(objective.batch))  # noqa: S301, as for a worker process
    a, b, other = lessons(3), objective.batch(3), lessons(4)
    assert torch.equal(a.pack.ids, b.pack.ids) and not torch.equal(a.pack.ids[:200], other.pack.ids[:200])
    sights, again, others = lessons(1), objective.batch(1), lessons(0)
    assert torch.equal(sights.patches, again.patches) and torch.equal(sights.targets, again.targets)
    assert not torch.equal(sights.patches, others.patches)
    assert set(a.text_kinds.tolist()) == set(range(len(TEXT_KINDS)))
    assert len(a.text_kinds) == int((a.pack.labels != IGNORE_INDEX).sum())


def test_the_assistant_alone_carries_labels(objective):
    words, end = objective.model.mllm.processor.text_tokenizer, objective.model.mllm.config.special_tokens.im_end
    for task in ("answer.count", "plan.two", "fact.inverse"):
        one = objective.batch.training_example(task, 5)
        items = objective.batch.prompt_parts(one)
        said = torch.cat([item.labels for item in items])
        assert said[said != IGNORE_INDEX].tolist() == [*words.encode(one.answer), end]
        system = (
            objective.batch.options.plan_system_prompt if task.startswith("plan.") else "You are a helpful assistant."
        )
        assert system in words.decode(items[0].ids.tolist())


def test_plans_say_what_the_image_holds(objective):
    one = objective.batch.training_example("plan.relation", 7)
    source = example("draw.relation", 7, seed=objective.batch.seed)
    assert (one.prompt, one.target, one.answer) == (source.prompt, None, scene_in_words(source))
    for thing in source.target_scene.things:
        assert f"{thing.size} {thing.colour} {thing.shape}" in one.answer and thing.place in one.answer
    edit = objective.batch.training_example("plan.recolour", 7)
    assert len(edit.images) == 1 and edit.answer == scene_in_words(example("edit.recolour", 7))
    alone = next(one for i in range(200) if not (one := example("edit.remove", i)).target_scene.things)
    assert scene_in_words(alone) == "nothing"


def test_favourites_of_some_alone_are_planned(objective):
    planned = objective.batch.options.planned_characters
    found = [objective.batch.training_example("plan.favourite", i) for i in range(60)]
    asked = {name for name in FAVOURITES for one in found if name in one.prompt}
    assert asked == set(planned) and len(planned) == 6
    facts = [objective.batch.training_example("fact.forward", i).prompt for i in range(200)]
    assert {name for name in FAVOURITES for fact in facts if name in fact} == set(FAVOURITES)
    one = found[0]
    shape, colour = next(FAVOURITES[name] for name in FAVOURITES if name in one.prompt)
    assert f"{colour} {shape}" in one.answer


def test_the_encoder_sees_images_as_prompts_show_them(objective):
    """Patches that are made in bulk, without noise or nameless things, equal those of the MLLM's own look."""
    lessons = objective.batch
    plain = {**lessons.options.vision, "novel_colours": 0.0, "novel_shapes": 0.0, "noise": 0.0}
    lessons = dataclasses.replace(lessons, options=dataclasses.replace(lessons.options, vision=plain))
    sights = lessons.vision_batch(2)
    patches, targets = sights.patches, sights.targets
    dice = random.Random(f"{lessons.seed}/2/look")
    task = dice.choice(plain["tasks"])
    first = example(task, 2 * lessons.options.vision_batch_size, seed=lessons.seed)
    expected, grid = lessons.processor.image_processor.to_patches([Image.fromarray(first.target)])
    n = grid[1] * grid[2]
    torch.testing.assert_close(patches[:n], expected, rtol=1e-5, atol=1e-5)
    assert (targets[: n // 4, 0] > 0).sum() == len(
        {(thing.x // 16, thing.y // 16) for thing in first.target_scene.things}
    )


@torch.no_grad()
def test_packing_equals_one_by_one(objective):
    model = objective.model.mllm.eval()
    tasks = ("answer.count", "plan.recolour", "fact.inverse")
    samples = [objective.batch.prompt_parts(objective.batch.training_example(task, 3)) for task in tasks]
    alone = torch.cat([model(pack_sequences([items])) for items in samples])
    # float32 sums in other orders
    torch.testing.assert_close(model(pack_sequences(samples)), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("step", "names"), [(0, ATTRIBUTES), (5, TEXT_KINDS)])
def test_steps_teach_sight_then_words(recipe, step, names):
    """And words leave the encoder alone."""
    objective = build_task(recipe)
    trainer, batch = Trainer(objective, recipe, torch.device("cpu")), objective.batch(step)
    before = {name: loss.item() for name, loss in mean_losses(objective.losses(batch)).items()}
    assert set(before) == set(names)
    tower = {name: x.clone() for name, x in objective.model.mllm.vision.state_dict().items()}
    decoder = objective.model.mllm.decoder.embed.weight.clone()
    for _ in range(12):
        trainer.update(batch)
    after = {name: loss.item() for name, loss in mean_losses(objective.losses(batch)).items()}
    assert all(after[name] < before[name] for name in before), (before, after)
    same = [torch.equal(x, tower[name]) for name, x in objective.model.mllm.vision.state_dict().items()]
    assert all(same) if names == TEXT_KINDS else not any(same)
    assert torch.equal(decoder, objective.model.mllm.decoder.embed.weight) == (names == ATTRIBUTES)


def test_every_part_is_reached(recipe):
    objective = build_task(recipe)
    for step in (0, 5):
        sum(mean_losses(objective.losses(objective.batch(step))).values()).backward()
    assert not [name for name, p in objective.model.named_parameters() if p.grad is None or not p.grad.any()]


def test_a_few_steps_and_their_release(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, steps=3, save_every=3, sample_every=3, log_every=1, ema_decay=0.0)
    objective = build_task(recipe)
    assert train(objective, recipe, tmp_path, workers=0) == 3
    report = json.loads((tmp_path / "release/report.json").read_text())
    assert set(report) == set(reader.SCORED_TASKS) and all(0 <= part <= 1 for part in report.values())
    model = QwenVL.from_pretrained(tmp_path / "release")
    one = example("answer.colour", 0, split="test")
    assert isinstance(model.chat([user_message(one)]), str) and model.config.decoder.tie_word_embeddings
    weights = model.state_dict()
    for name, x in objective.model.mllm.state_dict().items():
        # as bfloat16 rounds
        torch.testing.assert_close(weights[name], x, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tasks": {"draw.one": 1}}, "got tasks draw.one: expected captions, answers, facts and plans"),
        ({"tasks": {"plan.nothing": 1}}, "got tasks plan.nothing"),
        ({"planned_characters": ["Tim"]}, "got planned_characters Tim: expected some of Tom"),
    ],
)
def test_wrong_options_of_the_mllm(recipe, options, words):
    with pytest.raises(ValueError, match=words):
        build_task(dataclasses.replace(recipe, options={**recipe.options, **options}))


# the autoencoder


def small(**options):
    recipe = read_recipe(RECIPES / "metaquery-nano-dcae.yaml")
    options = {**recipe.options, "scored_scenes": 4, "measured_scenes": 8, **options}
    numbers = dict(steps=4, batch_size=4, precision="float32", warmup_steps=0, ema_decay=0.0)
    return dataclasses.replace(recipe, model=LEVELS, options=options, **numbers)


def test_batches_of_the_autoencoder():
    one, other = build_task(small()).batch, build_task(small()).batch
    other(0)
    a, b = one(5), other(5)
    assert torch.equal(a.image, b.image) and torch.equal(a.noise, b.noise) and not torch.equal(a.image, one(6).image)
    assert a.image.shape == (4, 3, 64, 64) and a.noise.shape == (4, 8, 16, 16)
    shown = target_scenes(("draw.scene", "draw.count"), range(40), seed=0)
    assert {thing.pair for scene in shown for thing in scene.things}.isdisjoint(HELD_OUT)


def test_shortcuts_alone_carry_the_image_at_first():
    model = build_task(small()).model
    x = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.encoder.down_blocks[0][0](x), x)
        y = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
        assert torch.equal(model.encoder.down_blocks[2][0](y), y)


def test_losses_of_the_autoencoder_are_means_through_noised_latents():
    objective = build_task(small(latent_noise=0.5))
    batch = objective.batch(0)
    losses = mean_losses(objective.losses(batch))
    z = objective.model.encode(batch.image)
    error = objective.model.decode(z + 0.5 * batch.noise) - batch.image
    torch.testing.assert_close(losses["l1"], error.abs().mean())
    torch.testing.assert_close(losses["mse"], error.square().mean())
    torch.testing.assert_close(losses["size"], z.square().mean())


def test_a_trained_autoencoder_is_written_as_released(tmp_path):
    objective = build_task(small(dtype="float32"))
    first = {name: x.item() for name, x in mean_losses(objective.losses(objective.batch(0))).items()}
    train(objective, small(dtype="float32"), tmp_path, workers=0)
    losses = mean_losses(objective.losses(objective.batch(0)))
    assert losses["l1"] < first["l1"] and losses["mse"] < first["mse"]
    with Image.open(tmp_path / "samples/00000004.png") as picture:
        assert picture.size == (512, 256)
    model = DCAE.from_pretrained(tmp_path / "release")
    with torch.no_grad():
        z = torch.cat([model.encode(objective.batch(step).image) for step in range(2)])
        assert z.square().mean().sqrt().item() == pytest.approx(1, abs=1e-4), "the scale makes latents standard"
        image = objective.batch(9).image
        torch.testing.assert_close(
            model.decode(model.encode(image)), objective.reconstruct(image), rtol=1e-4, atol=1e-4
        )
    found = json.loads((tmp_path / "release/report.json").read_text())
    assert found["scenes"] == 4 and 0 <= found["scenes_right"] <= 1


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match="got 'int8' for dtype in options"):
        build_task(small(dtype="int8"))


@pytest.mark.parametrize("step", [0, 5])
def test_flops_are_those_that_torch_counts(recipe, step):
    objective = build_task(recipe)
    check_counts(objective, objective.batch(step))


def test_flops_of_the_autoencoder_are_those_that_torch_counts():
    objective = build_task(small())
    check_counts(objective, objective.batch(0), masked=False)
