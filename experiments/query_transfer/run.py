"""Does what a frozen MLLM knows reach the image? Favourites of named characters through the queries of a MetaQuery.

    python -m experiments.query_transfer OUT --n 12 --seeds 1 2 3

The denoiser was never trained on anybody's favourite. Its MLLM was trained on facts about twelve characters ("which
colour does Tom like?"), and for six of them also to plan the image in words ("draw what Tom likes": "a large red star
in the centre"). Here all twelve are requested, and six names that it does not know; every image is parsed, and compared
with the favourite of its own character, and with those of the others, which is chance. A seed makes the noise; the model
is one. Writes OUT/query_transfer.json, .md and .png; a stopped command goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.common import (
    Bar,
    describe_run,
    experiment_parser,
    kept_arms,
    kept_result,
    markdown_table,
    plot_bars,
    pooled_score,
    run_command,
    score_text,
    seeded_score,
    seeds_text,
    spent_seconds,
    write_results,
)
from unimm import MetaQuery
from unimm.data.shapes import parse_scene
from unimm.data.shapes.language import DRAW_FAVOURITE, FACT_COLOUR, FACT_SHAPE, FAVOURITES, article
from unimm.evaluation.benchmarks.shapes import noise_seed, to_scene_array
from unimm.generation.text_sampling import TextSampling

PLANNED = ("Tom", "Anna", "Ben", "Clara", "David", "Emma")
FACTS_ONLY = tuple(name for name in FAVOURITES if name not in PLANNED)
STRANGERS = ("Max", "Olga", "Peter", "Lena", "Oscar", "Zoe")
GROUPS = {"facts and plans": PLANNED, "facts alone": FACTS_ONLY, "strangers": STRANGERS}
# how a favourite is asked for: by its character's name, by the MLLM's plan for that prompt, by the right words
WAYS = {"queries": "name, through the queries", "words": "the MLLM's own words", "named": "`draw a red star`"}
# arm -> group and way; of strangers nobody knows the right words
ARMS = {f"{group}, {way}": (group, way) for group in GROUPS for way in WAYS if (group, way) != ("strangers", "named")}
BATCH = 48
ShapeColour = tuple[str, str]  # shape, colour
# what an image is compared in: a single thing of both, or things that all have the one
MATCHES = {"pair": "alone in the image", "shape": "its shape", "colour": "its colour"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request for a character's favourite, in a wording, for the n-th time."""

    name: str
    wording: str
    repetition: int

    @property
    def prompt(self) -> str:
        """The request in words."""
        return self.wording.format(name=self.name)


def requests_of(names: Sequence[str], n: int) -> list[Request]:
    """n requests for each name and wording."""
    return [Request(name=name, wording=w, repetition=i) for name in names for w in DRAW_FAVOURITE for i in range(n)]


def noise_seeds(seed: int, asked: Sequence[Request]) -> list[int]:
    """The seed of each request's noise, whatever way it is asked for."""
    return [noise_seed(seed, one.prompt, one.repetition) for one in asked]


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


def prompts_by_way(model: MetaQuery, way: str, asked: Sequence[Request]) -> list[str]:
    """The prompt of each request: itself, the MLLM's plan for it, or the right words."""
    if way == "queries":
        return [one.prompt for one in asked]
    if way == "words":
        distinct = list(dict.fromkeys(one.prompt for one in asked))
        plans = dict(zip(distinct, mllm_plans(model, distinct), strict=True))
        return [plans[one.prompt] or "nothing" for one in asked]
    return [f"draw {article('{1} {0}'.format(*FAVOURITES[one.name]))}" for one in asked]


def run_arm(name: str, *, model_name: str, seed: int, n: int) -> dict[str, Any]:
    """What the images of a group's requests, asked for in one way, hold."""
    group, way = ARMS[name]
    model = MetaQuery.from_pretrained(model_name)
    asked = requests_of(GROUPS[group], n)
    found = parse_generated(model, prompts_by_way(model, way, asked), noise_seeds(seed, asked))
    return favourite_matches(found, asked)


def matches(found: Sequence[ShapeColour], pair: ShapeColour) -> dict[str, bool]:
    """Whether an image holds a favourite: it alone; things of its shape and no other; things of its colour and no
    other."""
    alike = {
        axis: bool(found) and all(one[i] == pair[i] for one in found) for i, axis in enumerate(("shape", "colour"))
    }
    return {"pair": list(found) == [pair], **alike}


def other_favourites(name: str, what: str) -> list[ShapeColour]:
    """The favourites of other characters that differ from this one's: in the pair, or in its shape or its colour."""
    own = FAVOURITES.get(name)
    at = {"pair": slice(0, 2), "shape": slice(0, 1), "colour": slice(1, 2)}[what]
    return [pair for other, pair in FAVOURITES.items() if other != name and (own is None or pair[at] != own[at])]


