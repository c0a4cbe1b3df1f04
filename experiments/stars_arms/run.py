"""STARS at nano size: what a round brings, by who rejects (tables 2 and 3 and figure 5 of UniSandBox, arXiv 2511.20561).

    python -m experiments.stars_arms OUT --rounds math1 --n 30 --seeds 1 2 3

A round of `unimm stars` on each level that is named, once for each verifier: the model itself, the exact judge, none. And
since bagel-nano reasons about rules of one chain and fails at two questions about one set of rules, it is also taught these
in words alone, with drawing mixed in, and what that brings is measured; `--start taught` lets the rounds begin there. Writes
OUT/stars_arms.json, .md and .png; a stopped command goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from experiments.common import (
    Bar,
    describe_run,
    difference_text,
    experiment_parser,
    kept_result,
    markdown_table,
    paired,
    plot_bars,
    right_of,
    run_command,
    seeded_score,
    spent_seconds,
    unisandbox_right,
    write_results,
)
from experiments.stars_arms.words import teach_words
from unimm.checkpoint.json_files import read_json
from unimm.evaluation.benchmarks.base import BenchmarkOptions
from unimm.evaluation.benchmarks.unisandbox.benchmark import REASONING
from unimm.self_training.config import STARS_RECIPES, StarsConfig, read_stars_recipe
from unimm.self_training.folder import StarsFolder
from unimm.self_training.run import run_stars

VERIFIERS = ("self", "exact", "none")
MODES = ("normal", "think")
SAMPLER_STEPS = 12
# questions a level, or pairs of them, for the base alone
N_BASE = 8


def evaluate_levels(
    model: str, out: Path, *, levels: Sequence[str], n: int, seed: int, mode: str
) -> dict[str, list[int]]:
    """Which questions of each level, or pairs of them, a model draws right."""
    options = BenchmarkOptions(n=n, seed=seed, think=mode == "think", tasks=tuple(levels), supports_thinking=True)
    return unisandbox_right(model, out, options, steps=SAMPLER_STEPS)


def run_base(model: str, out: Path, *, seed: int, n: int, steps: int) -> dict[str, Any]:
    """The base of a seed, on all levels in both modes."""
    losses = teach_words(model, out / "base", seed=seed, steps=steps)
    right = {
        mode: evaluate_levels(str(out / "base"), out / f"taught-{mode}", levels=REASONING, n=n, seed=seed, mode=mode)
        for mode in MODES
    }
    return {"losses": losses, "right": right}


def run_arm(
    base: str,
    out: Path,
    *,
    level: str,
    verifier: str,
    seed: int,
    n: int,
    questions: int,
    steps: int,
) -> dict[str, Any]:
    """A round of STARS on a level: what it was trained on, and its model on the levels of that kind."""
    levels = tuple(one for one in REASONING if one[:-1] == level[:-1])
    config = stars_config(
        base, level=level, levels=levels, verifier=verifier, seed=seed, n=n, questions=questions, steps=steps
    )
    StarsFolder(out).claim(config)
    share_stages(out.parent, out, level)
    result = run_stars(config, out, workers=0, progress=False)
    (one,) = result["rounds"]
    place = out / f"round1-{level}"
    right = {mode: right_of(read_json(place / mode / "result.json")) for mode in MODES}
    before = {mode: right_of(read_json(out / "before" / mode / "result.json")) for mode in MODES}
    return {"selection": one["selection"], "right": right, "before": before}


def share_stages(folder: Path, out: Path, level: str) -> None:
    """Copy what another verifier's arm has that is the same for all: the base on the evaluation's questions, and the
    images to learn from, which are generated before anybody verifies them."""
    for stage in ("before", f"round1-{level}/generated"):
        done = [path for path in folder.glob(f"{level}-*/{stage}") if path.parts != (out / stage).parts]
        finished = [path for path in done if (folder / f"{path.relative_to(folder).parts[0]}.json").is_file()]
        if finished and not (out / stage).exists():
            shutil.copytree(finished[0], out / stage)


def stars_config(
    base: str, *, level: str, levels: Sequence[str], verifier: str, seed: int, n: int, questions: int, steps: int
) -> StarsConfig:
    """The bundled recipe at this size."""
    settings = [
        f"model={base}",
        f"seed={seed}",
        f"levels=[{level}]",
        f"questions={questions}",
        f"verifier={verifier}",
        f"sampling.steps={SAMPLER_STEPS}",
        f"evaluation.levels=[{', '.join(levels)}]",
        f"evaluation.n={n}",
        f"evaluation.seed={seed}",
        f"train.steps={steps}",
        f"train.save_every={steps}",
        f"train.sample_every={steps}",
    ]
    return read_stars_recipe(STARS_RECIPES / "stars-nano.yaml", settings=settings)


def study(
    out: Path,
    model: str,
    *,
    seeds: Sequence[int],
    rounds: Sequence[str],
    verifiers: Sequence[str],
    start: str,
    n: int,
    questions: int,
    base_steps: int,
    steps: int,
) -> dict[str, Any]:
    """Run what is not there yet, and write the results. start: what rounds begin from, "released" or "taught"."""
    bases = []
    arms: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:
        folder = out / f"seed-{seed}"
        asked = {"model": model, "seed": seed, "n": N_BASE, "steps": base_steps}
        make = partial(run_base, model, folder, seed=seed, n=N_BASE, steps=base_steps)
        bases.append(kept_result(folder / "base.json", asked, make))
        base = model if start == "released" else str(folder / "base")
        for level in rounds:
            for verifier in verifiers:
                given = {"level": level, "verifier": verifier, "seed": seed, "n": n}
                given |= {"questions": questions, "steps": steps}
                make = partial(run_arm, base, folder / f"{level}-{verifier}", **given)
                done = kept_result(folder / f"{level}-{verifier}.json", {**given, "base": start}, make)
                arms.setdefault(f"{level}, {verifier}", []).append(done)
    spent = spent_seconds([*bases, *(one for some in arms.values() for one in some)])
    settings = {
        "model": model,
        "start": start,
        "n": n,
        "n_base": N_BASE,
        "questions": questions,
        "base_steps": base_steps,
        "steps": steps,
    }
    made = describe_run(**settings, sampler_steps=SAMPLER_STEPS, seeds=list(seeds), seconds=spent)
    result = {"made": made, **summarize(bases, arms)}
    write_results(out, "stars_arms", result, results_table(result))
    plot(out / "stars_arms.png", result["models"])
    return result


def summarize(bases: Sequence[Mapping[str, Any]], arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Scores of each model by mode and level, and what each verifier accepted."""
    found = {"taught in words": [one["right"] for one in bases]}
    # all verifiers' arms of a level begin alike
    first = {name.partition(",")[0]: some for name, some in reversed(arms.items())}
    found |= {f"before {level}": [one["before"] for one in some] for level, some in first.items()}
    found |= {name: [one["right"] for one in some] for name, some in arms.items()}
    models = {
        name: {
            mode: {level: seeded_score([one[mode][level] for one in some]) for level in some[0][mode]} for mode in MODES
        }
        for name, some in found.items()
    }
    return {
        "models": models,
        "changes": {name: {mode: changes(some, mode) for mode in MODES} for name, some in arms.items()},
        "selections": {name: [one["selection"] for one in some] for name, some in arms.items()},
    }


