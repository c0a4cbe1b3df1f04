"""BAGEL on records: the released plans, images of several sizes, packs that lack a kind of image, errors at the start."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from helpers.bagel_record_toys import NUMBERS, builder_of, recipe_numbers
from helpers.paths import RECIPES
from helpers.toys import LLM, VIT, picture, toy

from examples.data import make
from unimm.data.records import Record, RecordImage, RecordText
from unimm.models.bagel.config import BagelConfig
from unimm.models.bagel.model import Bagel
from unimm.nn.patches import patchify
from unimm.sequence.packing import pack_sequences
from unimm.training.config import TrainConfig, from_mapping, read_recipe
from unimm.training.freezing import freeze, stop_expert_gradients
from unimm.training.record_batches import build_batches, open_groups
from unimm.training.tasks.bagel_plans import ConditionDropout, drop_conditions
from unimm.training.tasks.bagel_records import BagelRecordConfig, BagelRecordTask, check_limit
from unimm.training.tasks.bagel_samples import BagelSampleBuilder
from unimm.training.tasks.base import build_task
from unimm.training.trainer import Trainer

NEVER = {"text": 0.0, "vae": 0.0, "vit": 0.0}


def options(**changes):
    return from_mapping(BagelRecordConfig, NUMBERS["options"] | {"dropout": NEVER} | changes, where="options")


@pytest.fixture(scope="module")
def model():
    return toy()


@pytest.fixture
def builder(model):
    return builder_of(model, options())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("data")
    return {
        name: getattr(make, f"make_{name.replace('-', '_')}")(folder)
        for name in ("bagel-t2i", "bagel-edit", "bagel-vlm")
    }


def image(i=0, *, loss=False, size=(30, 22)):
    return RecordImage(data=picture(*size, seed=i), loss=loss)


def text(words, **options):
    return RecordText(wordings=(words,), **options)


def answer(words, **options):
    return text(words, loss=True, role="assistant", **options)


def record(*parts):
    return Record(parts=parts, source="here", row=0)


def described(sample):
    """The parts: "t" a text, "T" one with loss, "v" a ViT image, "l" clean latents, "n" noised ones."""
    letters = {"und_image": "v", "gen_image": "l", "text": "t"}
    return "".join(
        "n" if part.noised else "T" if (part.labels >= 0).any() else letters[part.kind] for part in sample.parts
    )


@pytest.mark.parametrize(
    ("parts", "plan"),
    [
        ([text("a cat"), image(loss=True)], "tn"),
        ([image(), text("make it red"), image(1, loss=True)], "lvtn"),
        ([image(), image(1), text("join them"), image(2, loss=True)], "lvlvtn"),
        ([image(), text("what is it"), answer("a cat")], "vtT"),
        ([text("see"), image(), text("and"), image(1), answer("cats"), text("why"), answer("so")], "tvtvTtT"),
        ([text("two and two"), answer("four")], "tT"),
        ([text("story"), answer("first"), image(loss=True), answer("then"), image(1, loss=True)], "tTnlvTn"),
        ([text("grass"), answer("it is green", thinking=True), image(loss=True)], "ttTn"),
        ([image(), text("is it red"), answer("it is", thinking=True), answer("yes")], "tvtT"),
    ],
)
def test_plans_of_every_kind_of_record(builder, parts, plan):
    sample = builder.prepare(record(*parts), random.Random(0))
    assert described(sample) == plan
    assert sample.n_tokens == sum(part.segment.length for part in sample.parts)


def test_an_intermediate_target_is_the_condition_of_the_next_step(builder):
    """Same image, same tokens: noised, it neither advances the position nor is seen; then clean, then patches."""
    chain = record(image(), text("a"), image(1, loss=True), text("b"), image(2, loss=True))
    samples = [builder.prepare(chain, random.Random(seed)) for seed in range(40)]
    plans = {described(sample) for sample in samples}
    # one step, from the first image or the second; two steps; two in one
    assert plans == {"lvtn", "lvtnlvtn"}
    two = next(sample for sample in samples if described(sample) == "lvtnlvtn")
    noised, clean = two.parts[3], two.parts[4]
    assert torch.equal(noised.tokens, clean.tokens) and clean.timestep == 0 < noised.timestep < 1
    assert not noised.segment.visible and noised.segment.advance == 0
    assert clean.segment.visible and clean.segment.advance == 1
    assert len(two.images) == 3


def test_reasoning_of_an_answer_is_part_of_it(model):
    thought = record(text("is it red"), answer("it is", thinking=True), answer("yes"))
    ids = builder_of(model, options()).prepare(thought, random.Random(0)).parts[-1].ids
    assert ids.tolist()[1:-1] == model.tokenizer.encode("<think>it is</think>yes")
    plain = builder_of(model, options(think_prob=0.0)).prepare(thought, random.Random(0))
    assert described(plain) == "tT" and plain.parts[-1].ids.tolist()[1:-1] == model.tokenizer.encode("yes")


def test_conditions_are_dropped_as_released(model):
    """Texts leave nothing, images a position; reasoning goes with its prompt; answers' images and the system stay."""
    dropping = builder_of(model, options(dropout={"text": 1.0, "vae": 1.0, "vit": 1.0}))
    edit = dropping.prepare(record(image(), text("make it red"), image(1, loss=True)), random.Random(0))
    assert [(part.segment.length > 0, part.segment.advance) for part in edit.parts] == [
        (False, 1),
        (False, 1),
        (True, 0),
    ]
    thought = record(text("grass"), answer("it is green", thinking=True), image(loss=True))
    assert described(dropping.prepare(thought, random.Random(0))) == "tn"
    asked = record(image(), text("what is it"), answer("a cat"))
    assert described(dropping.prepare(asked, random.Random(0))) == "vtT"
    numbers = iter([0.05, 0.5, 0.5])
    parts = builder_of(model, options()).plan(thought, FakeImages(), random.Random(0))
    kept = drop_conditions(parts, ConditionDropout(text=0.1), lambda: next(numbers))
    # one draw alone, for the prompt
    assert len(kept) == 1 and list(numbers) == [0.5, 0.5]