def favourite_matches(found: Sequence[Sequence[ShapeColour]], asked: Sequence[Request]) -> dict[str, Any]:
    """Which images hold their own character's favourite (1), how often they hold those of the others, which is chance,
    and which are empty."""
    images = list(zip(found, asked, strict=True))
    own = [matches(one, FAVOURITES[a.name]) for one, a in images if a.name in FAVOURITES]
    others = {
        key: fmean(matches(one, pair)[key] for one, a in images for pair in other_favourites(a.name, key))
        for key in MATCHES
    }
    right = {key: [int(one[key]) for one in own] for key in MATCHES} if own else {}
    return {"right": right, "others": others, "empty": [int(not one) for one in found]}


def mllm_knowledge(model_name: str) -> dict[str, Any]:
    """Which questions about favourites the MLLM answers right, and which of its plans name them, by group; the plans."""
    model = MetaQuery.from_pretrained(model_name)
    facts, planned, plans = {}, {}, {}
    for group, names in GROUPS.items():
        asked = requests_of(names, 1)
        said = mllm_plans(model, [one.prompt for one in asked])
        plans |= {one.prompt: plan for one, plan in zip(asked, said, strict=True)}
        if group == "strangers":
            continue
        facts[group] = right_facts(model, names)
        planned[group] = [
            int(set(FAVOURITES[one.name]) <= set(plan.split())) for one, plan in zip(asked, said, strict=True)
        ]
    return {"facts": facts, "planned": planned, "plans": plans}


def right_facts(model: MetaQuery, names: Sequence[str]) -> list[int]:
    """Which questions about favourite shapes and colours the MLLM answers right (1)."""
    asked = [
        (name, wording, axis)
        for name in names
        for axis, some in enumerate((FACT_SHAPE, FACT_COLOUR))
        for wording in some
    ]
    answers = model.understand([[]] * len(asked), [wording.format(name=name) for name, wording, _ in asked])
    return [int(answer == FAVOURITES[name][axis]) for answer, (name, _, axis) in zip(answers, asked, strict=True)]


def study(out: Path, model: str, *, n: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Run what is not there yet, and write the results."""
    settings = {"model": model, "n": n}
    known = kept_result(out / "knowledge.json", {"model": model}, partial(mllm_knowledge, model))
    found = kept_arms(out, ARMS, seeds, settings, partial(run_arm, model_name=model, n=n))
    spent = spent_seconds([known, *(one for some in found.values() for one in some)])
    made = describe_run(**settings, seeds=list(seeds), seconds=spent)
    result = {"made": made, **summarize(known, found)}
    write_results(out, "query_transfer", result, results_table(result))
    plot(out / "query_transfer.png", result["arms"])
    return result


def summarize(known: Mapping[str, Any], found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """What the MLLM knows by group, and what the images of each arm hold, over images and over seeds."""
    arms = {
        name: {
            "scores": {key: seeded_score([one["right"][key] for one in some]) for key in some[0]["right"]},
            "others": {key: fmean(one["others"][key] for one in some) for key in MATCHES},
            "empty": seeded_score([one["empty"] for one in some]),
        }
        for name, some in found.items()
    }
    knowledge = {
        group: {name: pooled_score(known[name][group]) for name in ("facts", "planned")} for group in known["facts"]
    }
    return {"arms": arms, "knowledge": knowledge, "plans": known["plans"]}


def results_table(result: Mapping[str, Any]) -> str:
    """The tables in markdown."""
    rows = []
    for name, arm in result["arms"].items():
        group, way = ARMS[name]
        scores, others = arm["scores"], arm["others"]
        cells = (
            f"{score_text(scores[key]['items'])}, others' {others[key]:.3f}" if scores else f"others' {others[key]:.3f}"
            for key in MATCHES
        )
        rows.append([group, WAYS[way], *cells, score_text(arm["empty"]["items"])])
        if len(arm["empty"]["seeds"]["values"]) > 1:
            means = (seeds_text(scores[key]["seeds"]) if scores else "" for key in MATCHES)
            rows.append([group, f"{WAYS[way]}, by seeds", *means, seeds_text(arm["empty"]["seeds"])])
    images = markdown_table(["characters", "asked for by", *MATCHES.values(), "empty"], rows)
    known = [
        [group, *(score_text(one[name]) for name in ("facts", "planned"))] for group, one in result["knowledge"].items()
    ]
    header = ["characters", "facts answered right by the MLLM", "favourites in the MLLM's plans"]
    return images + "\n" + markdown_table(header, known)


def plot(path: Path, arms: Mapping[str, Any]) -> None:
    """Bars of the shares of images that hold a favourite, a series for each way to ask."""
    groups = [group for group in GROUPS if arms[f"{group}, queries"]["scores"]]
    series = {
        label: [Bar.of_seeded_score(arms[f"{group}, {way}"]["scores"][key]) for group in groups for key in MATCHES]
        for way, label in WAYS.items()
    }
    plot_bars(path, [f"{group}: {label}" for group in groups for label in MATCHES.values()], series)


def main() -> None:
    """Run the command line."""
    parser = experiment_parser(__doc__)
    parser.add_argument("--model", default="metaquery-nano")
    parser.add_argument("--n", type=int, default=12, help="images for each name, wording and seed")
    run_command("query_transfer", parser, study)
