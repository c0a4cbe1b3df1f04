"""The result of a run as JSON and as a Markdown table, and the comparison of two results."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import unimm
from unimm.evaluation.benchmarks.base import Benchmark, PublishedScores
from unimm.evaluation.scores import GroupScore, PairedDifference, UnitScore, paired_difference

FORMAT = "unimm-evaluation-1"
# packages whose versions a score may depend on
PACKAGES = ("torch", "numpy", "pillow", "transformers", "openai")


def package_versions() -> dict[str, str]:
    """The versions of this package, of Python and of what is installed of PACKAGES."""
    ours = {"unimm": unimm.__version__, "python": platform.python_version()}
    return ours | {name: found for name in PACKAGES if (found := _installed_version(name))}


def _installed_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def build_result(
    benchmark: Benchmark,
    run: Mapping[str, Any],
    judge: Mapping[str, Any],
    units: Sequence[UnitScore],
    *,
    n_items: int,
    n_changed: int,
) -> dict[str, Any]:
    """result.json. n_changed: images that are not those that the model drew."""
    scores = benchmark.scores(units)
    return {
        "format": FORMAT,
        "benchmark": benchmark.NAME,
        "scores": {name: asdict(score) for name, score in scores.items()},
        "scale": list(benchmark.SCALE),
        "items": n_items,
        "failed": sum(one.value is None for one in units),
        "changed": n_changed,
        "run": dict(run),
        "judge": dict(judge),
        **benchmark.notes,
        "versions": package_versions(),
        "units": {one.id: {"group": one.group, "score": one.value} for one in units},
    }


def result_markdown(result: Mapping[str, Any], published: Sequence[PublishedScores]) -> str:
    """A table of a result's scores with their intervals, and published rows beneath."""
    scores = {name: GroupScore(**score) for name, score in result["scores"].items()}
    run = result["run"]
    names = list(scores)
    mode = ", thinking" if run["options"].get("think") else ""
    lines = [f"# {result['benchmark']}", ""]
    lines += [f"| model | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    ours = " | ".join(interval_text(scores[name]) for name in names)
    lines.append(f"| **{run['model']}**{mode} | {ours} |")
    for row in published:
        shown = " | ".join(f"{row.scores[name]:g}" if name in row.scores else "" for name in names)
        if set(row.scores) & set(names):
            lines.append(f"| {row.model}{', thinking' if row.think else ''} | {shown} |")
    lines += ["", f"Means with 95 % intervals, of {result['items']} items."]
    if published:
        sources = "; ".join(dict.fromkeys(row.source for row in published if row.source))
        lines.append(f"The other rows are as published ({sources}): with other seeds, and by the judge named there.")
        if run["items"] != "released files":
            lines.append("Ours are over new items, theirs over the released ones.")
    if result["failed"]:
        lines.append(f"**The judge failed on {result['failed']}**, which are in no score.")
    if result["changed"]:
        lines.append(f"**{result['changed']} images** are not those that the model drew.")
    lines += ["", "| | |", "|---|---|"]
    facts = {
        "weights": run.get("weights", {}).get("sha256", "not a module"),
        "prompts": run["prompts"],
        "answers": run["answers"],
        "seed": run["seed"],
        "options": json.dumps(run["options"]),
        "judge": json.dumps(result["judge"]),
        "versions": json.dumps(result["versions"]),
    }
    lines += [f"| {name} | `{value}` |" for name, value in facts.items()]
    return "\n".join(lines) + "\n"


def interval_text(score: GroupScore) -> str:
    """A score with its interval and number: 0.500 (0.404 - 0.596), n 100."""
    if score.score is None:
        return f"none, {score.failed} failed"
    failed = f", {score.failed} failed" if score.failed else ""
    return f"{score.score:.3f} ({score.low:.3f} - {score.high:.3f}), n {score.n}{failed}"


# ---- two results


def read_result(path: Path) -> dict[str, Any]:
    """A result.json, or that of a run's folder. Raises ValueError for a file that is none."""
    file = path / "result.json" if path.is_dir() else path
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"no result at {file}: expected a result.json of unimm eval") from error
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise ValueError(f"{file} is no result of this version: expected the format {FORMAT}; run the evaluation again")
    return result


def compare_results(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, PairedDifference]:
    """The paired difference of each group of two results over the same units.

    Raises ValueError for results of different benchmarks or items: what was asked must be the same, but for thinking.
    """
    if a["benchmark"] != b["benchmark"]:
        raise ValueError(f"got results of {a['benchmark']} and {b['benchmark']}: expected the same benchmark")
    if only := set(a["units"]) ^ set(b["units"]):
        example = min(only)
        raise ValueError(
            f"got results over different items: {len(only)} are in one alone, as {example}; run both with the same "
            "--items, --n and --seed"
        )
    if a["run"]["answers"] != b["run"]["answers"]:
        raise ValueError(
            "got results over different items of the same names: run both with the same --items and --seed"
        )
    pairs: dict[str, list[tuple[float, float]]] = {}
    for name, one in a["units"].items():
        x = one["score"]
        y = b["units"][name]["score"]
        if x is not None and y is not None:
            pairs.setdefault(one["group"], []).append((x, y))
    every = {**pairs, "all": [pair for some in pairs.values() for pair in some]} if len(pairs) > 1 else pairs
    if not every:
        raise ValueError("got results without a unit that was judged in both")
    return {name: paired_difference(*map(list, zip(*some, strict=True))) for name, some in every.items()}
