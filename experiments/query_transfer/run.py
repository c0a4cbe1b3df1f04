"""Does what a frozen MLLM knows reach the image? Favourites of named characters through the queries of a MetaQuery.

    python -m experiments.query_transfer --model metaquery-nano --n 12

The denoiser was never trained on anybody's favourite. Its MLLM was trained on facts about twelve characters ("which
colour does Tom like?"), and for six of them also to plan the image in words ("draw what Tom likes": "a large red star
in the centre"). Here all twelve are requested, and six names that it does not know; every image is parsed, and compared
with the favourite of its own character, and with those of the others, which is chance. Writes OUT/query_transfer.md and
.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from unimm import MetaQuery
from unimm.data.shapes import parse_scene
from unimm.data.shapes.language import DRAW_FAVOURITE, FACT_COLOUR, FACT_SHAPE, FAVOURITES, article
from unimm.evaluation.benchmarks.shapes import BenchmarkScore, noise_seed, to_scene_array
from unimm.generation.text_sampling import TextSampling

PLANNED = ("Tom", "Anna", "Ben", "Clara", "David", "Emma")
FACTS_ONLY = tuple(name for name in FAVOURITES if name not in PLANNED)
STRANGERS = ("Max", "Olga", "Peter", "Lena", "Oscar", "Zoe")
GROUPS = {"facts and plans": PLANNED, "facts alone": FACTS_ONLY, "strangers": STRANGERS}
TEXT = """`python -m experiments.query_transfer --model {model} --n {n}`, {date}, torch {torch}, float32 on a CPU, one seed.

Does what a frozen MLLM knows reach the image? The denoiser of this MetaQuery was never trained on anybody's favourite.
Its MLLM was trained on facts about twelve characters (`which colour does Tom like?`, `who likes the red star?`), and
for six of them it was also trained to answer what to draw (`draw what Tom likes`: `a large red star in the centre`).
All twelve are asked for, in four wordings, and six names that no training named. Counted are images that hold the
favourite and nothing else; images of one or more things that all have its shape; and that all have its colour. Beside
each stands how often the same images show the favourites of the other characters, where these differ: that is chance,
for this denoiser. "The MLLM's own words" are what it says under the denoiser's system prompt, given to the same model
as a prompt: what the queries could say. Intervals (95 %) take images for independent, which those of one name are not.
"""
BATCH = 48
ShapeColour = tuple[str, str]  # shape, colour
AXES = ("shape", "colour")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request for a character's favourite, in a wording, for the n-th time."""

    name: str
    wording: str
    repetition: int

    @property
    def prompt(self) -> str:
        return self.wording.format(name=self.name)

    @property
    def seed(self) -> int:
        return noise_seed(1, self.prompt, self.repetition)


def parse_generated(model: MetaQuery, prompts: Sequence[str], seeds: Sequence[int]) -> list[list[ShapeColour]]:
    """The things in the image of each prompt."""
    found: list[list[ShapeColour]] = []
    for at in range(0, len(prompts), BATCH):
        images = model.generate(prompts[at : at + BATCH], seed=seeds[at : at + BATCH]).images
        found += [[(one.shape, one.colour) for one in parse_scene(to_scene_array(image))] for image in images]
    return found


def mllm_plans(model: MetaQuery, prompts: Sequence[str]) -> list[str]:
    """The MLLM's plans for prompts, under the denoiser's system prompt."""
    talks = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return model.chat(talks, system=model.config.system_prompt, text_sampling=TextSampling(max_tokens=40))


def fact_accuracy(model: MetaQuery, names: Sequence[str]) -> BenchmarkScore:
    """The part of questions about favourite shapes and colours that the MLLM answers right."""
    asked = [
        (name, wording, axis)
        for name in names
        for axis, some in enumerate((FACT_SHAPE, FACT_COLOUR))
        for wording in some
    ]
    answers = model.understand([[]] * len(asked), [wording.format(name=name) for name, wording, _ in asked])
    right = sum(answer == FAVOURITES[name][axis] for answer, (name, _, axis) in zip(answers, asked, strict=True))
    return BenchmarkScore.from_counts(right, len(asked))


def matches(found: Sequence[ShapeColour], pair: ShapeColour) -> dict[str, bool]:
    """Whether an image holds a favourite: it alone; things of its shape and no other; things of its colour and no
    other."""
    alike = {axis: bool(found) and all(one[i] == pair[i] for one in found) for i, axis in enumerate(AXES)}
    return {"pair": list(found) == [pair], **alike}


def other_favourites(name: str, what: str) -> list[ShapeColour]:
    """The favourites of other characters that differ from this one's: in the pair, or in its shape or its colour."""
    own = FAVOURITES.get(name)
    at = {"pair": slice(0, 2), "shape": slice(0, 1), "colour": slice(1, 2)}[what]
    return [pair for other, pair in FAVOURITES.items() if other != name and (own is None or pair[at] != own[at])]


