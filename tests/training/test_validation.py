"""Validation: the losses on held-out batches, the same every time, by the averaged weights or the current ones."""

import dataclasses
import json
import logging
import os
import signal

import pytest
import torch
from helpers.bagel_record_toys import recipe_numbers
from helpers.paths import RECIPES
from helpers.trainer_toy import RECIPE, Draw, Toy, assert_same_files, run
from safetensors.torch import load_file

from examples.data import make
from tests.training.test_janus_training import folder, objective, quick_text_model  # noqa: F401, fixtures
from unimm.training.config import TrainConfig, from_mapping, read_recipe
from unimm.training.data_config import ValidationConfig
from unimm.training.losses import LossSum, mean_losses
from unimm.training.parallel import TaskLosses
from unimm.training.record_batches import held_out_groups, open_groups
from unimm.training.tasks.base import build_task
from unimm.training.trainer import train
from unimm.training.validation import Validation

CPU = torch.device("cpu")
EVERY_3 = ValidationConfig(every=3, batches=4)
VALIDATED = dataclasses.replace(RECIPE, validation=EVERY_3, ema_decay=0.5)


class HeldOutToy(Toy):
    """The toy, with batches for validation that get larger and larger."""

    def __init__(self, at=None, action=None):
        super().__init__(at, action)
        self.held_out_batch = lambda number: Draw(77)(number).repeat(number + 1, 1)


def lines(out, *, validation: bool):
    every = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in every if ("validation" in line) == validation]


def test_it_is_logged_at_its_steps_and_at_the_end(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(tmp_path, recipe=VALIDATED, toy=HeldOutToy())
    found = lines(tmp_path, validation=True)
    assert [line["step"] for line in found] == [3, 6, 8]
    for line in found:
        shown = line["validation"]
        assert shown["weights"] == "average" and shown["losses"].keys() == {"near", "small"}
        assert shown["loss"] == pytest.approx(shown["losses"]["near"] + 0.5 * shown["losses"]["small"])
    assert [line["step"] for line in lines(tmp_path, validation=False)] == list(range(1, 9))
    assert "step 3 of 8  validation: near" in caplog.text


@pytest.mark.parametrize("weights", ["average", "current"])
def test_it_is_the_mean_over_all_batches_by_the_weights_it_names(tmp_path, weights):
    recipe = dataclasses.replace(VALIDATED, validation=dataclasses.replace(EVERY_3, weights=weights))
    toy, _ = run(tmp_path, recipe=recipe, toy=HeldOutToy())
    # of the last step: of batches of 4, 8, 12 and 16 rows, weighed by their rows
    rows = torch.cat([toy.held_out_batch(number) for number in range(4)])
    (released,) = (tmp_path / "release").glob("*.safetensors")
    checkpoint = tmp_path / "checkpoints" / "00000008" / "model.safetensors"
    toy.model.load_state_dict(load_file(released if weights == "average" else checkpoint))
    toy.model.eval()
    with torch.no_grad():
        expected = mean_losses(toy.losses(rows))
    shown = lines(tmp_path, validation=True)[-1]["validation"]["losses"]
    assert shown == pytest.approx({name: x.item() for name, x in expected.items()}, rel=1e-5)


def test_it_does_not_move_the_run(tmp_path):
    """Whose dropout draws from the same generator as before; and it is the same whenever it is run."""
    run(
        tmp_path / "with",
        recipe=dataclasses.replace(VALIDATED, validation=dataclasses.replace(EVERY_3, every=1)),
        toy=HeldOutToy(),
    )
    run(tmp_path / "without", recipe=dataclasses.replace(VALIDATED, validation=None))
    paths = (tmp_path / name / "checkpoints/00000008/model.safetensors" for name in ("with", "without"))
    assert_same_files(*paths)
    toy = HeldOutToy()
    toy.model.eval()
    validation = Validation(toy, VALIDATED)
    first = validation.run(TaskLosses(toy, VALIDATED, CPU), CPU, workers=0)
    torch.manual_seed(5)
    assert validation.run(TaskLosses(toy, VALIDATED, CPU), CPU, workers=2) == first


def test_a_resumed_run_logs_what_the_whole_one_does(tmp_path):
    run(tmp_path / "whole", recipe=VALIDATED, toy=HeldOutToy())
    stopped = HeldOutToy(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run(tmp_path / "parts", recipe=VALIDATED, toy=stopped)[1] == 4
    run(tmp_path / "parts", recipe=VALIDATED, toy=HeldOutToy(), resume=True)
    assert lines(tmp_path / "parts", validation=True) == lines(tmp_path / "whole", validation=True)


def test_a_task_without_held_out_batches_is_an_error_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="validation for the task 'toy', which has no held-out batches"):
        run(tmp_path, recipe=VALIDATED)
    assert not (tmp_path / "log.jsonl").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"every": 0, "batches": 1}, "every"),
        ({"every": 5}, "validation in recipe lacks batches"),
        ({"every": 5, "batches": 1, "weights": "ema"}, "weights"),
        ({"every": 5, "batches": 1, "split": "test"}, "split"),
    ],
)
def test_wrong_sections_are_named(values, message):
    numbers = dataclasses.asdict(RECIPE) | {"validation": values}
    with pytest.raises(ValueError, match=message):
        from_mapping(TrainConfig, numbers, where="recipe")


