"""Show-o and Emu3 on one's own records: what carries loss, the example datasets, adapters, and what is refused."""

import dataclasses
import math

import pytest
import torch
from helpers import emu3_toys
from helpers.paths import GOLDEN, RECIPES
from helpers.records import dice, image, record, said, text

from examples.data import make
from unimm import Emu3, ShowO
from unimm.sequence.parts import IGNORE_INDEX
from unimm.tokenizers.emu3_vq import Emu3VQModel
from unimm.tokenizers.magvit_v2 import MagvitV2
from unimm.training.config import TrainConfig, from_mapping, read_recipe
from unimm.training.record_batches import build_batches
from unimm.training.tasks.base import build_task
from unimm.training.tasks.emu3 import place_codes
from unimm.training.trainer import train

SHOW_O = GOLDEN / "show_o" / "dev"
PARTS = {"vq": str(SHOW_O / "magvitv2"), "clip": str(SHOW_O / "clip"), "tokenizer": str(SHOW_O / "phi")}
NUMBERS = dict(
    seed=3, steps=2, batch_size=1, lr=1e-3, betas=[0.9, 0.99], eps=1e-8, weight_decay=0.0, muon=[], warmup_steps=0,
    schedule="constant", min_lr_ratio=1.0, max_grad_norm=1.0, ema_decay=0.9, precision="float32", save_every=2, sample_every=2,
    log_every=1,
)  # fmt: skip
PACKING = {"expected_tokens": 300, "max_tokens": 500, "max_tokens_per_sample": 250, "buffer_size": 4}
LOSSES = dict.fromkeys(("generate", "edit", "understand", "text"), 1.0)
DRAWN = record(text("a cat"), image(loss=True))
EDITED = record(image(), text("make it red"), image(loss=True, seed=1))
CHAIN = record(image(), text("a"), image(loss=True, seed=1), text("b"), image(loss=True, seed=2))
ANSWERED = record(image(), text("what is it?"), said("a cat"))
SAID = record(text("two and two?"), said("four"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The recipes' `model` of small untrained models."""
    return {
        "show_o": {"from_pretrained": str(SHOW_O)},
        "clip": {"from_pretrained": str(SHOW_O / "w_clip_vit"), "components": PARTS},
        "emu3": {"from_pretrained": str(emu3_toys.emu3(tmp_path_factory.mktemp("emu3")))},
    }


def recipe_of(name, models, paths=("nowhere",), **changes):
    options = {"dropout": 0.0, "frozen": [], "sample_prompts": []} | ({"compile": False} if name == "emu3" else {})
    contents = {
        **NUMBERS, "task": "emu3" if name == "emu3" else "show_o", "model": models[name], "packing": PACKING,
        "data": {"groups": {"all": {"paths": list(paths)}}, "max_broken": 0.7},
        "loss_weights": LOSSES | ({"interleaved": 1.0} if name == "emu3" else {}), "options": options,
    }  # fmt: skip
    return from_mapping(TrainConfig, contents | changes, where="here")


@pytest.fixture(scope="module")
def tasks(models):
    return {name: build_task(recipe_of(name, models)) for name in models}


def ids_and_labels(task, one) -> tuple[list[int], list[int]]:
    """Of the rows of texts of a record's sample: each row's id, and what it must predict."""
    parts = task.sample_builder.prepare(one, dice()).parts
    return torch.cat([part.ids for part in parts]).tolist(), torch.cat([part.labels for part in parts]).tolist()


def learned(labels: list[int]) -> list[int]:
    return [one for one in labels if one != IGNORE_INDEX]


# ---- what carries loss


@pytest.mark.parametrize("name", ["show_o", "clip"])
def test_a_conversation_of_show_o(tasks, name):
    """The released format: an answer begins with a blank and ends with the end of a text, as the prompt of a chat has it."""
    task = tasks[name]
    processor, special = task.model.processor, task.model.config.special_tokens
    encode, end = task.model.tokenizer.encode, processor.end_of_text
    messages = [
        {"role": "user", "content": "what?", "images": [image().data]}, {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "sure?"},
    ]  # fmt: skip
    prompt = [one for part in processor.conversation_parts(messages) for one in part.ids.tolist()]
    ids, labels = ids_and_labels(task, record(image(), text("what?"), said("a cat"), text("sure?"), said("yes")))
    assert ids == [*prompt, *encode(" yes"), end] and prompt[0] == special.mmu
    assert learned(labels) == [*encode(" a cat"), end, *encode(" yes"), end]


def test_captions_of_show_o(tasks):
    """Without a question: behind the id that ends texts, or, by CLIP's features, behind the image and with a line break."""
    encode = tasks["show_o"].model.tokenizer.encode
    special = tasks["show_o"].model.config.special_tokens
    end = tasks["show_o"].model.processor.end_of_text
    caption = record(image(), said("a cat"))
    ids, labels = ids_and_labels(tasks["show_o"], caption)
    assert ids == [special.mmu, special.soi, special.eoi, end, *encode("a cat"), end]
    assert learned(labels) == [*encode("a cat"), end] and labels[3] == ids[4]
    ids, labels = ids_and_labels(tasks["clip"], caption)
    assert ids == [special.mmu, special.soi, special.eoi, *encode("a cat\n"), end] and labels[2] == ids[3]
    ids, labels = ids_and_labels(tasks["show_o"], record(said("a cat")))
    assert ids == [end, *encode("a cat"), end] and learned(labels) == ids[1:]


def test_answers_in_front_of_an_image_are_not_learned_by_show_o(tasks):
    """They attend to it, as they could not when they were written."""
    encode, end = tasks["show_o"].model.tokenizer.encode, tasks["show_o"].model.processor.end_of_text
    _, labels = ids_and_labels(
        tasks["show_o"], record(image(), text("a"), said("b"), image(seed=1), text("c"), said("d"))
    )
    assert learned(labels) == [*encode(" d"), end]
    with pytest.raises(ValueError, match="answers in front of all images"):
        tasks["show_o"].sample_builder.prepare(record(said("b"), image()), dice())


def test_conversations_of_emu3(tasks):
    """What a chat has in its prompt; the id that ends an answer is the label of its last row."""
    task = tasks["emu3"]
    encode, eos = task.model.tokenizer.encode, task.model.config.special_tokens.eos
    ids, labels = ids_and_labels(task, record(text("what?"), said("a cat"), text("sure?"), said("yes")))
    history = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a cat"}]
    rendered = task.model.processor.conversation_parts([*history, {"role": "user", "content": "sure?"}])
    prompt = [one for part in rendered for one in part.ids.tolist()]
    decode = task.model.tokenizer.decode
    assert decode(ids) == decode(prompt) + " yes"
    assert learned(labels) == [*encode(" a cat"), eos, *encode(" yes"), eos]
    ids, labels = ids_and_labels(task, record(said("a cat")))
    assert ids == [task.model.config.special_tokens.bos, *encode("a cat"), eos] and labels == [*ids[1:], IGNORE_INDEX]


def test_an_interleaved_record_of_emu3(tasks):
    """Text and image that carry loss with all that stands around the codes, then the id that ends the sequence."""
    task = tasks["emu3"]
    special = task.model.config.special_tokens
    sample = task.sample_builder.prepare(record(text("one"), image(), said("two"), image(loss=True, seed=1)), dice())
    assert sample.kind == "interleaved" and len(sample.pixel_values) == 2
    batch = task.sample_builder.collate([sample])
    pack = place_codes(task.model, batch)
    rows = (pack.labels != IGNORE_INDEX).nonzero().squeeze(1)
    n = sample.n_tokens
    start = pack.ids.tolist().index(special.eoi)
    # behind the given image everything is learned, up to the end, which is no row of its own
    assert rows.tolist() == list(range(start, n)) and pack.labels[n - 1] == special.eos
    assert torch.equal(pack.labels[rows[:-1]], pack.ids[rows[:-1] + 1])
    codes = torch.cat([task.model.encode_image(one).flatten() for one in batch.images])
    assert torch.equal(pack.ids[pack.ids >= special.code0] - special.code0, codes)


def test_images_to_generate_have_the_models_area(tasks):
    builder = tasks["emu3"].sample_builder
    (pixels,) = builder.prepare(record(text("a"), image(loss=True, size=(64, 16))), dice()).pixel_values
    assert tuple(pixels.shape[1:]) == (4, 16)  # 64 pixels, in the ratio of the image
    sample = tasks["show_o"].sample_builder.prepare(record(text("a"), image(loss=True, size=(64, 16))), dice())
    assert sample.target.shape == (24, 24, 3)


@pytest.mark.parametrize(
    ("one", "kind"),
    [(DRAWN, "generate"), (EDITED, "edit"), (CHAIN, "edit"), (ANSWERED, "understand"), (SAID, "text")],
)
@pytest.mark.parametrize("name", ["show_o", "clip", "emu3"])
def test_gradients_reach_what_a_record_is_about(tasks, name, one, kind):
    task = tasks[name]
    batch = task.sample_builder.collate([task.sample_builder.prepare(one, dice())], dice())
    losses = task.losses(batch)
    assert {name: loss.count for name, loss in losses.items()} == task.loss_counts(batch) and losses.keys() == {kind}
    losses[kind].total.backward()
    parts = {n.split(".")[0] for n, p in task.model.named_parameters() if p.grad is not None and p.grad.any()}
    task.model.zero_grad(set_to_none=True)
    sees = name == "clip" and any(not part.loss for part in one.images)
    assert parts == ({"decoder", "projector"} if sees else {"decoder"})


# ---- runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return [str(getattr(make, f"make_{name}")(folder)) for name in ("llava", "imagefolder", "pairs")]


@pytest.mark.parametrize(("name", "encoder"), [("show_o", MagvitV2), ("emu3", Emu3VQModel)])
def test_the_example_datasets_train_an_adapter(name, encoder, models, data, tmp_path):
    """With a cache of what the frozen tokenizer makes of the images; the adapter is what is released."""
    lora = {"rank": 2, "alpha": 4.0, "targets": ["decoder.attention"]}
    recipe = recipe_of(name, models, data, lora=lora, cache={"folder": str(tmp_path / "cache")})
    task = build_task(recipe)
    assert train(task, recipe, tmp_path / "run", workers=0) == 2
    assert list((tmp_path / "cache" / encoder.__name__).glob("*.safetensors"))
    model = (Emu3 if name == "emu3" else ShowO).from_pretrained(models[name]["from_pretrained"])
    model.load_adapter(tmp_path / "run" / "release")
    assert all(bool(update.b.any()) for update in model.adapters.updates("default").values())
    assert model.generate("a red image").image


def test_a_projector_trains_in_batches_of_samples(models, data, tmp_path):
    """As the released stages with CLIP are: so many samples, no packs, in every batch an image that CLIP reads."""
    groups = {"und": {"paths": data[:1], "mandatory": True}, "gen": {"paths": data[1:]}}
    options = {"dropout": 0.5, "frozen": ["decoder."]}
    changes = {"packing": None, "batch_size": 3, "options": options, "data": {"groups": groups, "max_broken": 0.7}}
    recipe = recipe_of("clip", models, **changes)
    task = build_task(recipe)
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    assert train(task, recipe, tmp_path / "run", workers=0) == 2
    changed = {name for name, p in task.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(name.startswith("projector.") for name in changed)
    released = ShowO.from_pretrained(tmp_path / "run" / "release")
    assert released.clip is not None and math.isfinite(released.projector.fc1.weight.sum().item())
    images_alone = dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, groups={"gen": recipe.data.groups["gen"]})
    )
    with pytest.raises(ValueError, match="none of which reaches a parameter that is trained"):
        train(build_task(images_alone), images_alone, tmp_path / "wrong", workers=0)


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        (
            "show_o",
            {"packing": PACKING | {"max_tokens_per_sample": 36}},
            "an image to generate of 36 tokens: every one",
        ),
        ("emu3", {"packing": PACKING | {"max_tokens_per_sample": 16}}, "an image to generate of 16 tokens"),
        ("show_o", {"options": {"dropout": 0.0, "frozen": ["dekoder"]}}, r"got frozen \['dekoder'\]"),
        ("emu3", {"options": {"dropout": 0.0, "frozen": [], "compile": False, "tasks": {}}}, "got 'tasks' in options"),
        ("emu3", {"model": {}}, "model of the recipe lacks from_pretrained"),
    ],
)
def test_wrong_recipes_are_errors_at_the_start(models, name, changes, reason):
    with pytest.raises(ValueError, match=reason):
        build_task(recipe_of(name, models, **changes))