class FakeImages:
    generates = True

    def planned(self, image, *, ends):
        return []


def test_noised_copies_of_a_target(model):
    several = builder_of(model, options(timesteps_per_image=3))
    sample = several.prepare(record(text("a"), image(loss=True)), random.Random(0))
    assert described(sample) == "tnnn" and len(sample.images) == 1
    assert len({part.timestep for part in sample.parts[1:]}) == 3


def test_images_of_several_sizes_are_encoded_as_if_alone(model, builder):
    sizes = [(30, 22), (48, 16), (30, 22), (16, 40)]
    samples = [
        builder.prepare(record(text("a"), image(i, loss=True, size=size)), random.Random(i))
        for i, size in enumerate(sizes)
    ]
    batch = builder.collate(samples, random.Random(1))
    assert [len(group) for group in batch.images] == [2, 1, 1]
    pack = BagelRecordTask(model, builder).encode_images(batch)
    noises = [batch.posterior[0][0], batch.posterior[1][0], batch.posterior[0][1], batch.posterior[2][0]]
    expected = []
    for i, (size, noise) in enumerate(zip(sizes, noises, strict=True)):
        pixels = np.array(model.config.vae_transform(picture(*size, seed=i)))
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        expected.append(patchify(model.vae.encode(x, noise=noise[None])[0], 2))
    torch.testing.assert_close(pack.gen_images.content, torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_losses_are_those_of_each_sample_alone(model, builder):
    """Packed together, with fillers where a kind of image is missing."""
    task = BagelRecordTask(model, builder)
    records = [
        record(text("a b c"), image(loss=True)),
        record(image(3, size=(40, 24)), text("what"), answer("a cat")),
        record(text("two"), answer("four or five")),
    ]
    samples = [builder.prepare(one, random.Random(i)) for i, one in enumerate(records)]
    batch = builder.collate(samples, random.Random(0))
    # the same noise for the only target
    noise = batch.noise
    together = task.losses(batch)
    assert {name: loss.count for name, loss in together.items()} == task.loss_counts(batch) == {"ce": 7, "mse": 12}
    alone = []
    for sample in samples:
        one = builder.collate([sample], random.Random(0))
        one = dataclasses.replace(
            one, posterior=(batch.posterior[0], *one.posterior[1:]) if sample.images else one.posterior
        )
        alone.append(task.losses(dataclasses.replace(one, noise=noise[: len(one.noise)])))
    for name in ("ce", "mse"):
        total = sum(losses[name].total for losses in alone)
        torch.testing.assert_close(together[name].total, total, rtol=1e-4, atol=1e-5)


def test_a_pack_without_images_reaches_every_part(model, builder):
    """On several ranks a part that one rank leaves out would make the others wait; its gradient is 0."""
    task = BagelRecordTask(model, builder)
    sample = builder.prepare(record(text("two"), answer("four")), random.Random(0))
    batch = builder.collate([sample], random.Random(0))
    model.zero_grad()
    losses = task.losses(batch)
    sum(loss.total for loss in losses.values()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if not name.startswith("vae.")}
    missing = [name for name, grad in grads.items() if grad is None]
    assert not missing
    assert not grads["vision.patch_embed.weight"].any() and not grads["vae2llm.weight"].any()
    assert grads["decoder.embed.weight"].any() and batch.n_noised == 0
    model.zero_grad()
    plain = model(pack_sequences([list(sample.parts)]), torch.zeros(0, model.config.latent_dim))
    torch.testing.assert_close(losses["ce"].total, plain.ce.sum())


def test_records_that_the_model_has_no_parts_for(model):
    understands = builder_of(toy(top={"visual_gen": False}), options())
    draws = record(text("a"), image(loss=True))
    with pytest.raises(ValueError, match="an image to generate, and a model that generates none"):
        understands.prepare(draws, random.Random(0))
    asks = record(image(), text("what"), answer("a cat"))
    assert described(understands.prepare(asks, random.Random(0))) == "vtT"
    generates = builder_of(toy(top={"visual_und": False}), options())
    with pytest.raises(ValueError, match="an image to understand, and a model without a ViT"):
        generates.prepare(asks, random.Random(0))
    with pytest.raises(ValueError, match="neither a text nor an image carries loss"):
        generates.prepare(record(text("a"), answer("b", thinking=True)), random.Random(0))


def test_wrong_options_are_errors_at_the_start(model, data):
    for change, message in (
        (
            {"vae_transform": {"max_image_size": 48, "min_image_size": 16, "image_stride": 12}},
            "expected a multiple of 8",
        ),
        (
            {"vit_transform": {"max_image_size": 80, "min_image_size": 16, "image_stride": 8}},
            "at most 64, the model's table",
        ),
        ({"dropout": {"txt": 0.1}}, "got 'txt' in dropout of the options.* did you mean 'text'"),
        ({"frozn": []}, "got 'frozn' in options.* did you mean 'frozen'"),
        ({"vit_transform": {"max_size": 48}}, "vit_transform"),
    ):
        with pytest.raises(ValueError, match=message):
            builder_of(model, options(**change))
    recipe = from_mapping(TrainConfig, recipe_numbers(data), where="here")
    small = dataclasses.replace(recipe.packing, max_tokens_per_sample=5)
    with pytest.raises(ValueError, match="max_tokens_per_sample 5, and the smallest square image .* has 6 tokens"):
        check_limit(builder_of(model, options()), dataclasses.replace(recipe, packing=small))
    with pytest.raises(ValueError, match="got data for the task 'vit': expected none, or one of .*'bagel'"):
        build_task(dataclasses.replace(recipe, task="vit"))
    for change, message in (
        (
            {"from_pretrained": "bagel-nano", "dtyp": "float32"},
            "got 'dtyp' in model of the recipe.* did you mean 'dtype'",
        ),
        ({}, "model of the recipe lacks from_pretrained"),
        ({"from_pretrained": "bagel-nono"}, "bagel-nono"),
    ):
        with pytest.raises(ValueError, match=message):
            build_task(dataclasses.replace(recipe, task="bagel", model=change))


@pytest.mark.parametrize(
    ("name", "lr", "tokens", "shift", "shares"),
    [
        ("bagel-alignment", 1e-3, (32768, 36864, 16384), 1.0, {"i2t": 1.0}),
        ("bagel-pretrain", 1e-4, (32768, 36864, 16384), 1.0, {"text": 0.05, "t2i": 0.6, "i2t": 0.1, "web": 0.05}),
        ("bagel-continue", 1e-4, (40960, 46080, 40960), 4.0, {"text": 0.05, "t2i": 0.4, "i2t": 0.1, "web": 0.15}),
        ("bagel-sft", 2.5e-5, (40960, 46080, 40960), 4.0, {"text": 0.05, "t2i": 0.3, "i2t": 0.05, "web": 0.2}),
        ("bagel-finetune", 2e-5, (10240, 11520, 10240), 4.0, {}),
    ],
)
def test_recipes_of_the_published_stages(name, lr, tokens, shift, shares):
    """arXiv 2505.14683, table 3, and TRAIN.md; their images fit into the released model's tables."""
    recipe = read_recipe(RECIPES / f"{name}.yaml")
    packing = recipe.packing
    assert (packing.expected_tokens, packing.max_tokens, packing.max_tokens_per_sample) == tokens
    assert recipe.lr == lr and recipe.betas == (0.9, 0.95) and recipe.eps == 1e-15 and recipe.max_grad_norm == 1.0
    found = from_mapping(BagelRecordConfig, recipe.options, where="options")
    assert found.timestep_shift == shift
    groups = recipe.data.groups
    assert {group: groups[group].weight for group in shares} == shares
    assert not shares or sum(group.weight for group in groups.values()) == pytest.approx(1)
    released = BagelConfig.from_json(LLM, VIT | {"patch_size": 14, "image_size": 980}, {})
    builder = BagelSampleBuilder(options=found, config=released, processor=None, tokenizer=None)
    check_limit(builder, recipe)
    assert builder.least_image_tokens == (256 if tokens[0] == 32768 else 512) ** 2 // 16**2 + 2


def test_the_example_formats_are_read_and_teach(data, tmp_path):
    """A few steps on BAGEL's three formats: every group is there, and what was packed first has a smaller loss after."""
    recipe = from_mapping(TrainConfig, recipe_numbers(data, lr=3e-3), where="here")
    task = build_task(recipe)
    batches = build_batches(task, recipe)
    made = list(batches.iterate(0, 12, workers=0))
    trainer = Trainer(task, recipe, torch.device("cpu"))
    trainer.model.eval()
    held = made[0]

    def loss_of(batch):
        with torch.no_grad():
            losses = task.losses(batch)
        return sum(recipe.loss_weights[name] * float(loss.mean) for name, loss in losses.items())

    before = loss_of(held)
    for batch in made:
        trainer.update(batch)
    trainer.model.eval()
    assert loss_of(held) < 0.8 * before
    figures = batches.figures()
    n_waiting = sum(len(lane["waiting"]) for lane in batches.state_dict()["lanes"])
    # the video has 12 images, more than the limit
    assert figures["rows"] == figures["samples"] + n_waiting + figures["left_out"] and not figures["broken_rows"]
    assert figures["left_out"] <= 5
    assert 0.5 < figures["tokens"] / figures["capacity"] <= 1
    task.save(tmp_path)
    assert (tmp_path / "ema.safetensors").exists() and (tmp_path / "ae.safetensors").exists()


def test_bagel_nano_goes_on_from_its_release(data, tmp_path):
    """The recipe that the guide names, on the example data: built, a step taken, saved as a release that loads."""
    paths = {"t2i": "bagel-t2i", "edit": "bagel-edit", "vlm": "bagel-vlm"}
    settings = [f"data.groups.{name}.paths=['{data[path]}']" for name, path in paths.items()]
    recipe = read_recipe(RECIPES / "bagel-nano-finetune.yaml", settings=[*settings, "options.timestep_shift=3.0"])
    task = build_task(recipe)
    (batch,) = build_batches(task, recipe).iterate(0, 1, workers=0)
    trainer = Trainer(task, recipe, torch.device("cpu"))
    before = task.model.decoder.blocks[0].experts["gen"].q.weight.detach().clone()
    trainer.update(batch)
    assert not torch.equal(before, task.model.decoder.blocks[0].experts["gen"].q.weight)
    task.save(tmp_path)
    released = Bagel.from_pretrained(tmp_path)
    assert released.config.train_timestep_shift == 3.0
    assert released.tokenizer.encode("a red circle") == task.model.tokenizer.encode("a red circle")


def test_an_expert_is_frozen_by_a_prefix_with_a_star(model):
    und = toy()
    freeze(und, ["decoder.blocks.*.experts.und.", "decoder.norms.und"], always=("vae.",))
    trained = {name for name, p in und.named_parameters() if p.requires_grad}
    assert not any("experts.und" in name or name.startswith("vae.") for name in trained)
    assert {"decoder.blocks.0.experts.gen.q.weight", "decoder.embed.weight", "decoder.norms.gen.weight"} <= trained
    with pytest.raises(ValueError, match=r"got frozen \['decoder.\*.gon'\], expected prefixes of parameters"):
        freeze(und, ["decoder.*.gon"])


def test_no_gradient_passes_through_an_expert_that_is_stopped():
    """As if the states of its rows were constants; with the parameters frozen alone, others come through them."""
    found = {}
    for way in ("frozen", "stopped", "constants"):
        model = toy()
        model.train()
        freeze(
            model, ["decoder.blocks.*.experts.und.", "decoder.norms.und", "decoder.embed", "vision."], always=("vae.",)
        )
        if way == "stopped":
            model.requires_grad_(True)
            freeze(model, ["vision."], always=("vae.",))
            stop_expert_gradients(model.decoder, "und")
        task = BagelRecordTask(model, builder_of(model, options()))
        steps = [image(0), text("a"), image(1, loss=True), text("b c"), image(2, loss=True)]
        sample = task.sample_builder.prepare(record(*steps), random.Random(1))
        batch = task.sample_builder.collate([sample], random.Random(0))
        if way == "constants":
            kept = []
            hooks = [
                block.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
                for block in model.decoder.blocks
            ]
            with torch.no_grad():
                task.losses(batch)
            for hook, states, block in zip(hooks, list(kept), model.decoder.blocks, strict=True):
                hook.remove()
                given = states["und"]
                block.register_forward_pre_hook(lambda _, args, given=given: ({**args[0], "und": given}, *args[1:]))
        task.losses(batch)["mse"].mean.backward()
        found[way] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert found["stopped"].keys() == found["constants"].keys() <= found["frozen"].keys()
    assert not any(
        "experts.und" in name or name.startswith(("decoder.embed", "connector")) for name in found["stopped"]
    )
    for name, gradient in found["stopped"].items():
        torch.testing.assert_close(gradient, found["constants"][name])
    name = "decoder.blocks.0.experts.gen.v.weight"
    assert not torch.allclose(found["stopped"][name], found["frozen"][name], rtol=1e-3)


def test_a_broken_row_of_an_edit_and_a_missing_column_say_so(data, tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    rows = [
        {"image_list": [make.image_bytes(0), make.image_bytes(1)], "instruction_list": wordings}
        for wordings in ([], [["a"]])
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    recipe = from_mapping(TrainConfig, recipe_numbers(data), where="here")
    group = dataclasses.replace(recipe.data.groups["edit"], paths=(str(tmp_path),))
    changed = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, groups={"edit": group}))
    batches = build_batches(build_task(recipe), changed)
    with pytest.raises(ValueError, match="rows are broken, .* got 0 instructions for 2 images: expected 1"):
        list(batches.iterate(0, 4, workers=0))
    named = dataclasses.replace(recipe.data.groups["t2i"], format="bagel-edit")
    with pytest.raises(ValueError, match=r"data.groups.t2i: .* has no column image_list, instruction_list"):
        open_groups(dataclasses.replace(recipe.data, groups={"t2i": named}))
