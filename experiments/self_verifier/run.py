"""Which of its own images would a model learn from? The verifiers of STARS (arXiv 2511.20561), before any training.

    python -m experiments.self_verifier OUT --model bagel-nano --n 20 --seeds 1 2 3

For each seed new questions of the levels about pairs of shape and colour of the train split, as STARS asks them: the
model thinks, generates, and verifies its own images without being shown the right answers; the exact judge sees them,
too. The precision of what each verifier accepts is what a round of STARS would train on: that of `exact` is 1, that of
`none` the model's accuracy. The seed makes the questions and the noise; the model is one. Writes OUT/self_verifier.json,
.md and .png; the folders of the runs stay in OUT, so that a stopped command goes on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.common import Bar, describe_run, experiment_parser, plot_bars, run_command, write_results
from unimm.evaluation.benchmarks.base import BenchmarkOptions
from unimm.evaluation.benchmarks.shapes import exact_shapes_judge
from unimm.evaluation.benchmarks.unisandbox.benchmark import REASONING
from unimm.evaluation.run import run_benchmark
from unimm.evaluation.setup import model_source
from unimm.models.registry import load
from unimm.self_training.questions import StarsQuestions, round_seed
from unimm.self_training.selection import Candidate, choose_candidates, summarize
from unimm.self_training.verifiers import self_judge

RATES = ("accuracy", "acceptance_rate", "precision", "recall")


def run_level(out: Path, model: str, level: str, *, n: int, seed: int, steps: int | None) -> list[Candidate]:
    """The model's images to n questions of a level, or pairs of them, as it and the exact judge see them."""
    options = BenchmarkOptions(
        n=n, seed=round_seed(seed, 1), think=True, tasks=(level,), world="shapes", supports_thinking=True
    )
    questions = StarsQuestions(options, left_out=())
    sampling = {} if steps is None else {"steps": steps}
    source = model_source(model, "unisandbox", options=sampling)
    scores = []
    for judge in (lambda: self_judge(load(model), "shapes"), exact_shapes_judge):
        state = run_benchmark(questions, source, judge, out / f"seed{seed}-{level}", batch_size=50)
        assert state.result is not None
        scores.append({name: unit["score"] for name, unit in state.result["units"].items()})
    verified, right = scores
    return choose_candidates(questions.items(), verified=verified, right=right, most=None)


def study(
    out: Path,
    model: str,
    *,
    n: int,
    seeds: Sequence[int],
    steps: int | None,
    levels: Sequence[str] = REASONING,
) -> dict[str, Any]:
    """Run what is not there yet, and write the results: of each level over all seeds, and of each seed."""
    began = time.process_time()
    found = {
        level: {seed: run_level(out, model, level, n=n, seed=seed, steps=steps) for seed in seeds} for level in levels
    }
    results = {
        level: {
            "questions": summarize([one for some in by_seed.values() for one in some]),
            "seeds": {str(seed): summarize(some) for seed, some in by_seed.items()},
        }
        for level, by_seed in found.items()
    }
    made = describe_run(
        model=Path(model).name,
        n=n,
        seeds=list(seeds),
        steps=steps,
        seconds_of_last_call=round(time.process_time() - began),
    )
    result = {"made": made, "levels": results}
    write_results(out, "self_verifier", result, results_table(result))
    plot(out / "self_verifier.png", results)
    return result


def results_table(result: Mapping[str, Any]) -> str:
    """The table in markdown: rates over the questions of all seeds, and the least and the greatest of a seed."""
    lines = ["| level | images | accuracy (`none`) | acceptance rate | precision (`self`) | recall |", "|---" * 6 + "|"]
    for level, one in result["levels"].items():
        cells = (rate_text(name, one) for name in RATES)
        lines.append(f"| {level} | {one['questions']['generated']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def rate_text(name: str, one: Mapping[str, Any]) -> str:
    """A rate with its interval over questions, and its range over seeds."""
    rate = one["questions"][name]
    if rate is None:
        return "of none"
    of_seeds = [some[name]["value"] for some in one["seeds"].values() if some[name] is not None]
    interval = f"{rate['low']:.2f} - {rate['high']:.2f}"
    return f"**{rate['value']:.2f}** ({interval}), seeds {min(of_seeds):.2f} to {max(of_seeds):.2f}"


def plot(path: Path, levels: Mapping[str, Any]) -> None:
    """Bars of the share of right images with and without the verifier, with intervals over questions."""
    kinds = {"all images": "accuracy", "those that it accepts": "precision"}
    series = {label: [rate_bar(name, one) for one in levels.values()] for label, name in kinds.items()}
    plot_bars(path, list(levels), series)


def rate_bar(name: str, one: Mapping[str, Any]) -> Bar | None:
    """The bar of a rate over all questions, with a dot for each seed; None for a rate of nothing."""
    rate = one["questions"][name]
    if rate is None:
        return None
    of_seeds = [some[name]["value"] for some in one["seeds"].values() if some[name] is not None]
    return Bar(height=rate["value"], low=rate["low"], high=rate["high"], dots=of_seeds)


def main() -> None:
    """Run the command line."""
    parser = experiment_parser(__doc__)
    parser.add_argument("--model", default="bagel-nano")
    parser.add_argument("--n", type=int, default=20, help="questions, or pairs of them, a level and seed")
    parser.add_argument("--steps", type=int, help="of the sampler; the model's own unless given")
    parser.add_argument("--levels", nargs="+", default=list(REASONING), choices=REASONING)
    run_command("self_verifier", parser, study)
