"""One run of a benchmark: stopped anywhere and taken up again, in parts, with images that were changed, on a full disk."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.evaluation import N, Oracle, run_toy, scores_of
from helpers.paths import TESTS
from PIL import Image

from unimm.evaluation.benchmarks.base import BenchmarkOptions
from unimm.evaluation.benchmarks.shapes import ShapesBenchmark
from unimm.evaluation.folder import RunFolder
from unimm.evaluation.items import EvalItem, check_items, make_batches
from unimm.evaluation.judges.base import ExactJudge, Verdict
from unimm.evaluation.manifest import Manifest, read_manifest
from unimm.evaluation.results import read_result, result_markdown
from unimm.evaluation.sharding import RunShard, parse_shard

TASKS = ("draw.one", "edit.add")


class InterruptedRunError(Exception):
    """Stands for whatever stops a process."""


class Stops(Oracle):
    """Is stopped at its nth call."""

    def __init__(self, at: int, stop=InterruptedRunError):
        super().__init__(wrong=("edit.add",), tasks=TASKS)
        self.left, self.stop = at, stop

    def generate(self, prompt, **options):
        if not self.left:
            raise self.stop
        self.left -= 1
        return super().generate(prompt, **options)


def painter():
    return Oracle(wrong=("edit.add",), tasks=TASKS)


def comparable(folder: Path) -> dict:
    """What a folder says of its outputs, verdicts and scores, in an order of its own."""
    rows = {row["id"]: row for path in folder.glob("outputs*.jsonl") for row in read_manifest(path)}
    verdicts = {row["id"]: row for path in folder.glob("verdicts/*.jsonl") for row in read_manifest(path)}
    result = json.loads((folder / "result.json").read_text())
    return {"outputs": rows, "verdicts": verdicts, "scores": result["scores"], "units": result["units"]}


@pytest.fixture
def whole(tmp_path):
    run_toy(tmp_path / "whole", painter())
    return comparable(tmp_path / "whole")


def test_a_run(tmp_path):
    state = run_toy(tmp_path, painter())
    assert scores_of(state) == {"draw.one": 1.0, "edit.add": 0.0}
    rows = read_manifest(tmp_path / "outputs.jsonl")
    assert len(rows) == 2 * N and all((tmp_path / row["image"]).is_file() for row in rows)
    assert {row["answer"] for row in rows} and all(row["prompt"] for row in rows)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == state.result
    assert result["run"]["model"] == "oracle" and result["judge"]["kind"] == "exact"
    assert {"torch", "unimm", "python"} <= result["versions"].keys()
    assert all(len(result["run"][name]) == 64 for name in ("prompts", "answers"))
    assert "| **oracle** | 1.000 (0.610 - 1.000), n 6 | 0.000" in (tmp_path / "result.md").read_text()


@pytest.mark.parametrize("at", range(6))
def test_a_run_that_was_stopped_goes_on(tmp_path, whole, at):
    with pytest.raises(InterruptedRunError):
        run_toy(tmp_path / "run", Stops(at))
    kept = len(RunFolder(tmp_path / "run").outputs(ShapesBenchmark(BenchmarkOptions(n=N, seed=3)).items()))
    assert kept == 2 * at
    again = painter()
    run_toy(tmp_path / "run", again)
    assert len(again.calls) == N - at, "nothing is generated twice"
    assert comparable(tmp_path / "run") == whole


SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from evaluation.test_run import Stops
from helpers.evaluation import run_toy
class Dies(Stops):
    def generate(self, prompt, **options):
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().generate(prompt, **options)
run_toy(Path(sys.argv[1]), Dies(3))
"""


def test_a_run_that_was_killed_goes_on(tmp_path, whole):
    ran = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / "run", TESTS], check=False)
    assert ran.returncode == -signal.SIGKILL
    # the line that was being written
    with (tmp_path / "run" / "outputs.jsonl").open("a") as file:
        file.write('{"id": "edit.add/5", "gro')
    run_toy(tmp_path / "run", painter())
    assert comparable(tmp_path / "run") == whole


