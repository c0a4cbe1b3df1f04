"""Batches of records: the same for any number of processes, after any stop, and no row lost on other numbers of ranks."""

import dataclasses
import json
import random
from collections import Counter
from contextlib import closing
from dataclasses import dataclass

import pytest

from examples.data import make
from unimm.training.config import TrainConfig, from_mapping
from unimm.training.record_batches import PackedBatches, open_groups, workers_for

NUMBERS = dict(
    task="toy", seed=3, steps=8, batch_size=1, lr=0.01, betas=[0.9, 0.99], eps=1e-8, weight_decay=0.1, muon=[], warmup_steps=2,
    schedule="constant", min_lr_ratio=0.1, max_grad_norm=1.0, ema_decay=0.9, precision="float32", loss_weights={"near": 1.0},
    save_every=4, sample_every=4, log_every=1,
)  # fmt: skip


@dataclass(frozen=True)
class Text:
    text: str
    chance: float

    @property
    def n_tokens(self) -> int:
        return len(self.text.split())


class TextBuilder:
    """Texts with the random numbers that they were given."""

    def prepare(self, record, rng):
        return Text(record.texts[0].text, rng.random())

    def collate(self, samples, rng):
        return [(one.text, one.chance) for one in samples], rng.random()


def write(folder, name, n, broken=()):
    """n texts of 1 to 5 words; the rows in `broken` are none."""
    rows = [{"parts": [{"text": f"{name}{i}" + " x" * (7 * i % 5), "loss": True}]} for i in range(n)]
    path = folder / f"{name}.jsonl"
    make.write_lines(path, [{} if i in broken else row for i, row in enumerate(rows)])
    return str(path)


@pytest.fixture
def recipe(tmp_path):
    groups = {
        "a": {"paths": [write(tmp_path, "a", 23)], "format": "records", "weight": 3.0},
        "b": {"paths": [write(tmp_path, "b", 9)], "format": "records", "mandatory": True},
    }
    packing = {"expected_tokens": 9, "max_tokens": 11, "max_tokens_per_sample": 5, "buffer_size": 2}
    data = {"groups": groups, "lanes": 4}
    return from_mapping(TrainConfig, NUMBERS | {"data": data, "packing": packing}, where="here")


def batches_of(recipe, **options):
    return PackedBatches(open_groups(recipe.data), TextBuilder(), recipe, **options)


def take(batches, start, stop, workers=0):
    with closing(batches.iterate(start, stop, workers=workers)) as made:
        return list(made)


def as_saved(states):
    """What a checkpoint keeps of them."""
    return json.loads(json.dumps(states))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more processes than cores
@pytest.mark.parametrize("packed", [True, False])
def test_batches_are_the_same_for_any_number_of_processes_and_after_any_stop(recipe, packed):
    recipe = recipe if packed else dataclasses.replace(recipe, packing=None, batch_size=3)
    whole = take(batches_of(recipe, rank=1, world_size=2), 0, 14)
    assert len({str(batch) for batch in whole}) == 14
    stopped = batches_of(recipe, rank=1, world_size=2)
    other_rank = batches_of(recipe, rank=0, world_size=2)
    found = []
    for stop, workers in ((1, 0), (6, 2), (7, 3), (14, 4)):
        # a process that is killed after these batches, which it had made more of ahead
        with closing(stopped.iterate(len(found), 14, workers=workers)) as made:
            found += [next(made) for _ in range(len(found), stop)]
        states = as_saved([other_rank.state_dict(), stopped.state_dict()])
        stopped = batches_of(recipe, rank=1, world_size=2)
        stopped.load_state_dict(states)
    assert found == whole
    assert take(other_rank, 0, 14) != whole


def test_datasets_that_changed_before_a_run_is_resumed_are_named(recipe, tmp_path, caplog):
    batches = batches_of(recipe)
    take(batches, 0, 3)
    state = as_saved([batches.state_dict()])
    batches_of(recipe).load_state_dict(state)
    assert not caplog.records
    write(tmp_path, "a", 24)
    resumed = batches_of(recipe)
    resumed.load_state_dict(state)
    (line,) = caplog.messages
    assert "data.groups.a has 24 rows in 24 pieces" in line and "had 23 rows in 23 pieces" in line
    assert take(resumed, 3, 6)
    # earlier checkpoints do not say what their datasets were
    caplog.clear()
    batches_of(recipe).load_state_dict([{key: one for key, one in state[0].items() if key != "datasets"}])
    assert not caplog.records


