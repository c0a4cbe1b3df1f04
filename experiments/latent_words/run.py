"""Do a MetaQuery's queries say what nobody wrote? The probe of UniSandBox (arXiv 2511.20561, figure 4) at nano size.

    python -m experiments.latent_words OUT --model metaquery-nano

The MLLM of metaquery-nano was taught what twelve characters like ("which colour does Tom like?"), and for six of them
also to say what to draw for "draw what Tom likes". Here its language head reads its hidden states at the queries of such
a prompt, in four wordings: of all colour words, and of all shape words, which is likeliest at some query? Beside it stands
the same for prompts that name the colour and the shape, and for sums, and what the MLLM says to draw where it is let
write. There is no noise in it, so there are no seeds. Writes OUT/latent_words.json, .md and .png, and OUT/queries.png,
the words of one prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import (
    Bar,
    describe_run,
    experiment_parser,
    markdown_table,
    plot_bars,
    pooled_score,
    run_command,
    score_text,
    write_results,
)
from experiments.query_transfer.run import FACTS_ONLY, PLANNED, mllm_plans
from unimm import MetaQuery
from unimm.data.shapes import example
from unimm.data.shapes.language import DRAW_FAVOURITE, FAVOURITES, NUMBERS, article
from unimm.data.shapes.world import COLOURS, SHAPES
from unimm.evaluation.query_words import plot_query_words, query_words, word_probabilities

SHOWN = DRAW_FAVOURITE[0].format(name="Tom")
# of each kind of prompt: what the words are, and of how many one is right
KINDS = {"colour": tuple(COLOURS), "shape": tuple(SHAPES), "count": tuple(NUMBERS[n] for n in range(1, 5))}


def prompts_of(n_sums: int) -> dict[str, list[tuple[str, dict[str, str]]]]:
    """Groups of prompts, each with its right words by kind."""
    groups: dict[str, list[tuple[str, dict[str, str]]]] = {}
    for group, names in (("facts and plans", PLANNED), ("facts alone", FACTS_ONLY)):
        groups[group] = [
            (wording.format(name=name), dict(zip(("shape", "colour"), FAVOURITES[name], strict=True)))
            for name in names
            for wording in DRAW_FAVOURITE
        ]
    groups["named"] = [
        (f"draw {article(f'{colour} {shape}')}", {"shape": shape, "colour": colour})
        for shape, colour in FAVOURITES.values()
    ]
    for level in (1, 2, 3):
        some = [example(f"reason.math{level}", i, seed=1, split="test") for i in range(n_sums)]
        groups[f"sums, level {level}"] = [(one.prompt, {"count": NUMBERS[len(one.goal.wants)]}) for one in some]
    return groups


def measure(model: MetaQuery, prompts: Sequence[tuple[str, Mapping[str, str]]]) -> dict[str, Any]:
    """Of each kind of word: in how many prompts the right one is the likeliest of its kind at some query, and in how many
    it is in what the MLLM says to draw, where it is let write."""
    found = {}
    texts = [text for text, _ in prompts]
    said = [plan.split() for plan in mllm_plans(model, texts)]
    for kind in prompts[0][1]:
        words = KINDS[kind]
        # [prompts, words]: the most that a word has at any query
        most = np.asarray(word_probabilities(model, texts, words)).max(-1)
        right = [
            int(words[int(row.argmax())] == answers[kind]) for row, (_, answers) in zip(most, prompts, strict=True)
        ]
        own = [float(row[words.index(answers[kind])]) for row, (_, answers) in zip(most, prompts, strict=True)]
        found[kind] = {
            "right": pooled_score(right),
            "said": pooled_score(
                [says(plan, kind, answers[kind]) for plan, (_, answers) in zip(said, prompts, strict=True)]
            ),
            "probability": float(np.mean(own)),
            "chance": 1 / len(words),
        }
    return found


def says(plan: Sequence[str], kind: str, answer: str) -> int:
    """Whether the words of what the MLLM says to draw have the answer. It lists things one by one, each with its article."""
    if kind == "count":
        return int(plan.count("a") == NUMBERS.index(answer))
    return int(answer in plan)


def study(out: Path, model: str, *, n_sums: int) -> dict[str, Any]:
    """Measure, and write the results."""
    loaded = MetaQuery.from_pretrained(model)
    groups = {group: measure(loaded, prompts) for group, prompts in prompts_of(n_sums).items()}
    result = {"made": describe_run(model=model, n_sums=n_sums), "groups": groups}
    write_results(out, "latent_words", result, results_table(result))
    plot(out / "latent_words.png", groups)
    (words,) = query_words(loaded, [SHOWN], k=4)
    plot_query_words(words, columns=8).save(out / "queries.png")
    return result


def results_table(result: Mapping[str, Any]) -> str:
    """The table in markdown."""
    rows = [
        [
            group,
            kind,
            score_text(one["right"]),
            f"{one['chance']:.3f}",
            f"{one['probability']:.2f}",
            score_text(one["said"]),
        ]
        for group, kinds in result["groups"].items()
        for kind, one in kinds.items()
    ]
    header = [
        "prompts",
        "words",
        "the right one is the likeliest",
        "chance",
        "its mean probability",
        "in the MLLM's own words",
    ]
    return markdown_table(header, rows)


def plot(path: Path, groups: Mapping[str, Any]) -> None:
    """Bars of the shares by group, a series for each kind of word."""
    series = {
        kind: [Bar.of_score(kinds[kind]["right"]) if kind in kinds else None for kinds in groups.values()]
        for kind in KINDS
    }
    plot_bars(path, list(groups), series, ylabel="right word is the likeliest")


def main() -> None:
    """Run the command line."""
    parser = experiment_parser(__doc__, seeds=False)
    parser.add_argument("--model", default="metaquery-nano")
    parser.add_argument("--n-sums", type=int, default=40, help="prompts a level of sums")
    run_command("latent_words", parser, study)
