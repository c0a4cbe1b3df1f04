"""The benchmark on the little world, with models whose scores are known."""

import json
from dataclasses import asdict

import pytest
from helpers.evaluation import SEED, N, Oracle
from PIL import Image

from unimm.data.shapes import example
from unimm.evaluation.benchmarks.shapes import (
    REASONING_TASKS,
    TASKS,
    BenchmarkScore,
    check_tasks,
    evaluate,
    noise_seed,
    to_scene_array,
)


def test_all_right():
    scores = evaluate(Oracle(), n=N, seed=SEED, progress=False)
    assert tuple(scores) == TASKS
    assert all(score.accuracy == 1 and score.n == N and score.high == 1 for score in scores.values())


def test_all_wrong():
    scores = evaluate(Oracle(wrong=TASKS), n=N, seed=SEED, progress=False)
    assert all(score.accuracy == 0 and score.low == 0 for score in scores.values())


def test_tasks_are_scored_apart():
    scores = evaluate(Oracle(wrong=("draw.two", "answer.shape")), n=N, seed=SEED, progress=False)
    assert {task for task, score in scores.items() if score.accuracy < 1} == {"draw.two", "answer.shape"}


def test_larger_images_are_read_too():
    assert evaluate(Oracle(side=256), n=N, seed=SEED, tasks=["draw.one"], progress=False)["draw.one"].accuracy == 1


@pytest.mark.parametrize("batch", [1, 4, N, 50])
def test_prompts_and_seeds_do_not_depend_on_the_batch(batch):
    oracle = Oracle()
    evaluate(oracle, n=N, seed=SEED, tasks=["draw.count"], batch_size=batch, progress=False)
    asked = [pair for prompts, _, seeds in oracle.calls for pair in zip(prompts, seeds, strict=True)]
    prompts = [example("draw.count", i, seed=SEED, split="test").prompt for i in range(N)]
    assert asked == [(prompt, noise_seed(SEED, "draw.count", i)) for i, prompt in enumerate(prompts)]
    assert all(len(prompts) <= batch for prompts, _, _ in oracle.calls)


def test_reasoning_is_asked_for_where_the_task_says_so():
    oracle = Oracle()
    evaluate(oracle, n=N, seed=SEED, tasks=["reason.map2", "reason.map2.think"], progress=False)
    (plain, think) = oracle.calls
    assert (plain[1], think[1]) == (False, True)
    assert plain[0] == think[0] and plain[2] == think[2]


def test_tasks_are_those_promised():
    assert {task + ".think" for task in REASONING_TASKS} <= set(TASKS)
    assert REASONING_TASKS == tuple(f"reason.{kind}{level}" for kind in ("math", "map") for level in (1, 2, 3))


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Wilson's interval, worked by hand: (p + z2/2n -+ z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n), z = 1.959964
    [(0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0), (50, 100, 0.403832, 0.596168), (475, 500, 0.927232, 0.965906)],
)
def test_interval(right, n, low, high):
    score = BenchmarkScore.from_counts(right, n)
    assert score.accuracy == right / n
    assert (score.low, score.high) == pytest.approx((low, high), abs=1e-6)


def test_a_score_is_json():
    assert json.loads(json.dumps(asdict(BenchmarkScore.from_counts(1, 2)))).keys() == {"accuracy", "n", "low", "high"}


def test_noise_seeds_differ():
    found = {noise_seed(seed, task, index) for seed in range(3) for task in TASKS for index in range(50)}
    assert len(found) == 3 * len(TASKS) * 50
    assert all(0 <= seed < 2**63 for seed in found)


def test_pixels_take_any_mode():
    assert to_scene_array(Image.new("RGBA", (128, 128), (10, 20, 30, 255))).shape == (64, 64, 3)


@pytest.mark.parametrize("name", ["n", "batch_size"])
def test_numbers_below_one(name):
    with pytest.raises(ValueError, match=f"got {name} 0: expected at least 1"):
        evaluate(Oracle(), **{"n": 1, "batch_size": 1, name: 0}, seed=0, progress=False)


def test_unknown_tasks():
    with pytest.raises(ValueError, match=r"unknown task 'draw\.on': .*draw\.one"):
        check_tasks(["draw.one", "draw.on"])
    with pytest.raises(ValueError, match="no tasks"):
        check_tasks([])
    assert check_tasks(["draw.two", "draw.one", "draw.two"]) == ("draw.two", "draw.one")