def test_processes_take_the_lanes_by_turns():
    assert [workers_for(8, n) for n in (0, 1, 2, 3, 4, 7, 8, 9)] == [0, 1, 2, 2, 4, 4, 8, 8]
    assert workers_for(1, 4) == 1


def test_the_buffer_is_part_of_the_state(recipe):
    batches = batches_of(recipe)
    waiting = []
    for stop in range(1, 12):
        take(batches, stop - 1, stop)
        waiting += [lane["waiting"] for lane in batches.state_dict()["lanes"] if lane["waiting"]]
    assert waiting


@pytest.mark.parametrize("worlds", [(1, 2), (2, 1), (3, 1, 2)])
def test_another_number_of_ranks_goes_on_with_every_source(recipe, worlds):
    """No row comes twice in an epoch, and the runs together have the first epoch whole: samples that waited, too."""
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, lanes=2))
    states = None
    rows = Counter()
    n_waiting = 0
    for world, n in zip((*worlds, 1), (*(2 for _ in worlds), 20), strict=True):
        ranks = [batches_of(recipe, rank=rank, world_size=world) for rank in range(world)]
        for one in ranks:
            if states is not None:
                one.load_state_dict(states)
            rows.update(pair for batch, _ in take(one, 0, n) for pair in batch)
        states = as_saved([one.state_dict() for one in ranks])
        n_waiting += sum(len(lane["waiting"]) for state in states for lane in state["lanes"])
    assert n_waiting
    # a row's random number is that of its epoch
    assert set(rows.values()) == {1}
    first_epoch = {("a", row): random.Random(f"{recipe.seed}/a/0/{row}").random() for row in range(23)}
    assert {(text.split()[0], chance) for text, chance in rows} >= {
        (f"a{row}", x) for (_, row), x in first_epoch.items()
    }


def test_too_many_broken_rows_end_the_run(recipe, tmp_path, caplog):
    path = write(tmp_path, "c", 20, broken=(3, 11))
    groups = {"c": dataclasses.replace(recipe.data.groups["a"], paths=(path,))}
    data = dataclasses.replace(recipe.data, groups=groups)
    recipe = dataclasses.replace(recipe, data=data)
    with pytest.raises(
        ValueError, match=r"of .* rows are broken, expected at most 1.00%: .*c.jsonl; the first: row \d+ of"
    ):
        take(batches_of(recipe), 0, 40)
    assert "broken row, left out: row 3 of" in caplog.text
    allowed = dataclasses.replace(recipe, data=dataclasses.replace(data, max_broken=0.1))
    batches = batches_of(allowed)
    take(batches, 0, 12, workers=2)
    report = batches.figures()
    assert report["broken_rows"] > 0 and report["tokens"] > 12 * 9 and report["capacity"] == 12 * 11
    assert batches.figures()["tokens"] == 0
    resumed = batches_of(allowed, world_size=2)
    resumed.load_state_dict(as_saved([batches.state_dict()]))
    assert resumed.figures()["broken_rows"] == report["broken_rows"] and resumed.figures()["rows"] == report["rows"]
    others = batches_of(allowed, rank=1, world_size=2)
    others.load_state_dict(as_saved([batches.state_dict()]))
    assert others.figures()["rows"] == 0


def test_what_is_wrong_of_the_data_is_said_when_it_is_opened(recipe, tmp_path):
    group = recipe.data.groups["a"]
    for change, message in (
        ({"paths": ("nowhere",)}, "data.groups.a: no dataset at nowhere: expected a file or a folder"),
        ({"format": "parket"}, "data.groups.a: unknown format 'parket': expected one of"),
        ({"columns": {"text": "x"}}, "data.groups.a: got columns for .* of format records: it takes"),
        ({"weight": 0.0}, "got a weight of 0 for a: expected more, or a mandatory group"),
    ):
        groups = {"a": dataclasses.replace(group, **change), "b": recipe.data.groups["b"]}
        with pytest.raises(ValueError, match=message):
            open_groups(dataclasses.replace(recipe.data, groups=groups))


def test_a_sample_that_waits_must_still_be_there(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, lanes=1))
    batches = batches_of(recipe)
    n = 0
    while not any(lane["waiting"] for lane in batches.state_dict()["lanes"]):
        take(batches, n, n + 1)
        n += 1
    states = as_saved([batches.state_dict()])
    write(tmp_path, "a", 23, broken=range(1, 23))
    write(tmp_path, "b", 9, broken=range(1, 9))
    resumed = batches_of(recipe)
    resumed.load_state_dict(states)
    with pytest.raises(ValueError, match="a sample of the checkpoint cannot be read again: row .*; put its file back"):
        take(resumed, n, n + 4)
