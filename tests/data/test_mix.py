"""A mix of groups: shares, mandatory groups, states, batches by step, shards of another number, broken rows."""

import json
import logging
import pickle
from collections import Counter

import pytest
from torch.utils.data import DataLoader, Dataset

from examples.data import make
from unimm.data.broken_rows import LOGGED_ROWS, BrokenRowCounter
from unimm.data.mix import BLOCK, DataMix, MixGroup, MixState, block_quotas, go_on
from unimm.data.records import BrokenRow, choose_wordings
from unimm.data.sources.formats import open_source


def lines(folder, name, n, broken=()):
    """A dataset of texts alone, "name 0", "name 1", ..."""
    rows = [{"parts": [{"text": f"{name} {i}", "loss": True}]} if i not in broken else {} for i in range(n)]
    return open_source(make.write_lines(folder / f"{name}.jsonl", rows), format="records")


def text_of(record, rng):
    return record.texts[0].text, rng.random()


@pytest.fixture
def groups(tmp_path):
    return [
        MixGroup(name="a", sources=[lines(tmp_path, "a", 7), lines(tmp_path, "b", 4)], weight=3),
        MixGroup(name="c", sources=[lines(tmp_path, "c", 5)], weight=1, mandatory=True),
    ]


def taken(stream, n):
    """n draws by weight."""
    return [stream.draw(stream.choose()) for _ in range(n)]


def test_groups_have_their_shares(groups):
    stream = DataMix(groups, text_of, seed=0).stream()
    assert Counter(stream.choose() for _ in range(2 * BLOCK)) == {"a": 1500, "c": 500}
    assert stream.mandatory == ("c",)


def test_quotas():
    assert block_quotas({"a": 0.6, "b": 0.1, "c": 0.05, "d": 0}) == {"a": 800, "b": 133, "c": 67, "d": 0}
    assert block_quotas({"a": 1, "b": 1, "c": 1}) == {"a": 334, "b": 333, "c": 333}
    assert block_quotas({"a": 1e9, "b": 1}) == {"a": 999, "b": 1}
    for weights, message in (
        ({"a": 0}, "got weights of 0 for a"),
        ({"a": -1}, "got the weight of a -1: expected 0 or a positive number"),
        ({"a": float("nan")}, "the weight of a"),
        ({str(i): 1 for i in range(BLOCK + 1)}, "got 1001 groups"),
    ):
        with pytest.raises(ValueError, match=message):
            block_quotas(weights)


def test_every_row_of_a_group_comes_once_an_epoch(groups):
    stream = DataMix(groups, text_of, seed=0).stream()
    texts = [stream.draw("a").item[0] for _ in range(22)]
    everything = [f"a {i}" for i in range(7)] + [f"b {i}" for i in range(4)]
    assert sorted(texts[:11]) == sorted(texts[11:]) == everything
    assert texts[:11] != texts[11:]


def test_shards_draw_different_rows_and_the_same_again(groups):
    mix = DataMix(groups, text_of, seed=0)
    drawn = [taken(mix.stream((i, 2)), 30) for i in range(2)]
    assert drawn[0] != drawn[1] and drawn == [taken(mix.stream((i, 2)), 30) for i in range(2)]
    first = [mix.stream((i, 2)).draw("a").item[0] for i in range(2)]
    assert first[0] != first[1]
    assert taken(DataMix(groups, text_of, seed=1).stream((0, 2)), 30) != drawn[0]


def test_what_was_drawn_is_drawn_again_by_its_epoch_and_row(groups):
    """By any shard, without moving on; also what another number of shards has drawn."""
    mix = DataMix(groups, text_of, seed=0)
    drawn = taken(mix.stream((1, 2)), 40)
    stream = mix.stream((0, 3))
    assert [stream.draw_again(one.group, one.epoch, one.row) for one in drawn] == drawn
    assert stream.state == MixState(draws=0, rows={"a": 0, "c": 0})
    with pytest.raises(ValueError, match="got row 11 of the group a, which has 11: its datasets have changed"):
        stream.draw_again("a", 0, 11)
    with pytest.raises(ValueError, match="got a row of the group x: expected one of a, c"):
        stream.draw_again("x", 0, 0)


