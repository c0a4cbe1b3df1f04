"""The families on datasets of one's own: the example datasets train for a step or two, the right parts learn, a release
follows, and what cannot serve is an error at the start."""

import dataclasses
import json
import math
from contextlib import closing

import pytest
import torch
from helpers import toys
from helpers.paths import RECIPES
from helpers.records import dice, image, record, said, text
from safetensors.torch import load_file

from examples.data import make
from tests.training.test_janusflow_training import recipe as janusflow_recipe  # noqa: F401
from tests.training.test_metaquery_training import recipe as metaquery_recipe  # noqa: F401
from tests.training.test_uniworld_training import recipe as uniworld_recipe  # noqa: F401
from unimm import Janus, JanusFlow, MetaQuery, UniWorld
from unimm.training.config import TrainConfig, from_mapping, read_recipe
from unimm.training.record_batches import build_batches, open_groups
from unimm.training.tasks.base import build_task
from unimm.training.trainer import Trainer, train

NUMBERS = dict(
    seed=3, steps=2, batch_size=1, lr=1e-3, betas=[0.9, 0.99], eps=1e-8, weight_decay=0.0, muon=[], warmup_steps=0,
    schedule="constant", min_lr_ratio=1.0, max_grad_norm=1.0, ema_decay=0.9, precision="float32", save_every=2, sample_every=2,
    log_every=1,
)  # fmt: skip
CHAT_LOSSES = {"generate": 1.0, "edit": 1.0, "understand": 1.0, "text": 1.0}
FLOW_LOSSES = {"generate": 1.0, "edit": 1.0}
CHAT = {"dropout": 0.1, "frozen": ["vision."], "compile": False, "sample_prompts": ["a plain red image"]}
UNIWORLD = dict(
    trained="all", frozen=[], timesteps_per_image=1, dropout=0.1, prompt_dropout=0.1, append_vision_start=True,
    images_in_place=True, edit_weights="log", guidance=1.0, compile=False,
)  # fmt: skip
PACKING = {"expected_tokens": 500, "max_tokens": 700, "max_tokens_per_sample": 400, "buffer_size": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Example datasets by their names."""
    folder = tmp_path_factory.mktemp("data")
    names = ("llava", "imagefolder", "webdataset", "pairs", "uniworld", "records")
    return {name: str(getattr(make, f"make_{name}")(folder)) for name in names}


@pytest.fixture(scope="module")
def releases(
    tmp_path_factory,
    janusflow_recipe,  # noqa: F811
    metaquery_recipe,  # noqa: F811
    uniworld_recipe,  # noqa: F811
):
    """A small untrained model of each family."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("janus", "janusflow", "metaquery", "uniworld")}
    toys.janus(folders["janus"])
    for name, small in (
        ("janusflow", janusflow_recipe),
        ("metaquery", metaquery_recipe),
        ("uniworld", uniworld_recipe),
    ):
        build_task(small).model.save_pretrained(folders[name])
    return {name: str(folder) for name, folder in folders.items()}


def recipe_of(task, releases, data, *, groups, **changes):
    """A recipe of a family's on these datasets."""
    numbers = {
        "janus": {"options": CHAT, "packing": PACKING, "loss_weights": CHAT_LOSSES},
        "janusflow": {"options": CHAT | {"timesteps_per_image": 2}, "packing": PACKING, "loss_weights": CHAT_LOSSES},
        "metaquery": {
            "options": {"timesteps_per_image": 2, "dropout": 0.1, "frozen": [], "compile": False},
            "batch_size": 3,
            "loss_weights": FLOW_LOSSES,
        },
        "uniworld": {"options": UNIWORLD, "batch_size": 2, "loss_weights": FLOW_LOSSES},
    }[task]
    sources = {name: {"paths": [data[name]]} for name in groups}
    contents = {
        **NUMBERS, "task": task, "model": {"from_pretrained": releases[task]},
        "data": {"groups": sources, "lanes": 2, "max_broken": 0.7}, **numbers,
    }  # fmt: skip
    return from_mapping(TrainConfig, contents | changes, where="here")


EXAMPLES = {
    "janus": (Janus, ("llava", "imagefolder", "webdataset", "pairs")),
    "janusflow": (JanusFlow, ("llava", "imagefolder", "webdataset", "pairs")),
    "metaquery": (MetaQuery, ("imagefolder", "webdataset", "pairs")),
    "uniworld": (UniWorld, ("uniworld", "imagefolder", "webdataset", "pairs")),
}


@pytest.mark.parametrize("task", EXAMPLES)
def test_the_example_datasets_train(task, releases, data, tmp_path):
    family, groups = EXAMPLES[task]
    recipe = recipe_of(task, releases, data, groups=groups)
    built = build_task(recipe)
    before = {name: p.detach().clone() for name, p in built.model.named_parameters()}
    assert train(built, recipe, tmp_path / "run", workers=0) == 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(math.isfinite(line["loss"]) and line["losses"] for line in lines)
    assert {name for line in lines for name in line["losses"]} <= set(recipe.loss_weights)
    changed = {name for name, p in built.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and changed <= {name for name, p in built.model.named_parameters() if p.requires_grad}
    family.from_pretrained(tmp_path / "run" / "release")
    assert (tmp_path / "run" / "samples" / "00000002.png").exists() == bool(recipe.options.get("sample_prompts"))


def moved(built, *records):
    """The parts of a model that the losses of records have gradients for, and the names of these losses."""
    builder = built.sample_builder
    samples = [builder.prepare(one, dice(i)) for i, one in enumerate(records)]
    built.model.zero_grad(set_to_none=True)
    losses = built.losses(builder.collate(samples, dice()))
    assert {name: loss.count for name, loss in losses.items()} == built.loss_counts(builder.collate(samples, dice()))
    assert all(torch.isfinite(loss.total) for loss in losses.values())
    sum(loss.total for loss in losses.values()).backward()
    parts = {name.split(".")[0] for name, p in built.model.named_parameters() if p.grad is not None and p.grad.any()}
    built.model.zero_grad(set_to_none=True)
    return parts, set(losses)


DRAWN = record(text("a cat"), image(loss=True))
EDITED = record(image(), text("make it red"), image(loss=True, seed=1))
ANSWERED = record(image(), text("what is it?"), said("a cat"))
SAID = record(text("two and two?"), said("four"))
CHAIN = record(image(), text("a"), image(loss=True, seed=1), text("b"), image(loss=True, seed=2))


@pytest.mark.parametrize(
    ("one", "parts", "kind"),
    [
        (DRAWN, {"decoder", "gen_embed", "gen_aligner", "gen_head"}, "generate"),
        (EDITED, {"decoder", "gen_embed", "gen_aligner", "gen_head", "aligner", "vision"}, "edit"),
        (CHAIN, {"decoder", "gen_embed", "gen_aligner", "gen_head", "aligner", "vision"}, "edit"),
        (ANSWERED, {"decoder", "aligner", "vision"}, "understand"),
        (SAID, {"decoder"}, "text"),
    ],
)
def test_gradients_of_janus_reach_what_a_record_is_about(releases, data, one, parts, kind):
    options = CHAT | {"frozen": [], "dropout": 0.0}
    built = build_task(recipe_of("janus", releases, data, groups=["llava"], options=options))
    assert moved(built, one) == (parts, {kind})


@pytest.mark.parametrize(
    ("one", "parts", "kind"),
    [
        (DRAWN, {"decoder", "gen_encoder", "gen_encoder_aligner", "gen_decoder", "gen_decoder_aligner", "gen_decoder_norm"},
         "generate"),
        (ANSWERED, {"decoder", "aligner", "und_start_embed", "vision"}, "understand"),
    ],
)  # fmt: skip
def test_gradients_of_janusflow(releases, data, one, parts, kind):
    options = CHAT | {"frozen": [], "dropout": 0.0, "timesteps_per_image": 1}
    built = build_task(recipe_of("janusflow", releases, data, groups=["llava"], options=options))
    with torch.no_grad():
        torch.nn.init.normal_(
            built.model.gen_decoder.out_convs[-1].unpatch_conv.weight, std=0.1
        )  # zeros pass nothing on
    assert moved(built, one) == (parts, {kind})


@pytest.mark.parametrize(("one", "kind"), [(DRAWN, "generate"), (EDITED, "edit"), (CHAIN, "edit")])
def test_gradients_of_metaquery(releases, data, one, kind):
    built = build_task(recipe_of("metaquery", releases, data, groups=["pairs"]))
    with torch.no_grad():
        for p in built.model.denoiser.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    assert moved(built, one) == ({"queries", "connector", "denoiser"}, {kind})


def test_a_record_to_answer_cannot_be_learned_by_metaquery(releases, data):
    built = build_task(recipe_of("metaquery", releases, data, groups=["pairs"]))
    for one, reason in (
        (ANSWERED, "of the kind understand, which MetaQuery does not learn: expected generate, edit"),
        (record(text("a"), said("b"), image(loss=True)), "of the kind interleaved"),
        (record(text("a", role="system"), text("b"), image(loss=True)), "MetaQuery's is that of its config.json"),
        (record(image(loss=True)), "without a text or an image"),
    ):
        with pytest.raises(ValueError, match=reason):
            built.sample_builder.prepare(one, dice())


def test_two_stages_of_uniworld_follow_each_other(releases, data, uniworld_recipe, tmp_path):  # noqa: F811
    """The published stages, around parts that the options name."""
    parts = {name: uniworld_recipe.options[name] for name in ("mllm", "vae", "vit", "mllm_dtype")}
    parts |= {"denoiser": uniworld_recipe.options["vae"] + "/flux"}
    model = {name: uniworld_recipe.model[name] for name in ("generation", "hidden", "vision")}
    before = None
    for i, trained in enumerate(("stage 1", "stage 2")):
        options = UNIWORLD | parts | {"trained": trained}
        groups = ["uniworld", "pairs"]
        recipe = recipe_of("uniworld", releases, data, groups=groups, options=options, model=model, steps=1)
        built = build_task(recipe)
        names = {name.split(".")[0] for name, p in built.model.named_parameters() if p.requires_grad}
        assert names == ({"mllm_projector"}, {"mllm_projector", "siglip_projector", "denoiser"})[i]
        train(built, recipe, tmp_path / str(i), init=before, workers=0)
        before = tmp_path / str(i)
    assert load_file(before / "checkpoints/00000001/average.safetensors")


# ---- errors at the start


@pytest.mark.parametrize(
    ("task", "changes", "reason"),
    [
        ("janus", {"packing": PACKING | {"max_tokens_per_sample": 30}}, "an image to generate of 36 tokens: every one"),
        ("janusflow", {"packing": PACKING | {"max_tokens_per_sample": 30}}, "an image to generate of 32 tokens"),
        ("uniworld", {"packing": PACKING, "batch_size": 1}, "packing for uniworld, whose denoiser takes images of one size"),
        ("metaquery", {"model": {}}, "options lacks mllm, dcae"),
        ("uniworld", {"model": {}}, "options lacks mllm, vae"),
        ("janus", {"model": {}}, "model of the recipe lacks from_pretrained"),
        ("janus", {"options": CHAT | {"frozen": ["visoin"]}}, r"got frozen \['visoin'\]"),
        ("janus", {"options": CHAT | {"tasks": {}}}, "got 'tasks' in options"),
    ],
)  # fmt: skip
def test_wrong_recipes_are_errors_at_the_start(releases, data, task, changes, reason):
    with pytest.raises(ValueError, match=reason):
        build_task(recipe_of(task, releases, data, groups=["pairs"], **changes))


def test_a_release_and_its_parts_are_not_given_together(releases, data):
    options = {"timesteps_per_image": 2, "dropout": 0.1, "frozen": [], "compile": False, "mllm": "x"}
    with pytest.raises(ValueError, match=r"got model.from_pretrained, and mllm in the options"):
        build_task(recipe_of("metaquery", releases, data, groups=["pairs"], options=options))


def test_the_option_data_of_earlier_recipes_says_where_it_is_now(metaquery_recipe):  # noqa: F811
    old = dataclasses.replace(metaquery_recipe, options={**metaquery_recipe.options, "data": "list.jsonl"})
    with pytest.raises(ValueError, match=r"got data in the options: it is a section of the recipe now, data: \{groups"):
        build_task(old)


def test_a_missing_path_is_an_error_at_the_start(releases, data):
    recipe = recipe_of("janus", releases, data | {"gone": "/nowhere/gone"}, groups=["gone"])
    with pytest.raises(ValueError, match=r"data.groups.gone: no dataset at /nowhere/gone"):
        build_batches(build_task(recipe), recipe)


@pytest.mark.parametrize(
    ("task", "group", "reason"),
    [
        ("metaquery", "llava", "of the kind (understand|text), which MetaQuery does not learn"),
        ("uniworld", "llava", "of the kind (understand|text), which UniWorld does not learn"),
        ("janus", "records", "(of the kind interleaved|Janus does not think)"),
    ],
)
def test_a_group_that_cannot_serve_is_an_error_at_the_start(releases, data, task, group, reason):
    recipe = recipe_of(task, releases, data, groups=[group, "pairs"])
    match = (
        rf"data.groups.{group}: none of \d rows that were tried can be used by the task '{task}'; the first: .*{reason}"
    )
    with pytest.raises(ValueError, match=match):
        build_batches(build_task(recipe), recipe)


def test_a_group_whose_samples_are_too_long_is_an_error_at_the_start(releases, data):
    packing = {"expected_tokens": 60, "max_tokens": 60, "max_tokens_per_sample": 60}
    recipe = recipe_of("janus", releases, data, groups=["llava", "imagefolder"], packing=packing)
    with pytest.raises(ValueError, match=r"data.groups.llava: none of 3 rows .*tokens, expected at most packing"):
        build_batches(build_task(recipe), recipe)


def test_batches_of_uniworld_are_of_one_size_and_go_on_after_a_stop(releases, data):
    recipe = recipe_of("uniworld", releases, data, groups=["uniworld", "imagefolder", "pairs"])
    built = build_task(recipe)
    built.builder = built.sample_builder = dataclasses.replace(built.sample_builder, n_ratios=3)
    source = build_batches(built, recipe)
    batches = []
    with closing(source.iterate(0, 6, workers=0)) as made:
        for batch in made:
            batches.append(batch)
            if len(batches) == 3:
                state = source.state_dict()
    assert len({batch.noise.shape for batch in batches}) > 1 and all(len(batch.noise) == 2 for batch in batches)
    again = build_batches(built, recipe)
    again.load_state_dict([json.loads(json.dumps(state))])
    with closing(again.iterate(3, 6, workers=2)) as made:
        for one, other in zip(batches[3:], made, strict=True):
            assert torch.equal(one.noise, other.noise) and torch.equal(one.samples.images, other.samples.images)


# ---- our recipes

# docs/originals/janus.md, "Training": learning rate, schedule, decay, warm-up, steps, batch, understanding : text : generation
STAGES = {
    "janus-stage1": (1e-3, "cosine", 0.0, 300, 10_000, 256, (1, 0, 1)),
    "janus-stage2": (1e-4, "constant", 0.0, 5000, 180_000, 512, (2, 3, 5)),
    "janus-stage3": (2e-5, "constant", 0.1, 0, 24_000, 256, (7, 3, 10)),
    "janus-pro-1b-stage1": (1e-3, "constant", 0.0, 600, 20_000, 256, (1, 0, 3)),
    "janus-pro-1b-stage2": (1e-4, "constant", 0.0, 5000, 360_000, 512, (2, 3, 5)),
    "janus-pro-1b-stage3": (4e-5, "constant", 0.0, 0, 80_000, 128, (5, 1, 4)),
    "janus-pro-7b-stage1": (1e-3, "constant", 0.0, 600, 20_000, 256, (1, 0, 3)),
    "janus-pro-7b-stage2": (1e-4, "constant", 0.0, 5000, 360_000, 512, (2, 3, 5)),
    "janus-pro-7b-stage3": (4e-5, "constant", 0.0, 0, 40_000, 128, (5, 1, 4)),
}
TRAINED = {
    "1": {"aligner", "gen_aligner", "gen_head"},
    "2": {"aligner", "gen_aligner", "gen_head", "gen_embed", "decoder"},
    "3": {"aligner", "gen_aligner", "gen_head", "gen_embed", "decoder", "vision"},
}


@pytest.mark.parametrize("name", STAGES)
def test_published_stages_of_janus(name, releases):
    full = read_recipe(RECIPES / f"{name}.yaml")
    lr, schedule, decay, warmup, steps, batch, ratio = STAGES[name]
    assert (full.lr, full.schedule, full.weight_decay, full.warmup_steps, full.steps) == (
        lr,
        schedule,
        decay,
        warmup,
        steps,
    )
    assert (full.gradient_accumulation, full.batch_size, full.packing.max_tokens) == (batch, 1, 4096)
    assert (full.max_grad_norm, full.betas, full.options["dropout"]) == (1.0, (0.9, 0.95), 0.1)
    weights = {group: one.weight for group, one in full.data.groups.items()}
    assert tuple(weights.get(group, 0) for group in ("und", "text", "gen")) == ratio
    assert f"as {ratio[0]} : {ratio[1]} : {ratio[2]}" in " ".join((RECIPES / f"{name}.yaml").read_text().split())
    assert full.model["from_pretrained"] in Janus.RELEASES
    built = build_task(dataclasses.replace(full, model={"from_pretrained": releases["janus"]}))
    trained = {part.split(".")[0] for part, p in built.model.named_parameters() if p.requires_grad}
    assert trained == TRAINED[name[-1]]


# arXiv 2411.07975, table 1: learning rate, warm-up, steps, batch, understanding : generation : text
FLOW_STAGES = {
    "janusflow-stage1": (1e-4, 2000, 10_000, 512, (50, 50, 0)),
    "janusflow-stage2": (1e-4, 0, 380_000, 512, (14, 80, 6)),
    "janusflow-stage3": (2e-5, 1000, 26_000, 256, (21, 70, 9)),
}


@pytest.mark.parametrize("name", FLOW_STAGES)
def test_published_stages_of_janusflow(name, releases):
    full = read_recipe(RECIPES / f"{name}.yaml")
    lr, warmup, steps, batch, ratio = FLOW_STAGES[name]
    assert (full.lr, full.schedule, full.warmup_steps, full.steps) == (lr, "constant", warmup, steps)
    assert (full.gradient_accumulation, full.batch_size, full.packing.max_tokens) == (batch, 1, 4096)
    assert (full.max_grad_norm, full.betas, full.weight_decay) == (1.0, (0.9, 0.95), 0.0)
    assert (full.options["dropout"], full.ema_decay) == (0.1, 0.99)
    weights = {group: one.weight for group, one in full.data.groups.items()}
    assert tuple(weights.get(group, 0) for group in ("und", "gen", "text")) == ratio
    assert full.model["from_pretrained"] in JanusFlow.RELEASES
    assert full.options["alignment_block"] == 6
    options = {**full.options, "alignment_block": 1}  # a small release has two blocks
    built = build_task(dataclasses.replace(full, model={"from_pretrained": releases["janusflow"]}, options=options))
    trained = {part.split(".")[0] for part, p in built.model.named_parameters() if p.requires_grad}
    adapted = {"aligner", "gen_encoder", "gen_encoder_aligner", "gen_decoder", "gen_decoder_aligner"}
    adapted |= {"gen_decoder_norm", "und_start_embed", "alignment_head"}
    more = {"1": set(), "2": {"decoder"}, "3": {"decoder", "vision"}}[name[-1]]
    assert trained == adapted | more


def test_paths_of_published_stages_are_placeholders():
    """They are set from outside; until then the run ends at once, with the key to set."""
    full = read_recipe(RECIPES / "janus-stage1.yaml", settings=["data.groups.und.paths=[/nowhere/mine]"])
    with pytest.raises(ValueError, match=r"data.groups.und: no dataset at /nowhere/mine"):
        open_groups(full.data)
    for name in (
        *STAGES,
        *FLOW_STAGES,
        "metaquery-pretrain",
        "metaquery-instruct",
        "uniworld-stage1",
        "uniworld-stage2",
    ):
        groups = read_recipe(RECIPES / f"{name}.yaml").data.groups
        assert all(path.startswith("data/") for group in groups.values() for path in group.paths)


@pytest.mark.parametrize("family", ["janus", "janusflow", "metaquery", "uniworld"])
def test_finetuning_of_the_bundled_models(family, data):
    path = RECIPES / f"{family}-nano-finetune.yaml"
    groups = read_recipe(path).data.groups
    # of the folder that the example script writes, those of this test
    settings = [f"data.groups.{name}.paths=[{data[one.paths[0].split('/')[2]]}]" for name, one in groups.items()]
    full = read_recipe(path, settings=[*settings, "batch_size=1"])
    trainer = Trainer(build_task(full), full, torch.device("cpu"))
    with closing(build_batches(trainer.task, full).iterate(0, 1, workers=0)) as made:
        trainer.update(next(made))
    assert trainer.step == 1 and math.isfinite(trainer.report()["loss"])