def test_a_model_without_its_image_tokenizer_is_an_error_at_the_start(models):
    for name, part in (("show_o", "vq"), ("emu3", "vision_tokenizer")):
        recipe = recipe_of(name, models)
        model = {**models[name], "components": {part: None}}
        with pytest.raises(ValueError, match=f'loaded without its .*"{part}"'):
            build_task(dataclasses.replace(recipe, model=model))


def test_records_that_cannot_be_learned(tasks):
    system = record(text("be brief", role="system"), text("a"), image(loss=True))
    for name, one, reason in (
        ("show_o", system, "got a system prompt: Show-o generates images without one"),
        ("emu3", system, "got a system prompt: Emu3 generates images without one"),
        (
            "show_o",
            record(text("a"), said("b"), image(loss=True)),
            "of the kind interleaved, which Show-o does not learn",
        ),
        ("emu3", record(image(loss=True)), "without a text or an image"),
        ("show_o", record(text("what? " * 300), said("b")), "rows: expected at most 256, the decoder's positions"),
    ):
        with pytest.raises(ValueError, match=reason):
            tasks[name].sample_builder.prepare(one, dice())


def test_paths_are_opened_at_the_start(models):
    recipe = recipe_of("emu3", models, ["/nowhere/gone"])
    with pytest.raises(ValueError, match=r"data.groups.all: no dataset at /nowhere/gone"):
        build_batches(build_task(recipe), recipe)


