"""What the experiments share: options, results that are kept, scores over items and seeds, bars and curves."""

from __future__ import annotations

import argparse
import datetime
import json
import textwrap
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from scipy.stats import t

from unimm.checkpoint.json_files import read_json, write_json
from unimm.evaluation.benchmarks.base import BenchmarkOptions
from unimm.evaluation.benchmarks.shapes import is_right, task_items
from unimm.evaluation.benchmarks.unisandbox.benchmark import UniSandBoxBenchmark
from unimm.evaluation.generating import produce
from unimm.evaluation.items import make_batches
from unimm.evaluation.results import interval_text
from unimm.evaluation.run import run_benchmark
from unimm.evaluation.scores import GroupScore, paired_difference, wilson_interval
from unimm.evaluation.setup import model_source, prepare_judge

SEEDS = (1, 2, 3)


def experiment_parser(description: str, *, seeds: bool = True) -> argparse.ArgumentParser:
    """A parser with what every experiment takes: the folder of its results, and its seeds where it has any."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the results; a stopped command goes on in it")
    if seeds:
        parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    return parser


def run_command(name: str, parser: argparse.ArgumentParser, study: Callable[..., object]) -> None:
    """Run an experiment with the options of the command line, and print its table, OUT/NAME.md."""
    options = vars(parser.parse_args())
    study(**options)
    print((options["out"] / f"{name}.md").read_text(encoding="utf-8"), end="")


def describe_run(**settings: Any) -> dict[str, Any]:
    """What the numbers of a page depend on: the settings that are given, the version of torch, the date."""
    date = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    return {**settings, "torch": torch.__version__, "date": date}


def kept_result(path: Path, asked: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The result of one arm and seed: read from its file, or made, with the seconds of the processor that it took.

    Raises ValueError for a file that was made under other settings.
    """
    if path.is_file():
        found = read_json(path)
        if found["asked"] != json.loads(json.dumps(asked)):
            raise ValueError(f"{path} was made under {found['asked']}, not {dict(asked)}: choose another folder")
        return found
    began = time.process_time()
    result = {"asked": dict(asked), **make(), "seconds": round(time.process_time() - began, 1)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    return read_json(path)


def kept_arms(
    out: Path,
    arms: Collection[str],
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    run_arm: Callable[..., Mapping[str, Any]],
) -> dict[str, list[dict[str, Any]]]:
    """The results of each arm, one a seed, read from OUT/ARM-SEED.json or made by run_arm(arm, seed=seed).

    All arms of a seed come before the next seed. settings: what else the results depend on, as for `kept_result`.
    """
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for seed in seeds:
        for arm in arms:
            path = out / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}.json"
            asked = {"arm": arm, "seed": seed, **settings}
            found[arm].append(kept_result(path, asked, partial(run_arm, arm, seed=seed)))
    return found


def spent_seconds(results: Iterable[Mapping[str, Any]]) -> int:
    """Seconds of the processor that kept results took."""
    return round(sum(one["seconds"] for one in results))


def write_results(out: Path, name: str, result: Mapping[str, Any], table: str) -> None:
    """Write OUT/NAME.json and OUT/NAME.md."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(table, encoding="utf-8")


# ---- scores


def right_by_task(
    model: Any, tasks: Sequence[str], *, n: int, seed: int, options: Mapping[str, Any] | None = None
) -> dict[str, list[int]]:
    """Whether a model is right (1) about each of n test items of each task of the shapes world, by the exact judge.

    Items and noise follow from the seed, so that two models can be compared item by item. options: of `generate`.
    """
    found: dict[str, list[int]] = {}
    for task in tasks:
        right: list[int] = []
        for batch in make_batches(task_items(task, n, seed=seed, split="test"), 50):
            right += [
                int(is_right(item, output)) for item, output in zip(batch, produce(model, batch, options), strict=True)
            ]
        found[task] = right
    return found


def unisandbox_right(model: str, out: Path, options: BenchmarkOptions, *, steps: int) -> dict[str, list[int]]:
    """Which questions of UniSandBox, or pairs of them, a model gets right (1), by task; all that it made is kept in a folder.

    steps: of the sampler.
    """
    benchmark = UniSandBoxBenchmark(options)
    source = model_source(model, benchmark.NAME, options={"steps": steps})
    judge = prepare_judge(None, benchmark, device="cpu", dtype="float32")
    result = run_benchmark(benchmark, replace(source, name=out.name), judge, out, batch_size=50, progress=False).result
    assert result is not None
    return right_of(result)


def right_of(result: Mapping[str, Any]) -> dict[str, list[int]]:
    """The units of a benchmark's result, 1 for right, by task."""
    found: dict[str, list[int]] = {}
    for unit in result["units"].values():
        found.setdefault(unit["group"], []).append(int(unit["score"] == 1))
    return found