@pytest.mark.parametrize("count", [2, 3, 4])
def test_shards_merged_are_one_run(tmp_path, whole, count):
    states = [run_toy(tmp_path / "run", painter(), shard=RunShard(index=i, count=count)) for i in range(count)]
    assert [state.result is None for state in states] == [True] * (count - 1) + [False]
    assert states[0].missing > 0
    assert comparable(tmp_path / "run") == whole


def test_parts_have_one_batch_size(tmp_path):
    run_toy(tmp_path, painter(), shard=RunShard(index=0, count=2), batch=2)
    with pytest.raises(ValueError, match="got --batch 3 for a part of .*, whose other parts have 2: take the same"):
        run_toy(tmp_path, painter(), shard=RunShard(index=1, count=2), batch=3)
    assert run_toy(tmp_path, painter(), batch=3).result is not None, "what is left may be done in other batches"


def test_the_table_follows_from_the_result(tmp_path):
    state = run_toy(tmp_path, painter())
    assert result_markdown(read_result(tmp_path), ()) == state.markdown == (tmp_path / "result.md").read_text()


def test_a_run_takes_up_what_shards_left(tmp_path, whole):
    run_toy(tmp_path / "run", painter(), shard=RunShard(index=1, count=3))
    run_toy(tmp_path / "run", painter())
    assert comparable(tmp_path / "run") == whole


def test_outputs_do_not_depend_on_the_batch(tmp_path, whole):
    for batch in (1, 3, 50):
        run_toy(tmp_path / str(batch), painter(), batch=batch)
        assert comparable(tmp_path / str(batch)) == whole


def test_a_planted_wrong_image_is_judged_wrong(tmp_path):
    run_toy(tmp_path, painter())
    Image.new("RGB", (64, 64), "white").save(tmp_path / "images" / "draw.one" / "2.png")
    state = run_toy(tmp_path, Stops(0))
    assert scores_of(state)["draw.one"] == pytest.approx(5 / 6)
    assert state.result["changed"] == 1 and "1 images" in state.markdown


def test_a_deleted_image_is_generated_again(tmp_path, whole):
    run_toy(tmp_path / "run", painter())
    (tmp_path / "run" / "images" / "draw.one" / "2.png").unlink()
    again = painter()
    run_toy(tmp_path / "run", again)
    assert len(again.calls) == 1
    assert comparable(tmp_path / "run") == whole


def test_a_failed_judge_is_asked_again_and_fails_nobody(tmp_path):
    asked = []

    def verdict(task):
        asked.append(task.item.id)
        return (
            Verdict(score=None, reason="down") if task.item.id == "draw.one/1" and len(asked) < 20 else Verdict(score=1)
        )

    def judge():
        return ExactJudge(verdict, "a judge that fails once")

    state = run_toy(tmp_path, painter(), judge=judge)
    score = state.result["scores"]["draw.one"]
    assert (score["score"], score["n"], score["failed"]) == (1.0, N - 1, 1) and state.result["failed"] == 1
    assert "failed on 1" in state.markdown
    asked += [""] * 20
    state = run_toy(tmp_path, painter(), judge=judge)
    assert asked[-1] == "draw.one/1" and state.result["failed"] == 0 and state.result["scores"]["draw.one"]["n"] == N


def test_verdicts_of_one_judge_are_not_those_of_another(tmp_path):
    for score in (0.0, 1.0):
        judge = ExactJudge(lambda task, score=score: Verdict(score=score), f"says {score}")
        assert scores_of(run_toy(tmp_path, painter(), judge=lambda judge=judge: judge))["draw.one"] == score


# ---- bad input


def test_the_folder_of_another_run(tmp_path):
    run_toy(tmp_path, painter())
    with pytest.raises(ValueError, match="holds another run: model oracle there, painter now; take another --out"):
        run_toy(tmp_path, painter(), name="painter")
    other = ShapesBenchmark(BenchmarkOptions(n=N, seed=4, tasks=TASKS))
    with pytest.raises(ValueError, match="seed 3 there, 4 now"):
        run_toy(tmp_path, painter(), benchmark=other)