# ---- the released stages

# docs/originals/show_o.md, "Training": steps, learning rate, warm-up, rows to generate, of text, to understand
STAGES = {
    "showo-stage1": (500_000, 1e-4, 5000, (15, 4, 10)),
    "showo-stage2": (1_000_000, 1e-4, 5000, (10, 4, 10)),
    "showo-stage3": (50_000, 2e-5, 5000, (10, 4, 10)),
    "showo-llava-pretrain": (14_000, 2e-5, 1000, (5, 2, 5)),
    "showo-llava-tuning": (16_000, 5e-5, 1000, (5, 2, 5)),
    "showo-clip-stage1": (10_000, 2e-3, 1000, (2, 2, 10)),
    "showo-clip-stage2": (19_600, 1e-4, 1000, (3, 1, 4)),
}


@pytest.mark.parametrize("name", STAGES)
def test_released_stages_of_show_o(name, models):
    full = read_recipe(RECIPES / f"{name}.yaml")
    steps, lr, warmup, rows = STAGES[name]
    assert (full.steps, full.lr, full.warmup_steps, full.batch_size) == (steps, lr, warmup, sum(rows))
    assert (full.betas, full.weight_decay, full.schedule, full.options["dropout"]) == (
        (0.9, 0.999),
        0.01,
        "cosine",
        0.1,
    )
    assert (full.loss_weights["generate"], full.loss_weights["understand"], full.loss_weights["text"]) == (
        1.0,
        1.0,
        0.1,
    )
    assert tuple(full.data.groups[group].weight for group in ("gen", "text", "und")) == rows
    assert f"as {rows[0]} : {rows[1]} : {rows[2]}" in " ".join(
        (RECIPES / f"{name}.yaml").read_text().replace("#", "").split()
    )
    assert full.model["from_pretrained"] in ShowO.RELEASES
    task = build_task(dataclasses.replace(full, model=models["clip" if "clip" in name else "show_o"]))
    trained = {part.split(".")[0] for part, p in task.model.named_parameters() if p.requires_grad}
    assert trained == {"projector"} if name == "showo-clip-stage1" else "decoder" in trained