def with_all(right: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """The items of each task, and those of all as "all"."""
    return {
        **{task: list(some) for task, some in right.items()},
        "all": [one for some in right.values() for one in some],
    }


def pooled_score(right: Sequence[int]) -> dict[str, float]:
    """The share of right items of all seeds, with Wilson's interval."""
    low, high = wilson_interval(fmean(right), len(right))
    return {"score": fmean(right), "low": low, "high": high, "n": len(right), "failed": 0}


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """The mean of the seeds' values, with Student's interval where there are several."""
    mean = fmean(values)
    if len(values) == 1:
        return {"mean": mean, "low": None, "high": None, "values": list(values)}
    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half, "values": list(values)}


def seeded_score(by_seed: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The share of right items, with its interval over the items of all seeds and with that over the seeds' means."""
    items = pooled_score([right for one in by_seed for right in one])
    return {"items": items, "seeds": over_seeds([fmean(one) for one in by_seed])}


def paired(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """How much higher b is than a, item by item, with a 95 % interval."""
    return asdict(paired_difference(list(a), list(b)))


def score_text(one: Mapping[str, Any]) -> str:
    """A share with its interval over items."""
    return interval_text(GroupScore(**one))


def seeds_text(one: Mapping[str, Any]) -> str:
    """The mean over seeds with its interval."""
    return f"{one['mean']:.3f}" if one["low"] is None else f"{one['mean']:.3f} ({one['low']:.3f} - {one['high']:.3f})"


def difference_text(one: Mapping[str, Any]) -> str:
    """A paired difference with its interval."""
    interval = "" if one["low"] is None else f" ({one['low']:+.3f} - {one['high']:+.3f})"
    return f"{one['difference']:+.3f}{interval}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown."""
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def seeded_rows(label: str, scores: Sequence[Mapping[str, Any] | None]) -> list[list[str]]:
    """Rows of a table: each `seeded_score` over items, and over seeds where there are several; None leaves one empty."""
    rows = [[f"{label}, by items", *("" if one is None else score_text(one["items"]) for one in scores)]]
    if any(one is not None and len(one["seeds"]["values"]) > 1 for one in scores):
        rows.append([f"{label}, by seeds", *("" if one is None else seeds_text(one["seeds"]) for one in scores)])
    return rows


# ---- figures


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar: its height, the ends of its interval, and the values of the seeds, which are dots."""

    height: float
    low: float
    high: float
    dots: Sequence[float] = ()

    @classmethod
    def of_score(cls, one: Mapping[str, Any], dots: Sequence[float] = ()) -> Bar:
        """The bar of a share with its interval over items."""
        return cls(height=one["score"], low=one["low"], high=one["high"], dots=dots)

    @classmethod
    def of_seeded_score(cls, one: Mapping[str, Any]) -> Bar:
        """The bar of a `seeded_score`: its interval over items, and the seeds' means as dots."""
        return cls.of_score(one["items"], one["seeds"]["values"])


def plot_bars(
    path: Path,
    columns: Sequence[str],
    series: Mapping[str, Sequence[Bar | None]],
    *,
    ylabel: str = "right",
    ylim: tuple[float, float] | None = (0, 1),
) -> None:
    """Bars of each series side by side by column; None leaves one out."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.5))
    width = 0.8 / len(series)
    colours = [
        "silver",
        "steelblue",
        "darkorange",
        "seagreen",
        "firebrick",
        "orchid",
        "peru",
        "teal",
        "gold",
        "slateblue",
    ]
    for k, (label, bars) in enumerate(series.items()):
        known = [(i + (k + 0.5) * width - 0.4, bar) for i, bar in enumerate(bars) if bar is not None]
        places = [place for place, _ in known]
        ends = [[bar.height - bar.low for _, bar in known], [bar.high - bar.height for _, bar in known]]
        heights = [bar.height for _, bar in known]
        axes.bar(places, heights, 0.95 * width, yerr=ends, capsize=2, color=colours[k], label=label)
        for place, bar in known:
            axes.plot([place] * len(bar.dots), bar.dots, "k.", markersize=3)
    # as wide as a column is, in letters
    labels = [textwrap.fill(column, 80 // len(columns), break_long_words=False) for column in columns]
    axes.set_xticks(range(len(columns)), labels)
    axes.set(ylabel=ylabel)
    if ylim is not None:
        axes.set_ylim(ylim)
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_curves(
    path: Path, panels: Mapping[str, Mapping[str, Sequence[Sequence[tuple[int, float]]]]], *, xlabel: str = "step"
) -> None:
    """A panel a loss: a thick curve a series, the mean over its runs, and a thin one a run. Points are (step, loss)."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, found = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), squeeze=False)
    for axes, (title, series) in zip(found[0], panels.items(), strict=True):
        for (label, runs), colour in zip(series.items(), ("silver", "darkorange", "steelblue"), strict=False):
            steps = [step for step, _ in runs[0]]
            for run in runs:
                axes.plot(steps, [value for _, value in run], color=colour, linewidth=0.6, alpha=0.6)
            means = [fmean(values) for values in zip(*([value for _, value in run] for run in runs), strict=True)]
            axes.plot(steps, means, color=colour, linewidth=2, label=label)
        axes.set(title=title, xlabel=xlabel, yscale="log")
    found[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
