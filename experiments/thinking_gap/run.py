"""Does a model generate after thinking what it cannot generate at once? Table 1 of UniSandBox (arXiv 2511.20561), small.

    python -m experiments.thinking_gap OUT --model bagel-nano --n 10 --seeds 1 2 3

For each seed new questions of all six levels, each answered twice from the same noise: at once, and after thinking. The
seed makes the questions and the noise; the model is one. Writes OUT/thinking_gap.json, .md and .png; the folders of the
runs stay in OUT, so that a stopped command goes on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.common import (
    Bar,
    describe_run,
    difference_text,
    experiment_parser,
    over_seeds,
    paired,
    plot_bars,
    run_command,
    score_text,
    seeds_text,
    write_results,
)
from unimm.evaluation.benchmarks.base import BenchmarkOptions
from unimm.evaluation.benchmarks.unisandbox.benchmark import PUBLISHED, REASONING, UniSandBoxBenchmark
from unimm.evaluation.run import run_benchmark
from unimm.evaluation.scores import GroupScore, UnitScore
from unimm.evaluation.setup import model_source, prepare_judge

MODES = ("normal", "think")
COLUMNS = (*REASONING, "average")


def run_seed(out: Path, model: str, *, n: int, seed: int, steps: int | None, mode: str) -> dict[str, Any]:
    """The result of one seed in one mode, and the seconds of the processor that this call took for it."""
    began = time.process_time()
    options = BenchmarkOptions(n=n, seed=seed, think=mode == "think", supports_thinking=True)
    benchmark = UniSandBoxBenchmark(options)
    sampling = {} if steps is None else {"steps": steps}
    source = model_source(model, benchmark.NAME, options=sampling)
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


def gap(normal: Sequence[Mapping[str, Any]], think: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How much higher thinking scores, question by question over all seeds, for each level and all."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for a, b in zip(normal, think, strict=True):
        for name, unit in a["units"].items():
            for group in (unit["group"], "average"):
                pairs.setdefault(group, []).append((unit["score"], b["units"][name]["score"]))
    return {group: paired(*zip(*some, strict=True)) for group, some in pairs.items()}


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


def results_table(result: Mapping[str, Any]) -> str:
    """The tables in markdown."""
    model = result["made"]["model"]
    lines = [f"| model | thinking | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for mode, one in result["modes"].items():
        thinks = "yes" if mode == "think" else "no"
        cells = (score_text(one["questions"][name]) for name in COLUMNS)
        lines.append(f"| **{model}**, by questions | {thinks} | {' | '.join(cells)} |")
        cells = (seeds_text(one["seeds"][name]) for name in COLUMNS)
        lines.append(f"| **{model}**, by seeds | {thinks} | {' | '.join(cells)} |")
    cells = (difference_text(result["gap"][name]) for name in COLUMNS)
    lines.append(f"| **{model}**, gap | | {' | '.join(cells)} |")
    for row in PUBLISHED:
        cells = (f"{row.scores[name]:g}" for name in COLUMNS)
        lines.append(f"| {row.model} | {'yes' if row.think else 'no'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(path: Path, result: Mapping[str, Any]) -> None:
    """Bars of both modes by level, with intervals over questions, and a dot for each seed."""
    labels = {"normal": "at once", "think": "after thinking"}
    series = {
        label: [
            Bar.of_score(result["modes"][mode]["questions"][name], result["modes"][mode]["seeds"][name]["values"])
            for name in COLUMNS
        ]
        for mode, label in labels.items()
    }
    plot_bars(path, COLUMNS, series)


def study(out: Path, model: str, *, n: int, seeds: Sequence[int], steps: int | None) -> dict[str, Any]:
    """Run what is not there yet, and write the results."""
    results = {mode: [run_seed(out, model, n=n, seed=seed, steps=steps, mode=mode) for seed in seeds] for mode in MODES}
    first = results["normal"][0]
    made = describe_run(
        model=Path(model).name,
        weights=first["run"]["weights"].get("sha256", "not a module"),
        n=n,
        seeds=list(seeds),
        steps=steps,
        seconds_of_last_call=round(sum(one["seconds"] for some in results.values() for one in some)),
    )
    result = {"made": made, **summarize(results)}
    write_results(out, "thinking_gap", result, results_table(result))
    plot(out / "thinking_gap.png", result)
    return result


def main() -> None:
    """Run the command line."""
    parser = experiment_parser(__doc__)
    parser.add_argument("--model", default="bagel-nano")
    parser.add_argument("--n", type=int, default=20, help="questions, or pairs of them, a level and seed")
    parser.add_argument("--steps", type=int, help="of the sampler; the model's own unless given")
    run_command("thinking_gap", parser, study)