def test_a_folder_of_other_files(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"holds thesis\.tex and no run\.json"):
        run_toy(tmp_path, painter())


def test_a_full_disk_loses_nothing(tmp_path, whole):
    with pytest.raises(InterruptedRunError):
        run_toy(tmp_path / "run", Stops(4))
    manifest = tmp_path / "run" / "outputs.jsonl"
    kept = manifest.read_bytes()
    manifest.unlink()
    manifest.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        run_toy(tmp_path / "run", painter())
    assert caught.value.filename == str(manifest)
    manifest.unlink()
    manifest.write_bytes(kept)
    run_toy(tmp_path / "run", painter())
    assert comparable(tmp_path / "run") == whole


def test_a_manifest_is_written_by_one_process(tmp_path):
    with Manifest(tmp_path / "a.jsonl") as manifest:
        manifest.append([{"id": "a"}])
        with pytest.raises(ValueError, match=r"another process writes .*a\.jsonl"), Manifest(tmp_path / "a.jsonl"):
            pass
    with Manifest(tmp_path / "a.jsonl") as manifest:
        manifest.append([{"id": "b"}])
    assert [row["id"] for row in read_manifest(tmp_path / "a.jsonl")] == ["a", "b"]


@pytest.mark.parametrize("line", ["{", "[]", '{"name": 3}'])
def test_a_broken_line_of_a_manifest(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(f'{{"id": "a"}}\n{line}\n{{"id": "b"}}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2, "):
        read_manifest(tmp_path / "a.jsonl")


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/0", "-1/2", ""])
def test_a_wrong_shard(text):
    with pytest.raises(ValueError, match="expected i/n with i from 1 to n"):
        parse_shard(text)


def test_shards_take_turns():
    assert parse_shard("2/3") == RunShard(index=1, count=3) and parse_shard("2/3").name == "2/3"
    assert [RunShard(index=i, count=3).pick("abcdefg") for i in range(3)] == [["a", "d", "g"], ["b", "e"], ["c", "f"]]


def item(name: str, group: str = "a", **options) -> EvalItem:
    return EvalItem(id=name, group=group, prompt=name, seed=0, **options)


def test_batches_hold_items_of_one_kind():
    items = [item("1"), item("2"), item("3"), item("4", "b"), item("5", "b", think=True), item("6", "b", think=True)]
    assert [[one.id for one in batch] for batch in make_batches(items, 2)] == [["1", "2"], ["3"], ["4"], ["5", "6"]]


@pytest.mark.parametrize(
    ("items", "message"),
    [([], "no items"), ([item("a"), item("a")], "a twice"), ([item("../a")], "the id"), ([item("/a")], "the id")],
)
def test_wrong_items(items, message):
    with pytest.raises(ValueError, match=message):
        check_items(items, "toy")


def test_options_that_a_benchmark_does_not_have():
    with pytest.raises(ValueError, match="got --labels for shapes: it takes --seed, --n, --tasks"):
        ShapesBenchmark(BenchmarkOptions(labels="corrected"))
    with pytest.raises(ValueError, match="got --think for shapes"):
        ShapesBenchmark(BenchmarkOptions(think=True))


TORCHRUN = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from helpers.evaluation import Oracle, run_toy
from unimm.evaluation.results import read_result, result_markdown
from unimm.evaluation.sharding import torchrun_shard
with torchrun_shard() as shard:
    state = run_toy(Path(sys.argv[1]), Oracle(wrong=("edit.add",), tasks=("draw.one", "edit.add")), shard=shard)
    assert shard.count == 2 and state.result is not None, "each waits for the other"
"""


@pytest.mark.slow
def test_torchrun(tmp_path, whole):
    (tmp_path / "script.py").write_text(TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, tmp_path / "script.py", tmp_path / "run", TESTS], check=True, env=env, capture_output=True
    )
    assert comparable(tmp_path / "run") == whole
