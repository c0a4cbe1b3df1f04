"""The result of a run of STARS as JSON and as Markdown tables, with the published rows beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from unimm.evaluation.results import compare_results, interval_text, package_versions
from unimm.evaluation.scores import GroupScore
from unimm.self_training.config import StarsConfig

STARS_FORMAT = "unimm-stars-1"
MODES = ("normal", "think")


@dataclass(frozen=True, kw_only=True)
class PublishedStars:
    """A row of UniSandBox's tables 2 and 3 (arXiv 2511.20561), all by BAGEL-7B-MoT: scores without and with thinking."""

    model: str
    levels: tuple[str, ...]
    normal: tuple[float, ...]
    think: tuple[float, ...]


_MATH = ("math1", "math2", "math3")
_MAPPING = ("mapping1", "mapping2", "mapping3")
PUBLISHED_STARS = tuple(
    PublishedStars(model=model, levels=levels, normal=normal, think=think)
    for model, levels, normal, think in (
        ("BAGEL", _MATH, (0.07, 0.06, 0.04), (0.60, 0.44, 0.23)),
        ("on math1", _MATH, (0.29, 0.27, 0.16), (0.60, 0.42, 0.27)),
        ("on math2", _MATH, (0.17, 0.26, 0.12), (0.57, 0.41, 0.25)),
        ("on math3", _MATH, (0.26, 0.26, 0.16), (0.55, 0.43, 0.29)),
        ("BAGEL", _MAPPING, (0, 0, 0), (0.75, 0.57, 0.46)),
        ("on mapping1", _MAPPING, (0.69, 0.10, 0.10), (0.66, 0.39, 0.38)),
        ("on mapping1, mapping2", _MAPPING, (0.61, 0.47, 0.22), (0.68, 0.62, 0.40)),
        ("on mapping1, mapping2, mapping3", _MAPPING, (0.64, 0.46, 0.27), (0.75, 0.65, 0.50)),
    )
)


def build_stars_result(
    config: StarsConfig, before: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """result.json. before: results of `unimm eval` in each mode; rounds: what each says of itself, with such results."""
    return {
        "format": STARS_FORMAT,
        "recipe": asdict(config),
        "before": {mode: _scores_of(before[mode]) for mode in MODES},
        "rounds": [
            {
                **{name: one[name] for name in ("level", "selection", "training")},
                **{mode: _scores_of(one[mode]) for mode in MODES},
                "change": {mode: _change(before[mode], one[mode]) for mode in MODES},
            }
            for one in rounds
        ],
        "judge": before["normal"]["judge"],
        "versions": package_versions(),
    }


def _scores_of(result: Mapping[str, Any]) -> dict[str, Any]:
    return {"weights": result["run"].get("weights"), "failed": result["failed"], "scores": result["scores"]}


def _change(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """How much higher the scores are, question by question."""
    return {group: asdict(one) for group, one in compare_results(before, after).items()}


def stars_markdown(result: Mapping[str, Any]) -> str:
    """Tables of a result.json: scores before and after, the changes, and what was accepted."""
    recipe = result["recipe"]
    names = list(result["before"]["normal"]["scores"])
    lines = ["# STARS", "", f"| model | thinking | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    lines += _score_rows(f"**{recipe['model']}**", result["before"], names)
    for title, one in _rounds(result):
        lines += _score_rows(f"**{title}**", one, names)
    shown = [row for row in PUBLISHED_STARS if set(row.levels) & set(names)]
    for row in shown:
        for mode in MODES:
            scores = dict(zip(row.levels, getattr(row, mode), strict=True))
            cells = (f"{scores[name]:g}" if name in scores else "" for name in names)
            lines.append(f"| {row.model} | {_yes_no(mode)} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Means with 95 % intervals, judged by {result['judge']['kind']}. Rows in bold are ours; the others are",
    ]
    lines += [
        "BAGEL-7B-MoT's as published (UniSandBox, tables 2 and 3), over other questions and by another judge.",
        "",
    ]
    lines += [f"Change since {recipe['model']}, question by question:", ""]
    groups = list(result["rounds"][0]["change"]["normal"])
    lines += [f"| model | thinking | {' | '.join(groups)} |", f"|---|---|{'---|' * len(groups)}"]
    for title, one in _rounds(result):
        for mode in MODES:
            cells = (_change_text(one["change"][mode][name]) for name in groups)
            lines.append(f"| {title} | {_yes_no(mode)} | {' | '.join(cells)} |")
    lines += ["", f"What was trained on, by the verifier `{recipe['verifier']}`:", ""]
    lines += ["| round | generated | right | accepted | acceptance rate | precision | recall | trained on | steps |"]
    lines += ["|---" * 9 + "|"]
    for title, one in _rounds(result):
        picked = one["selection"]
        counts = [picked["generated"], "not known" if picked["right"] is None else picked["right"], picked["accepted"]]
        shares = [_share_text(picked[name]) for name in ("acceptance_rate", "precision", "recall")]
        values = [title, *counts, *shares, picked["used"], one["training"]["steps"]]
        lines.append(f"| {' | '.join(map(str, values))} |")
    return "\n".join(lines) + "\n"


def _rounds(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The rounds with what they were trained on until then."""
    levels = [one["level"] for one in result["rounds"]]
    return [(f"on {', '.join(levels[: i + 1])}", one) for i, one in enumerate(result["rounds"])]


def _score_rows(title: str, results: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [
        f"| {title} | {_yes_no(mode)} | "
        f"{' | '.join(interval_text(GroupScore(**results[mode]['scores'][name])) for name in names)} |"
        for mode in MODES
    ]


def _yes_no(mode: str) -> str:
    return "yes" if mode == "think" else "no"


def _share_text(share: Mapping[str, float] | None) -> str:
    return "not known" if share is None else f"{share['value']:.3f} ({share['low']:.3f} - {share['high']:.3f})"


def _change_text(change: Mapping[str, Any]) -> str:
    if change["low"] is None:
        return f"{change['difference']:+.3f}"
    return f"{change['difference']:+.3f} ({change['low']:+.3f} - {change['high']:+.3f})"