def changes(runs: Sequence[Mapping[str, Any]], mode: str) -> dict[str, Any]:
    """How much more a round's models get right than they did before it, question by question over all seeds, by level."""
    return {
        level: paired(*([right for one in runs for right in one[when][mode][level]] for when in ("before", "right")))
        for level in runs[0]["right"][mode]
    }


def results_table(result: Mapping[str, Any]) -> str:
    """The tables in markdown."""
    scores, changed = [], []
    for name, model in result["models"].items():
        for mode in MODES:
            cells = (score_cell(model[mode].get(level)) for level in REASONING)
            scores.append([name, "yes" if mode == "think" else "no", *cells])
    for name, change in result["changes"].items():
        for mode in MODES:
            cells = (difference_text(change[mode][level]) if level in change[mode] else "" for level in REASONING)
            changed.append([name, "yes" if mode == "think" else "no", *cells])
    selected = [
        [name, str(one["generated"]), str(one["accepted"]), rate_cell(one["precision"]), rate_cell(one["recall"])]
        for name, some in result["selections"].items()
        for one in some
    ]
    tables = (
        markdown_table(["model", "thinking", *REASONING], scores),
        markdown_table(["change by the round", "thinking", *REASONING], changed),
        markdown_table(["round, verifier", "images", "accepted", "precision", "recall"], selected),
    )
    return "\n".join(tables)


def score_cell(one: Mapping[str, Any] | None) -> str:
    """A score with its interval, and how many items it is of."""
    if one is None:
        return ""
    items = one["items"]
    return f"{items['score']:.2f} ({items['low']:.2f}-{items['high']:.2f}), n {items['n']}"


def rate_cell(one: Mapping[str, Any] | None) -> str:
    """A rate with its interval."""
    return "of none" if one is None else f"{one['value']:.2f} ({one['low']:.2f}-{one['high']:.2f})"


def plot(path: Path, models: Mapping[str, Any]) -> None:
    """Bars of the rounds' models by level: at once, and before the rounds also after thinking."""
    shown = {name: model for name, model in models.items() if not name.startswith("taught")} or models
    levels = [level for level in REASONING if any(level in model["normal"] for model in shown.values())]
    series = {
        f"{name}, {'after thinking' if mode == 'think' else 'at once'}": [
            Bar.of_score(one["items"]) if (one := model[mode].get(level)) else None for level in levels
        ]
        for name, model in shown.items()
        for mode in (MODES if name.startswith("before") else ("normal",))
    }
    plot_bars(path, levels, series)


def main() -> None:
    """Run the command line."""
    parser = experiment_parser(__doc__)
    parser.add_argument("--model", default="bagel-nano")
    parser.add_argument("--rounds", nargs="*", default=["math1"], choices=REASONING, help="levels, a round each")
    parser.add_argument("--verifiers", nargs="+", default=VERIFIERS, choices=VERIFIERS, help="an arm each")
    parser.add_argument("--start", default="released", choices=["released", "taught"], help="what rounds begin from")
    parser.add_argument("--n", type=int, default=30, help="evaluated questions, or pairs of them, a level")
    parser.add_argument("--questions", type=int, default=600, help="to learn from, or pairs of them")
    parser.add_argument("--base-steps", type=int, default=100, help="of teaching in words")
    parser.add_argument("--steps", type=int, default=480, help="of a round's fine-tuning")
    run_command("stars_arms", parser, study)