def test_a_state_goes_on_where_it_was(groups):
    mix = DataMix(groups, text_of, seed=0)
    stream = mix.stream((1, 3))
    everything = taken(stream, 50)
    begun = mix.stream((1, 3))
    assert taken(begun, 20) == everything[:20]
    state = MixState.from_json(json.loads(json.dumps(begun.state.to_json())))
    assert taken(mix.stream((1, 3), state), 30) == everything[20:]
    copied = pickle.loads(pickle.dumps(begun))  # noqa: S301
    assert taken(copied, 30) == everything[20:]
    with pytest.raises(ValueError, match="state of the groups z: expected those of a, c"):
        mix.stream(state=MixState(draws=0, rows={"z": 1}))


def test_the_random_choices_of_a_row_do_not_depend_on_the_shards(groups):
    """Nor on the draws before: they are those of the seed, the epoch and the row."""
    one = DataMix(groups, text_of, seed=0).stream()
    whole = {one.draw("a").item for _ in range(11)}
    mix = DataMix(groups, text_of, seed=0)
    parts = {mix.stream((i, 11)).draw("a").item for i in range(11)}
    assert parts == whole


def test_another_number_of_shards_goes_on_with_the_rows_that_were_left(groups):
    mix = DataMix(groups, text_of, seed=0)
    streams = [mix.stream((i, 2)) for i in range(2)]
    texts = [streams[0].draw("a").item[0] for _ in range(4)] + [streams[1].draw("a").item[0]]
    past, states = go_on((), [stream.state for stream in streams], 3)
    resumed = DataMix(groups, text_of, seed=0, past=past)
    texts += [resumed.stream((i, 3), state).draw("a").item[0] for i, state in enumerate(states)]
    assert len(texts) == len(set(texts)) == 8
    same, kept = go_on(past, states, 3)
    assert same == past and kept == states


def test_batches_depend_on_the_step_alone(groups):
    mix = DataMix(groups, text_of, seed=0)
    stream = mix.stream((1, 2))
    batches = [stream.batch(step, 5) for step in range(12)]
    assert [stream.batch(step, 5) for step in (7, 3, 11, 0)] == [batches[step] for step in (7, 3, 11, 0)]
    assert mix.stream((1, 2)).batch(9, 5) == batches[9]
    assert all(len(batch.samples) == 5 and batch.samples[0][0] == "c" for batch in batches)
    assert stream.state == MixState(draws=0, rows={"a": 0, "c": 0})
    # both shards together: every row of a group as often as any other, to one
    for name, sources in (("a", 11), ("c", 5)):
        both = [mix.stream((i, 2)).batch(step, 5) for i in range(2) for step in range(40)]
        found = Counter(item[0] for batch in both for group, item in batch.samples if group == name)
        assert len(found) == sources
        n_epochs = found.total() / sources
        assert max(found.values()) <= n_epochs + 2 and min(found.values()) >= n_epochs - 2
    with pytest.raises(ValueError, match="got a batch of 0: expected a sample or more, and each of c"):
        stream.batch(0, 0)


def test_batches_have_each_row_once_an_epoch(tmp_path):
    mix = DataMix([MixGroup(name="a", sources=[lines(tmp_path, "a", 12)])], text_of, seed=0)
    stream = mix.stream()
    texts = [item[0] for step in range(6) for _, item in stream.batch(step, 4).samples]
    assert sorted(texts[:12]) == sorted(texts[12:]) == sorted(f"a {i}" for i in range(12))


def test_broken_rows_are_drawn_and_other_rows_stand_in_for_them_in_batches(tmp_path):
    group = MixGroup(name="a", sources=[lines(tmp_path, "a", 12, broken=(3, 4, 8))])
    stream = DataMix([group], text_of, seed=0).stream()
    items = [stream.draw("a").item for _ in range(12)]
    assert sorted(item.row for item in items if isinstance(item, BrokenRow)) == [3, 4, 8]
    batches = [stream.batch(step, 4) for step in range(3)]
    assert all(len(batch.samples) == 4 for batch in batches)
    assert {row.row for batch in batches for row in batch.broken} == {3, 4, 8}


def test_what_training_refuses_is_a_broken_row(tmp_path):
    def refuse(record, rng):
        raise ValueError("got 9 tokens: expected at most 8")

    stream = DataMix([MixGroup(name="a", sources=[lines(tmp_path, "a", 3)])], refuse, seed=0).stream()
    assert "expected at most 8" in stream.draw("a").item.reason
    with pytest.raises(
        ValueError, match=r"every one of the 3 rows of the group a is broken; the last: row \d of .*a.jsonl: got 9"
    ):
        stream.batch(0, 1)


