"""Does a model generate after thinking what it cannot generate at once? Table 1 of UniSandBox (arXiv 2511.20561), small.

    python -m experiments.thinking_gap OUT --model bagel-nano --n 10 --seeds 1 2 3

For each seed new questions of all six levels, each answered twice from the same noise: at once, and after thinking. The
seed makes the questions and the noise; the model is one. Writes OUT/thinking_gap.json, .md and .png; the folders of the
runs stay in OUT, so that a stopped command goes on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from scipy.stats import t

from unimm.evaluation.benchmarks.base import BenchmarkOptions
from unimm.evaluation.benchmarks.unisandbox.benchmark import PUBLISHED, REASONING, UniSandBoxBenchmark
from unimm.evaluation.results import interval_text
from unimm.evaluation.run import run_benchmark
from unimm.evaluation.scores import GroupScore, UnitScore, paired_difference
from unimm.evaluation.setup import model_source, prepare_judge

MODES = ("normal", "think")
COLUMNS = (*REASONING, "average")


def run_seed(out: Path, model: str, *, n: int, seed: int, steps: int | None, mode: str) -> dict[str, Any]:
    """The result of one seed in one mode, and the seconds of the processor that this call took for it."""
    began = time.process_time()
    options = BenchmarkOptions(n=n, seed=seed, think=mode == "think", supports_thinking=True)
    benchmark = UniSandBoxBenchmark(options)
    sampling = {} if steps is None else {"steps": steps}
    source = model_source(model, benchmark.NAME, device="cpu", dtype="float32", options=sampling)
    judge = prepare_judge(None, benchmark, device="cpu", dtype="float32")
    state = run_benchmark(benchmark, source, judge, out / f"seed{seed}-{mode}")
    assert state.result is not None
    return {**state.result, "seconds": time.process_time() - began}


def pooled(results: Sequence[Mapping[str, Any]]) -> dict[str, GroupScore]:
    """The score of each level over the questions of all seeds, with its interval over questions."""
    units = [
        UnitScore(id=f"{i}/{name}", group=unit["group"], value=unit["score"])
        for i, result in enumerate(results)
        for name, unit in result["units"].items()
    ]
    return UniSandBoxBenchmark(BenchmarkOptions()).scores(units)


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """The mean of the seeds' scores, with Student's interval where there are several."""
    mean = fmean(values)
    if len(values) == 1:
        return {"mean": mean, "low": None, "high": None, "values": list(values)}
    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half, "values": list(values)}


def gap(normal: Sequence[Mapping[str, Any]], think: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How much higher thinking scores, question by question over all seeds, for each level and all."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for a, b in zip(normal, think, strict=True):
        for name, unit in a["units"].items():
            for group in (unit["group"], "average"):
                pairs.setdefault(group, []).append((unit["score"], b["units"][name]["score"]))
    return {group: asdict(paired_difference(*map(list, zip(*some, strict=True)))) for group, some in pairs.items()}


def summarize(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Scores of both modes by level, over questions and over seeds, and the gap between the modes."""
    modes = {
        mode: {
            "questions": {name: asdict(one) for name, one in pooled(some).items()},
            "seeds": {name: over_seeds([one["scores"][name]["score"] for one in some]) for name in COLUMNS},
        }
        for mode, some in results.items()
    }
    return {"modes": modes, "gap": gap(results["normal"], results["think"])}


def results_table(made: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """The tables in markdown."""
    lines = [f"| model | thinking | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for mode, one in summary["modes"].items():
        thinks = "yes" if mode == "think" else "no"
        cells = (interval_text(GroupScore(**one["questions"][name])) for name in COLUMNS)
        lines.append(f"| **{made['model']}**, by questions | {thinks} | {' | '.join(cells)} |")
        cells = (seeds_text(one["seeds"][name]) for name in COLUMNS)
        lines.append(f"| **{made['model']}**, by seeds | {thinks} | {' | '.join(cells)} |")
    cells = (gap_text(summary["gap"][name]) for name in COLUMNS)
    lines.append(f"| **{made['model']}**, gap | | {' | '.join(cells)} |")
    for row in PUBLISHED:
        cells = (f"{row.scores[name]:g}" for name in COLUMNS)
        lines.append(f"| {row.model} | {'yes' if row.think else 'no'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def seeds_text(one: Mapping[str, Any]) -> str:
    """The mean over seeds with its interval."""
    return f"{one['mean']:.3f}" if one["low"] is None else f"{one['mean']:.3f} ({one['low']:.3f} - {one['high']:.3f})"


def gap_text(one: Mapping[str, Any]) -> str:
    """A paired difference with its interval."""
    interval = "" if one["low"] is None else f" ({one['low']:+.3f} - {one['high']:+.3f})"
    return f"{one['difference']:+.3f}{interval}"


def plot(path: Path, summary: Mapping[str, Any]) -> None:
    """Bars of both modes by level, with intervals over questions, and a dot for each seed."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.5))
    for shift, (mode, colour) in enumerate((("normal", "silver"), ("think", "steelblue"))):
        one = summary["modes"][mode]
        scores = [one["questions"][name] for name in COLUMNS]
        places = [i + 0.4 * shift - 0.2 for i in range(len(COLUMNS))]
        ends = [[s["score"] - s["low"] for s in scores], [s["high"] - s["score"] for s in scores]]
        label = "after thinking" if mode == "think" else "at once"
        axes.bar(places, [s["score"] for s in scores], 0.38, yerr=ends, capsize=3, color=colour, label=label)
        for place, name in zip(places, COLUMNS, strict=True):
            values = one["seeds"][name]["values"]
            axes.plot([place] * len(values), values, "k.", markersize=4)
    axes.set_xticks(range(len(COLUMNS)), COLUMNS)
    axes.set(ylim=(0, 1), ylabel="right")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def study(out: Path, model: str, *, n: int, seeds: Sequence[int], steps: int | None) -> dict[str, Any]:
    """Run what is not there yet, and write the results."""
    results = {mode: [run_seed(out, model, n=n, seed=seed, steps=steps, mode=mode) for seed in seeds] for mode in MODES}
    summary = summarize(results)
    first = results["normal"][0]
    made = {
        "model": Path(model).name,
        "weights": first["run"]["weights"].get("sha256", "not a module"),
        "n": n,
        "seeds": list(seeds),
        "steps": steps,
        "torch": torch.__version__,
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "seconds_of_last_call": round(sum(one["seconds"] for some in results.values() for one in some)),
    }
    (out / "thinking_gap.json").write_text(json.dumps({"made": made, **summary}, indent=1) + "\n", encoding="utf-8")
    (out / "thinking_gap.md").write_text(results_table(made, summary), encoding="utf-8")
    plot(out / "thinking_gap.png", summary)
    return {"made": made, **summary}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="bagel-nano")
    parser.add_argument("--n", type=int, default=20, help="questions, or pairs of them, a level and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, help="of the sampler; the model's own unless given")
    options = parser.parse_args()
    study(options.out, options.model, n=options.n, seeds=options.seeds, steps=options.steps)
    print((options.out / "thinking_gap.md").read_text(), end="")
