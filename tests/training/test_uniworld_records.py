"""Records as samples of UniWorld: sizes, prompts, edit weights, batches of one size, and what cannot be learned."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from helpers.records import as_record, dice, image, record, said, text
from PIL import Image

from tests.training.test_uniworld_training import changed, recipe  # noqa: F401
from unimm.data.records import RecordImage
from unimm.data.shapes import example
from unimm.training.losses import mean_losses
from unimm.training.tasks.base import build_task
from unimm.training.tasks.edit_weights import EditWeights
from unimm.vlms.qwen2_5_vl.processor import IMAGE_PAD


@pytest.fixture(scope="module")
def world(recipe):  # noqa: F811
    return build_task(changed(recipe, dropout=0.0, timesteps_per_image=1, edit_weights="log"))


@pytest.fixture(scope="module")
def builder(world):
    return dataclasses.replace(world.builder, kinds=("generate", "edit"))


def stirred(model):
    """A denoiser from scratch says nothing: it says something from now on."""
    torch.manual_seed(0)
    for p in model.denoiser.parameters():
        p.add_(0.1 * torch.randn_like(p))


@pytest.mark.parametrize("task", ["draw.two", "edit.recolour"])
@torch.no_grad()
def test_a_sample_has_the_loss_that_the_shapes_world_gives_it(world, task):
    stirred(world.model)
    one = example(task, 3, seed=0)
    given = world.batch.sample(one, dice(1))
    made = world.builder.prepare(as_record(one, edit_weights=True), dice(1))
    # the weights of an edit are those of the images as the MLLM is shown them, which has another size
    made = dataclasses.replace(made, kind=given.kind, weights=given.weights)
    losses = [mean_losses(world.losses(world.builder.collate([sample], dice(2)))) for sample in (given, made)]
    assert losses[0].keys() == losses[1].keys() == {task.split(".")[0]}
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, rtol=1e-5, atol=1e-6)


def test_targets_are_resized_to_the_nearest_ratio(builder):
    many = dataclasses.replace(builder, n_ratios=5, image_pixels=128 * 128)
    for size, expected in (((300, 301), (128, 128)), ((400, 310), (96, 128)), ((310, 400), (128, 96))):
        sample = many.prepare(record(text("a"), image(loss=True, size=size)), dice())
        assert sample.target.shape == (*expected, 3) and sample.weights.shape == (1, expected[0] // 8, expected[1] // 8)
        assert many.batch_key(sample) == (*expected, False)
    wide = many.prepare(record(image(), text("b"), image(loss=True, size=(400, 310))), dice())
    assert many.batch_key(wide) == (96, 128, True) and wide.reference.shape == (96, 128, 3)
    batch = pickle.loads(pickle.dumps(many)).collate([wide, wide], dice())  # noqa: S301, as for a worker process
    assert batch.noise.shape == (2 * many.options.timesteps_per_image, 4, 12, 16)
    assert batch.samples.images.shape == (2, 3, 96, 128) == batch.samples.reference_images.shape


def test_an_edit_of_another_size_trains(world, builder):
    with torch.no_grad():
        stirred(world.model)
    many = dataclasses.replace(builder, n_ratios=5, image_pixels=96 * 96)
    samples = [
        many.prepare(record(image(seed=i), text("b"), image(loss=True, size=(400, 310), seed=i + 2)), dice(i))
        for i in range(2)
    ]
    world.builder = many
    try:
        losses = world.losses(many.collate(samples, dice()))
        assert set(losses) == {"edit"} and losses["edit"].count == 2 and torch.isfinite(losses["edit"].total)
        losses["edit"].total.backward()
        assert world.model.siglip_projector.fc1.weight.grad.any() and world.model.mllm_projector.fc1.weight.grad.any()
    finally:
        world.builder = world.batch.builder
        world.model.zero_grad(set_to_none=True)


def edit(box, *, size=(112, 112), weighted=True):
    """An edit that paints a box of a grey image."""
    before = Image.new("RGB", size, (128, 128, 128))
    after = before.copy()
    after.paste((255, 0, 0), box)
    parts = (RecordImage(data=before), text("paint it"), RecordImage(data=after, loss=True))
    return record(*parts, edit_weights=weighted)


def test_where_an_edit_changed_the_image_its_loss_counts_more(builder):
    one = edit((0, 0, 56, 56))
    sample = builder.prepare(one, dice())
    transform = builder.processor.mllm_processor.image_processor
    before, after = (np.asarray(transform(part.data)) for part in (one.parts[0], one.parts[2]))
    expected = EditWeights(function="log")([before], after)
    assert sample.weights.shape == (1, 8, 8) and sample.weights.max() == expected.max() > 1
    assert sample.weights[0, 0, 0] > 1 == sample.weights[0, -1, -1]
    # a row of a dataset without weights, an option without, and images of several sizes count evenly
    assert builder.prepare(edit((0, 0, 56, 56), weighted=False), dice()).weights.eq(1).all()
    plain = dataclasses.replace(builder, options=dataclasses.replace(builder.options, edit_weights=""))
    assert plain.prepare(one, dice()).weights.eq(1).all()
    other = record(image(size=(200, 30)), text("a"), image(loss=True, size=(60, 60)), edit_weights=True)
    assert builder.prepare(other, dice()).weights.eq(1).all()


def test_an_edit_of_almost_nothing_is_a_broken_row(builder):
    with pytest.raises(ValueError, match="got an edit of .* of an image, expected"):
        builder.prepare(edit((0, 0, 12, 12), size=(1120, 1120)), dice())


def test_prompts_are_dropped_and_images_stand_in_place(world, builder):
    words = world.model.mllm.tokenizer

    def written(made, *parts):
        ids = torch.cat([part.ids for part in made.prepare(record(*parts), dice()).parts]).tolist()
        return words.decode(ids)

    dropped = dataclasses.replace(builder, prompt_dropout=1.0)
    asked = (image(), text("make it red"), image(loss=True))
    assert "Generate an image." in written(dropped, *asked) and "red" not in written(dropped, *asked)
    assert "make it red" in written(builder, *asked)
    placed = dataclasses.replace(builder, images_in_place=True)
    mixed = record(text("like"), image(), text("paint"), image(seed=1), image(loss=True))
    expected = builder.processor.prompt_parts(
        f"like\n{IMAGE_PAD}\npaint\n{IMAGE_PAD}", [part.data for part in mixed.images[:2]]
    )
    found = placed.prepare(mixed, dice()).parts
    assert [part.kind for part in found] == [part.kind for part in expected]
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ((text("a"), said("b")), "of the kind text, which UniWorld does not learn: expected generate, edit"),
        ((image(), text("a"), said("b")), "of the kind understand, which UniWorld does not learn"),
        ((text("a"), said("b"), image(loss=True)), "of the kind interleaved"),
        ((text("a", role="system"), text("b"), image(loss=True)), "UniWorld's is that of its config.json"),
        ((image(loss=True),), "without a text or an image"),
        ((text("a"), RecordImage(data=b"x", loss=True, name="the target")), "cannot read the target"),
    ],
)  # fmt: skip
def test_records_that_cannot_be_learned(builder, parts, reason):
    with pytest.raises(ValueError, match=reason):
        builder.prepare(record(*parts), dice())
