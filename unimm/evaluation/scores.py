"""Scores with their 95 % intervals, of groups and of weighted means of groups, and the comparison of two runs.

One interval for all: Wilson's (1927), on the effective number of units (Dean and Pagano 2015), so that four images of
one prompt, which go right together, do not count as four, and a score that takes more values than right and wrong is
not given a yes-or-no spread. For a weighted mean of groups the groups' intervals are joined by the method of variance
estimates recovery (Zou and Donner 2008), which keeps its width where every unit of a group is right or wrong.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, pvariance

from scipy.stats import binomtest, t, ttest_1samp

# the standard normal's 97.5 % point
Z = 1.959963984540054


@dataclass(frozen=True, kw_only=True)
class UnitScore:
    """The score of what is scored as one: an item, or several together. value: None where its judge failed.

    n_items: of how many items; binary: whether each of these is right or wrong, 1 or 0.
    """

    id: str
    group: str
    value: float | None
    n_items: int = 1
    binary: bool = True


@dataclass(frozen=True, kw_only=True)
class GroupScore:
    """The mean score of a group's n units, with the ends of its 95 % interval; failed: units whose judge failed.

    A failed unit is in neither the mean nor n. Without units there is no score.
    """

    score: float | None
    low: float | None
    high: float | None
    n: int
    failed: int = 0


def wilson_interval(share: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n."""
    z2 = Z * Z / n
    centre = (share + z2 / 2) / (1 + z2)
    half = Z / (1 + z2) * sqrt(share * (1 - share) / n + z2 / (4 * n))
    return (0.0 if share <= 0 else max(0.0, centre - half)), (1.0 if share >= 1 else min(1.0, centre + half))


def effective_size(units: Sequence[UnitScore], shares: Sequence[float]) -> float:
    """The number of yes-or-no units whose mean would vary as that of these shares of 0 to 1 does.

    For units that are right or wrong it is their number. Units that are all alike say nothing of how they vary; then
    it is, too.
    """
    n = len(shares)
    share = fmean(shares)
    variance = pvariance(shares) / n
    if share <= 0 or share >= 1 or variance == 0 or all(one in (0, 1) for one in shares):
        return n
    effective = share * (1 - share) / variance
    return min(effective, sum(one.n_items for one in units)) if all(one.binary for one in units) else effective


def score_units(units: Sequence[UnitScore], *, scale: tuple[float, float] = (0, 1)) -> GroupScore:
    """The score of one group's units. scale: the least and the greatest value of a unit."""
    judged = [one for one in units if one.value is not None]
    failed = len(units) - len(judged)
    if not judged:
        return GroupScore(score=None, low=None, high=None, n=0, failed=failed)
    least, most = scale
    values = [one.value for one in judged if one.value is not None]
    shares = [(value - least) / (most - least) for value in values]
    low, high = wilson_interval(fmean(shares), effective_size(judged, shares))
    ends = [least + end * (most - least) for end in (low, high)]
    return GroupScore(score=fmean(values), low=ends[0], high=ends[1], n=len(judged), failed=failed)


def weighted_score(groups: Mapping[str, GroupScore], weights: Mapping[str, float]) -> GroupScore | None:
    """The weighted mean of groups; None where one of them has no score."""
    parts = [(groups[name], weight) for name, weight in weights.items() if name in groups]
    n = sum(one.n for one, _ in parts)
    failed = sum(one.failed for one, _ in parts)
    total = sum(weights.values())
    mean = below = above = 0.0
    for one, weight in parts:
        if one.score is None or one.low is None or one.high is None:
            return None
        mean += weight / total * one.score
        below += (weight / total * (one.score - one.low)) ** 2
        above += (weight / total * (one.high - one.score)) ** 2
    if len(parts) < len(weights):
        return None
    return GroupScore(score=mean, low=mean - sqrt(below), high=mean + sqrt(above), n=n, failed=failed)


# ---- two runs of the same items


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """How much higher b scores than a on the n units that both have, with a 95 % interval and the p-value of no
    difference.

    wins, losses: units on which b scores higher, and lower.
    """

    a: float
    b: float
    difference: float
    low: float | None
    high: float | None
    p: float
    n: int
    wins: int
    losses: int


def paired_difference(a: Sequence[float], b: Sequence[float]) -> PairedDifference:
    """The difference of two runs, unit by unit.

    Units that are right or wrong: Agresti and Min's interval (2005) and McNemar's exact test. Others: Student's t of
    the differences, whose interval one unit does not have.
    """
    differences = [y - x for x, y in zip(a, b, strict=True)]
    n = len(differences)
    mean = fmean(differences)
    wins = sum(one > 0 for one in differences)
    losses = sum(one < 0 for one in differences)
    low: float | None = None
    high: float | None = None
    if all(value in (0, 1) for value in (*a, *b)):
        # half a pair more in each of the four cells
        centre = (wins - losses) / (n + 2)
        half = Z * sqrt(max(wins + losses + 1 - (wins - losses) ** 2 / (n + 2), 0)) / (n + 2)
        low = max(-1.0, centre - half)
        high = min(1.0, centre + half)
        p = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    elif all(one == differences[0] for one in differences):
        # no spread to estimate an interval from
        p = 1.0 if mean == 0 else 0.5 ** (n - 1)
    else:
        half = float(t.ppf(0.975, n - 1)) * sqrt(pvariance(differences) / (n - 1))
        low = mean - half
        high = mean + half
        p = float(ttest_1samp(differences, 0.0).pvalue)
    return PairedDifference(
        a=fmean(a), b=fmean(b), difference=mean, low=low, high=high, p=p, n=n, wins=wins, losses=losses
    )