def favourite_rates(found: Sequence[Sequence[ShapeColour]], asked: Sequence[Request]) -> dict[str, Any]:
    """How often images hold their own character's favourite, and how often those of the others, which is chance."""
    pairs = list(zip(found, asked, strict=True))
    own = [matches(one, FAVOURITES[a.name]) for one, a in pairs if a.name in FAVOURITES]
    others = {
        key: [matches(one, pair)[key] for one, a in pairs for pair in other_favourites(a.name, key)]
        for key in ("pair", *AXES)
    }
    return {
        "n": len(found),
        "empty": sum(not one for one in found) / len(found),
        "own": {
            key: asdict(BenchmarkScore.from_counts(sum(one[key] for one in own), len(own)))
            for key in ("pair", *AXES)
            if own
        },
        "others": {key: mean(some) for key, some in others.items()},
    }


def measure(model: MetaQuery, n: int) -> dict[str, Any]:
    """Rates for every group and every way to request; n images for each name and wording."""
    results: dict[str, Any] = {}
    for group, names in GROUPS.items():
        asked = [
            Request(name=name, wording=w, repetition=i) for name in names for w in DRAW_FAVOURITE for i in range(n)
        ]
        prompts, seeds = [one.prompt for one in asked], [one.seed for one in asked]
        plans = dict(zip(dict.fromkeys(prompts), mllm_plans(model, list(dict.fromkeys(prompts))), strict=True))
        row: dict[str, Any] = {
            "names": names,
            "queries": favourite_rates(parse_generated(model, prompts, seeds), asked),
            "plans": plans,
        }
        row["words"] = favourite_rates(
            parse_generated(model, [plans[prompt] or "nothing" for prompt in prompts], seeds), asked
        )
        if group != "strangers":
            row["facts"] = asdict(fact_accuracy(model, names))
            said = [
                all(word in plan.split() for word in FAVOURITES[name])
                for name in names
                for plan in plans_for(plans, name)
            ]
            row["planned"] = asdict(BenchmarkScore.from_counts(sum(said), len(said)))
            plain = [article("{1} {0}".format(*FAVOURITES[one.name])) for one in asked]
            row["named"] = favourite_rates(parse_generated(model, [f"draw {words}" for words in plain], seeds), asked)
        results[group] = row
    return results


def plans_for(plans: dict[str, str], name: str) -> list[str]:
    """The plans for a character, one a wording."""
    return [plans[wording.format(name=name)] for wording in DRAW_FAVOURITE]


def results_table(results: dict[str, Any]) -> str:
    """The results in markdown."""
    ways = {"queries": "name, through the queries", "words": "the MLLM's own words", "named": "`draw a red star`"}
    lines = [
        "| characters | asked for by | images | alone in the image | its shape | its colour | empty |",
        "|---|---|---|---|---|---|---|",
    ]
    for group, row in results.items():
        for way in (way for way in ways if way in row):
            cells = [rate_cell(row[way], key) for key in ("pair", *AXES)]
            lines.append(
                f"| {group} | {ways[way]} | {row[way]['n']} | {' | '.join(cells)} | {100 * row[way]['empty']:.0f} % |"
            )
    lines += [
        "",
        "| characters | facts answered right by the MLLM | favourites in the MLLM's plans |",
        "|---|---|---|",
    ]
    for group, row in results.items():
        if "facts" in row:
            cells = (f"{100 * row[name]['accuracy']:.1f} % of {row[name]['n']}" for name in ("facts", "planned"))
            lines.append(f"| {group} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def rate_cell(got: dict[str, Any], key: str) -> str:
    """A cell: the part that is right with its interval, and that of the other characters' favourites."""
    others = f"others' {100 * got['others'][key]:.1f} %"
    if key not in got["own"]:
        return others
    accuracy, low, high = (100 * got["own"][key][name] for name in ("accuracy", "low", "high"))
    return f"**{accuracy:.1f} %** ({low:.1f} - {high:.1f}), {others}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="metaquery-nano")
    parser.add_argument("--n", type=int, default=12, help="images for each name and wording")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    results = measure(MetaQuery.from_pretrained(options.model), options.n)
    options.out.mkdir(parents=True, exist_ok=True)
    made: dict[str, Any] = {"model": Path(options.model).name, "n": options.n, "torch": torch.__version__}
    made["date"] = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    (options.out / "query_transfer.json").write_text(json.dumps({"made": made, "groups": results}, indent=1) + "\n")
    (options.out / "query_transfer.md").write_text(
        "# Query transfer\n\n" + TEXT.format(**made) + "\n" + results_table(results)
    )
