"""Intervals and paired comparisons, against numbers worked by hand and against simulated data."""

import random

import pytest

from unimm.evaluation.results import compare_results
from unimm.evaluation.scores import (
    GroupScore,
    UnitScore,
    effective_size,
    paired_difference,
    score_units,
    weighted_score,
    wilson_interval,
)


def units(values, **options):
    return [UnitScore(id=str(i), group="a", value=value, **options) for i, value in enumerate(values)]


def test_units_that_are_right_or_wrong_have_wilsons_interval():
    score = score_units(units([1] * 50 + [0] * 50))
    assert (score.score, score.n, score.failed) == (0.5, 100, 0)
    # worked by hand in test_evaluation
    assert (score.low, score.high) == pytest.approx((0.403832, 0.596168), abs=1e-6)


def test_a_failed_unit_is_in_neither_the_mean_nor_the_number():
    assert score_units(units([1, 0, None, 1])) == GroupScore(
        score=pytest.approx(2 / 3),
        low=pytest.approx(0.207656, abs=1e-5),
        high=pytest.approx(0.938514, abs=1e-5),
        n=3,
        failed=1,
    )
    assert score_units(units([None])) == GroupScore(score=None, low=None, high=None, n=0, failed=1)


def test_images_of_one_prompt_do_not_count_as_independent():
    """All four of a prompt go together: as many units as prompts. Independent ones: as many as images, at most."""
    together = [1.0, 0.0] * 20
    assert effective_size(units(together, n_items=4), together) == 40
    mixed = [0.25, 0.5, 0.75, 0.5] * 10
    assert effective_size(units(mixed, n_items=4), mixed) == 160
    assert effective_size(units([1.0] * 5, n_items=4), [1.0] * 5) == 5


def test_scores_of_many_values_are_not_given_a_yes_or_no_spread():
    values = [0.5, 0.6, 0.55, 0.65, 0.6] * 20
    score = score_units(units(values, binary=False))
    assert score.high - score.low < 0.03
    # the standard error is 0.0051; 1.96 of it each way
    assert score.high - score.low == pytest.approx(2 * 1.96 * 0.0051, rel=0.05)


def test_another_scale():
    score = score_units(units([1.0, 5.0, 3.0, 3.0], binary=False), scale=(1, 5))
    assert score.score == 3.0 and 1 < score.low < 3 < score.high < 5


def test_the_interval_covers():
    """Of 400 simulated groups of 30 the interval holds the truth about 19 times in 20."""
    rng = random.Random(0)
    held = sum(
        low <= 0.3 <= high
        for low, high in (wilson_interval(sum(rng.random() < 0.3 for _ in range(30)) / 30, 30) for _ in range(400))
    )
    # 380 expected, of a standard deviation of 4.4
    assert 365 <= held <= 395


def test_a_mean_of_groups():
    groups = {"a": score_units(units([1, 1, 0, 0])), "b": score_units(units([0] * 4))}
    mean = weighted_score(groups, {"a": 3, "b": 1})
    assert mean.score == 0.375 and mean.n == 8
    assert mean.low < 0.375 < mean.high
    # a group without any right answer widens the interval upwards alone
    assert mean.high - 0.375 == pytest.approx(
        ((0.75 * (groups["a"].high - 0.5)) ** 2 + (0.25 * groups["b"].high) ** 2) ** 0.5
    )
    assert weighted_score(groups, {"a": 1, "c": 1}) is None
    assert weighted_score({"a": score_units(units([None]))}, {"a": 1}) is None


# ---- two runs


def test_a_paired_difference():
    a = [1] * 40 + [0] * 60
    b = [1] * 35 + [0] * 5 + [1] * 15 + [0] * 45
    found = paired_difference(a, b)
    assert (found.a, found.b, found.n, found.wins, found.losses) == (0.4, 0.5, 100, 15, 5)
    assert found.difference == pytest.approx(0.1)
    # (15 - 5) / 102 +- 1.96 sqrt(21 - 100 / 102) / 102
    assert (found.low, found.high) == pytest.approx((0.098039 - 0.085974, 0.098039 + 0.085974), abs=1e-5)
    # twice the probability of 5 or fewer of 20 tosses
    assert found.p == pytest.approx(0.041389, abs=1e-6)


def test_equal_runs():
    found = paired_difference([1, 0, 1], [1, 0, 1])
    assert found.difference == 0 and found.p == 1.0 and found.low < 0 < found.high


def test_differences_of_many_values():
    found = paired_difference([0.1, 0.2, 0.3, 0.4], [0.2, 0.4, 0.3, 0.6])
    assert found.difference == pytest.approx(0.125)
    # t(0.975, 3) = 3.182446, the standard error is 0.0478714
    assert (found.low, found.high) == pytest.approx((-0.027348, 0.277348), abs=1e-5)
    assert 0.05 < found.p < 0.1
    one = paired_difference([0.1], [0.3])
    assert one.low is None and one.high is None


def result(scores, answers="x", benchmark="shapes"):
    return {
        "benchmark": benchmark,
        "run": {"answers": answers},
        "units": {name: {"group": name[0], "score": score} for name, score in scores.items()},
    }


def test_results_are_compared_group_by_group():
    a = result({"a1": 1, "a2": 0, "b1": 0, "b2": 1})
    b = result({"a1": 1, "a2": 1, "b1": None, "b2": 1})
    found = compare_results(a, b)
    assert {name: (one.difference, one.n) for name, one in found.items()} == {
        "a": (0.5, 2),
        "b": (0.0, 1),
        "all": (pytest.approx(1 / 3), 3),
    }


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (result({"a1": 1}, benchmark="wise"), "of shapes and wise"),
        (result({"a1": 1, "a2": 1}), "1 are in one alone, as a2"),
        (result({"a1": 1}, answers="y"), "different items of the same names"),
        (result({"a1": None}), "without a unit that was judged in both"),
    ],
)
def test_results_that_cannot_be_compared(other, message):
    with pytest.raises(ValueError, match=message):
        compare_results(result({"a1": 1}), other)