def test_the_released_fine_tuning_of_emu3(models):
    full = read_recipe(RECIPES / "emu3-sft.yaml")
    assert (full.lr, full.lr * full.min_lr_ratio, full.betas, full.eps) == (
        1e-5,
        pytest.approx(1e-6),
        (0.9, 0.95),
        1e-6,
    )
    assert (full.weight_decay, full.max_grad_norm, full.warmup_steps, full.options["dropout"]) == (0.1, 5.0, 30, 0.05)
    assert full.model["from_pretrained"] in Emu3.RELEASES
    build_task(dataclasses.replace(full, model=models["emu3"]))


@pytest.mark.parametrize("name", ["showo-nano-finetune", "emu3-nano-finetune"])
def test_finetuning_of_the_small_models(name, models, data, tmp_path):
    path = RECIPES / f"{name}.yaml"
    settings = [
        f"data.groups.und.paths=[{data[0]}]",
        f"data.groups.gen.paths=[{data[1]}]",
        f"data.groups.edit.paths=[{data[2]}]",
    ]
    small = "options.sample_prompts=[]", "steps=1", "log_every=1", "data.max_broken=0.7"
    full = read_recipe(path, settings=[*settings, *small])
    full = dataclasses.replace(full, model=models["emu3" if name.startswith("emu3") else "show_o"])
    assert train(build_task(full), full, tmp_path / "run", workers=0) == 1
