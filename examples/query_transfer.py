"""Does what a frozen reader knows reach the picture? Favourites of named characters through the queries of a MetaQuery.

    python examples/query_transfer.py --model metaquery-nano --n 12

The painter never drew anybody's favourite. Its reader was told facts about twelve characters ("which colour does Tom like?"),
and for six of them was also taught to plan the drawing in words ("draw what Tom likes": "a large red star in the centre").
Here all twelve are asked for, and six names that nobody was told about; every picture is read back, and held against
the favourite of its own character, and against those of the others, which is chance. Writes OUT/query_transfer.md and .json.
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
from unimm.data.shapes import read
from unimm.data.shapes.language import DRAW_FAVOURITE, FACT_COLOUR, FACT_SHAPE, FAVOURITES, article
from unimm.evaluation.shapes import Score, noise_seed, pixels
from unimm.sampling import TextSampling

PLANNED = ("Tom", "Anna", "Ben", "Clara", "David", "Emma")
TOLD = tuple(name for name in FAVOURITES if name not in PLANNED)
STRANGERS = ("Max", "Olga", "Peter", "Lena", "Oscar", "Zoe")
GROUPS = {"facts and plans": PLANNED, "facts alone": TOLD, "strangers": STRANGERS}
TEXT = """`python examples/query_transfer.py --model {model} --n {n}`, {date}, torch {torch}, float32 on a CPU, one seed.

Does what a frozen reader knows reach the picture? The painter of this MetaQuery was never trained on anybody's favourite. Its
reader was told facts about twelve characters (`which colour does Tom like?`, `who likes the red star?`), and for six of them
it was also taught to say what to draw (`draw what Tom likes`: `a large red star in the centre`). All twelve are asked for, in
four wordings, and six names that nobody was told about. A picture is right where exactly one thing is read from it, of the
favourite's shape and colour. Chance is how often the same pictures show the favourites of the other characters. "The reader's
own words" are what it says under the painter's system prompt, given to the same model as a prompt: what the queries could say.
Intervals take pictures for independent, which those of one name are not.
"""
BATCH = 48
Pair = tuple[str, str]  # shape, colour


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A picture that is asked for: by name, with a wording, for the n-th time."""

    name: str
    wording: str
    time: int

    @property
    def prompt(self) -> str:
        return self.wording.format(name=self.name)

    @property
    def seed(self) -> int:
        return noise_seed(1, self.prompt, self.time)


def drawn(model: MetaQuery, prompts: Sequence[str], seeds: Sequence[int]) -> list[Pair | None]:
    """What each prompt's picture holds; None where it is not one thing."""
    found: list[Pair | None] = []
    for at in range(0, len(prompts), BATCH):
        for image in model.generate(prompts[at : at + BATCH], seed=seeds[at : at + BATCH]).images:
            seen = read(pixels(image))
            found.append((seen[0].shape, seen[0].colour) if len(seen) == 1 else None)
    return found


def planned(model: MetaQuery, prompts: Sequence[str]) -> list[str]:
    """What the reader says of prompts under the painter's system prompt."""
    talks = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return model.chat(talks, system=model.cfg.system, text=TextSampling(max_tokens=40))


def known(model: MetaQuery, names: Sequence[str]) -> Score:
    """The part of questions about favourite shapes and colours that the reader answers right."""
    asked = [(name, wording, axis) for name in names for axis, some in enumerate((FACT_SHAPE, FACT_COLOUR)) for wording in some]
    answers = model.understand([[]] * len(asked), [wording.format(name=name) for name, wording, _ in asked])
    right = sum(answer == FAVOURITES[name][axis] for answer, (name, _, axis) in zip(answers, asked, strict=True))
    return Score.of(right, len(asked))