def test_held_out_batches_are_others_than_those_trained_on(objective):  # noqa: F811
    """Of the same kinds, and the same every time; small scenes may be equal by chance."""
    held_out = objective.held_out_batch
    batch = held_out(0)
    assert torch.equal(batch.images, held_out(0).images)
    seen = {image.numpy().tobytes() for number in range(3) for image in objective.batch(number).images}
    shared = sum(image.numpy().tobytes() in seen for image in batch.images)
    assert shared < len(batch.images) / 4
    assert set(objective.losses(batch)) == set(objective.losses(objective.batch(0)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make.make_all(tmp_path_factory.mktemp("data"))


def of_records(examples, held_out=0.0, **validation):
    """A recipe on records of which the group of edits may hold out some."""
    numbers = recipe_numbers(examples, steps=2, sample_every=100, validation={"every": 1, "batches": 3, **validation})
    numbers["data"]["groups"]["edit"]["held_out"] = held_out
    return from_mapping(TrainConfig, numbers, where="here")


def rows_of(groups):
    sources = [source for group in groups for source in group.sources]
    return {(one.source, one.row) for source in sources for one in source.read(range(source.n_rows))}


def test_groups_hold_out_rows_that_are_not_trained_on(data):
    whole = rows_of(open_groups(of_records(data).data))
    groups = open_groups(of_records(data, held_out=0.3).data)
    held_out = held_out_groups(groups)
    assert [group.name for group in held_out] == ["edit"] and held_out[0].weight == 2.0
    assert rows_of(groups).isdisjoint(rows_of(held_out)) and rows_of(groups) | rows_of(held_out) == whole


@pytest.mark.parametrize("own", [False, True])
def test_records_are_validated_on_what_groups_hold_out_or_on_datasets_of_their_own(data, tmp_path, own):
    section = {"data": {"groups": {"t2i": {"paths": [str(data["bagel-t2i"])]}}}} if own else {}
    recipe = of_records(data, held_out=0.0 if own else 0.3, **section)
    assert train(build_task(recipe), recipe, tmp_path, workers=0) == 2
    found = lines(tmp_path, validation=True)
    assert [line["step"] for line in found] == [1, 2]
    # edits alone, or images from texts alone, which carry no loss of texts
    assert all(line["validation"]["losses"].keys() == {"mse"} for line in found)
    assert found[0]["validation"]["loss"] != found[1]["validation"]["loss"]


def test_validation_batches_of_records_are_the_same_every_time(data):
    recipe = of_records(data, held_out=0.3)
    groups = open_groups(recipe.data)
    task = build_task(recipe)
    task.model.eval()
    losses = TaskLosses(task, recipe, CPU)
    first = Validation(task, recipe, groups).run(losses, CPU, workers=0)
    again = Validation(task, recipe, groups)
    assert again.run(losses, CPU, workers=1) == first == again.run(losses, CPU, workers=0)


def test_nothing_held_out_of_records_is_an_error_before_anything_is_built(data, tmp_path):
    recipe = of_records(data)
    with pytest.raises(ValueError, match="groups of data that hold out nothing: give one `held_out: 0.01`"):
        train(build_task(recipe), recipe, tmp_path, workers=0)
    missing = {"data": {"groups": {"t2i": {"paths": ["/nowhere"]}}}}
    with pytest.raises(ValueError, match=r"validation.data.groups.t2i: .*nowhere"):
        train(build_task(recipe), of_records(data, **missing), tmp_path, workers=0)
    assert not (tmp_path / "log.jsonl").exists()


@pytest.mark.parametrize("name", ["bagel-nano-vae", "bagel-nano-vit", "janus-nano-vq"])
def test_parts_have_held_out_batches(name):
    task = build_task(dataclasses.replace(read_recipe(RECIPES / f"{name}.yaml"), batch_size=2))
    task.model.eval()
    with torch.no_grad():
        losses = task.losses(task.held_out_batch(0))
    assert losses and all(isinstance(loss, LossSum) and torch.isfinite(loss.total) for loss in losses.values())