def test_pieces_are_read_on(tmp_path, monkeypatch):
    """A row group is opened once for all of its rows, not for each."""
    pytest.importorskip("pyarrow")
    source = open_source(make.make_bagel_t2i(tmp_path))
    reads = []
    read = type(source).read
    monkeypatch.setattr(type(source), "read", lambda self, rows: reads.append(rows) or read(self, rows))
    stream = DataMix([MixGroup(name="a", sources=[source])], choose_wordings, seed=0).stream()
    assert len({stream.draw("a").item.where for _ in range(6)}) == 6
    assert sorted(rows.start for rows in reads) == [0, 2, 3, 5]


class TextBatches(Dataset):
    """Batches by step, as the trainer's workers make them."""

    def __init__(self, stream):
        self.stream = stream

    def __getitem__(self, step):
        return [(name, record.where, record.texts[0].text) for name, record in self.stream.batch(step, 4).samples]


def test_batches_are_the_same_for_any_number_of_workers(tmp_path):
    # spawned workers get what `test_a_state_goes_on_where_it_was` pickles
    for library in ("pyarrow", "datasets"):
        pytest.importorskip(library)
    makers = (make.make_bagel_t2i, make.make_huggingface, make.make_webdataset, make.make_llava)
    groups = [MixGroup(name=maker.__name__, sources=[open_source(maker(tmp_path))]) for maker in makers]
    stream = DataMix(groups, choose_wordings, seed=0).stream()
    alone = [TextBatches(stream)[step] for step in range(12)]
    made = DataLoader(
        *(TextBatches(stream), None), sampler=range(12), num_workers=2, collate_fn=list, multiprocessing_context="fork"
    )
    assert list(made) == alone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": []}, "got the groups none: expected one or more"),
        ({"groups": "aa"}, "got the groups a, a: expected one or more, each of its own name"),
        ({"sources": []}, "got no dataset for a"),
        ({"weight": "1"}, "got the weight of a '1'"),
        ({"weight": 0}, "got weights of 0 for a"),
    ],
)
def test_mixes_that_will_not_do(tmp_path, change, message):
    sources = change.get("sources", [lines(tmp_path, "a", 2)])
    names = change.get("groups", ["a"])
    groups = [MixGroup(name=name, sources=sources, weight=change.get("weight", 1)) for name in names]
    with pytest.raises(ValueError, match=message):
        DataMix(groups, text_of, seed=0)


def test_a_group_of_no_weight_is_mandatory(groups):
    silent = MixGroup(name="d", sources=groups[1].sources, weight=0)
    with pytest.raises(ValueError, match="got a weight of 0 for d: expected more, or a mandatory group"):
        DataMix([*groups, silent], text_of, seed=0)
    begins = MixGroup(name="d", sources=groups[1].sources, weight=0, mandatory=True)
    batch = DataMix([*groups, begins], text_of, seed=0).stream().batch(0, 8)
    assert [name for name, _ in batch.samples].count("d") == 1


def broken(i, source="a"):
    return BrokenRow(source=source, row=i, reason="no JSON")


def test_too_great_a_share_of_broken_rows_ends_the_run(caplog):
    counter = BrokenRowCounter(max_share=0.1, min_rows=20)
    counter.add(19, [broken(i) for i in range(2)])
    with pytest.raises(
        ValueError, match=r"3 of 20 rows are broken, expected at most 10.00%: 2 of a, 1 of b; the first: row 0 of a"
    ):
        counter.add(1, [broken(0, "b")])
    exactly = BrokenRowCounter(max_share=0.1, min_rows=20)
    exactly.add(20, [broken(0), broken(1)])
    assert exactly.share == 0.1
    few = BrokenRowCounter(max_share=0.0, min_rows=20)
    few.add(19, [broken(0)])
    with pytest.raises(ValueError, match="1 of 20"):
        few.add(1)


def test_broken_rows_are_logged_and_survive_a_checkpoint(caplog):
    counter = BrokenRowCounter(max_share=1)
    with caplog.at_level(logging.WARNING):
        counter.add(50, [broken(i) for i in range(LOGGED_ROWS + 5)])
    assert len(caplog.records) == LOGGED_ROWS and "row 0 of a: no JSON" in caplog.text
    assert "further ones of this file are counted only" in caplog.messages[-1]
    other = BrokenRowCounter(max_share=1)
    other.restore(json.loads(json.dumps(counter.to_json())))
    assert other.to_json() == counter.to_json() == {"rows": 50, "broken": {"a": 15}} and other.share == 0.3
    for options in ({"max_share": 2}, {"max_share": "1"}, {"min_rows": 0}):
        with pytest.raises(ValueError, match="got m"):
            BrokenRowCounter(**options)