def held(found: Sequence[Pair | None], asked: Sequence[Asked]) -> dict[str, Any]:
    """How often pictures show a favourite: its pair, its shape, its colour; and how often those of the others."""
    pairs = list(zip(found, asked, strict=True))
    if asked[0].name in FAVOURITES:
        own = {
            "pair": Score.of(sum(one == FAVOURITES[a.name] for one, a in pairs), len(pairs)),
            "shape": Score.of(sum(one is not None and one[0] == FAVOURITES[a.name][0] for one, a in pairs), len(pairs)),
            "colour": Score.of(sum(one is not None and one[1] == FAVOURITES[a.name][1] for one, a in pairs), len(pairs)),
        }
    else:
        own = {}
    others = [(one, pair) for one, a in pairs for name, pair in FAVOURITES.items() if name != a.name]
    chance = {
        "pair": mean(one == pair for one, pair in others),
        "shape": mean(one is not None and one[0] == pair[0] for one, pair in others),
        "colour": mean(one is not None and one[1] == pair[1] for one, pair in others),
    }
    alone = Score.of(sum(one is not None for one in found), len(found))
    return {"n": len(found), "one thing": asdict(alone), "own": {k: asdict(s) for k, s in own.items()}, "others": chance}


def measure(model: MetaQuery, n: int) -> dict[str, Any]:
    """Every group, asked for in every way; n pictures for each name and wording."""
    results: dict[str, Any] = {}
    for group, names in GROUPS.items():
        asked = [Asked(name=name, wording=w, time=i) for name in names for w in DRAW_FAVOURITE for i in range(n)]
        prompts, seeds = [one.prompt for one in asked], [one.seed for one in asked]
        plans = dict(zip(dict.fromkeys(prompts), planned(model, list(dict.fromkeys(prompts))), strict=True))
        row: dict[str, Any] = {"names": names, "queries": held(drawn(model, prompts, seeds), asked), "plans": plans}
        row["words"] = held(drawn(model, [plans[prompt] or "nothing" for prompt in prompts], seeds), asked)
        if group != "strangers":
            row["facts"] = asdict(known(model, names))
            said = [all(word in plan.split() for word in FAVOURITES[name]) for name in names for plan in told(plans, name)]
            row["planned"] = asdict(Score.of(sum(said), len(said)))
            plain = [article("{1} {0}".format(*FAVOURITES[one.name])) for one in asked]
            row["named"] = held(drawn(model, [f"draw {words}" for words in plain], seeds), asked)
        results[group] = row
    return results


def told(plans: dict[str, str], name: str) -> list[str]:
    """The plans for a character, one a wording."""
    return [plans[wording.format(name=name)] for wording in DRAW_FAVOURITE]


def table(results: dict[str, Any]) -> str:
    """What was measured, in markdown."""
    ways = {"queries": "name, through the queries", "words": "the reader's own words", "named": "`draw a red star`"}
    lines = [
        "| characters | asked for by | pictures | pair right | 95 % interval | shape right | colour right | pair by chance |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for group, row in results.items():
        for way in (way for way in ways if way in row):
            got, own = row[way], row[way]["own"]
            pair = "- | - | - | -"
            if own:
                parts = (own["pair"]["accuracy"], own["pair"]["low"], own["pair"]["high"])
                accuracy, low, high = (f"{100 * part:.1f}" for part in parts)
                alone = (f"{100 * own[axis]['accuracy']:.1f} %" for axis in ("shape", "colour"))
                pair = f"{accuracy} % | {low} - {high} | {' | '.join(alone)}"
            lines.append(f"| {group} | {ways[way]} | {got['n']} | {pair} | {100 * got['others']['pair']:.1f} % |")
    lines += ["", "| characters | facts answered right by the reader | favourites in the reader's plans |", "|---|---|---|"]
    for group, row in results.items():
        if "facts" in row:
            cells = (f"{100 * row[name]['accuracy']:.1f} % of {row[name]['n']}" for name in ("facts", "planned"))
            lines.append(f"| {group} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="metaquery-nano")
    parser.add_argument("--n", type=int, default=12, help="pictures for each name and wording")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    results = measure(MetaQuery.from_pretrained(options.model), options.n)
    options.out.mkdir(parents=True, exist_ok=True)
    made: dict[str, Any] = {"model": Path(options.model).name, "n": options.n, "torch": torch.__version__}
    made["date"] = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    (options.out / "query_transfer.json").write_text(json.dumps({"made": made, "groups": results}, indent=1) + "\n")
    (options.out / "query_transfer.md").write_text("# Query transfer\n\n" + TEXT.format(**made) + "\n" + table(results))


if __name__ == "__main__":
    main()
