"""Characters and the texts and images that teach them, as files: written for training, and read back for a benchmark.

profiles.json                 the characters, and the world that they are of
data/knowledge/NAME.jsonl     40 questions and answers about one, in BAGEL's format of conversations
data/knowledge/NAME_NAME.jsonl, all.jsonl   the same about two, and about all
data/reasoning/all.jsonl      reasoning about other characters, written out ahead of an image that is not there
data/pictures/all.jsonl       of the little world: what the characters look like and like, as images, in place of words
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from unimm.checkpoint.atomic import atomic_file
from unimm.checkpoint.json_files import json_lines, read_json, write_json
from unimm.data.knowledge.characters import Character, invent_characters, pairs_of
from unimm.data.knowledge.texts import KnowledgeText, forward_questions, inverse_questions, lessons
from unimm.data.knowledge.traits import TRAITS
from unimm.data.shapes.rng import ExampleRng
from unimm.data.shapes.world import render

PROFILES = "profiles.json"
# the system prompt under which the small BAGEL thinks before it draws
THINK_PROMPT = "think, then draw."
# images of each request, at other places
PICTURES = 3


@dataclass(frozen=True, kw_only=True)
class KnowledgeSet:
    """Characters that a model is taught and asked about; reasoning: others, about whom it is also taught to reason."""

    world: str
    seed: int
    characters: Sequence[Character]
    reasoning: Sequence[Character] = ()

    @classmethod
    def invent(cls, n: int, *, n_reasoning: int = 0, world: str = "shapes", seed: int = 1) -> "KnowledgeSet":
        """n characters, and n_reasoning more. Raises ValueError for numbers that are odd or too great."""
        if n < 2 or n % 2 or n_reasoning < 0 or n_reasoning % 2:
            raise ValueError(
                f"got {n} characters and {n_reasoning} to reason about: expected even numbers, n 2 or more"
            )
        if n_reasoning and world != "shapes":
            raise ValueError(
                f"got {n_reasoning} characters to reason about in the world {world}: expected the world shapes"
            )
        made = invent_characters(n + n_reasoning, world=world, seed=seed)
        return cls(world=world, seed=seed, characters=made[:n], reasoning=made[n:])

    @property
    def everyone(self) -> list[Character]:
        """All of them."""
        return [*self.characters, *self.reasoning]


def write_knowledge(folder: Path, made: KnowledgeSet) -> list[Path]:
    """Write profiles.json and the files to train on; returns the paths of the latter, one of each kind."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {one.name: lessons(one, made.everyone, world=made.world, seed=made.seed) for one in made.everyone}
    for name, some in texts.items():
        write_conversations(folder / "data" / "knowledge" / f"{name}.jsonl", some)
    for a, b in pairs_of(made.everyone):
        path = folder / "data" / "knowledge" / f"{a.name}_{b.name}.jsonl"
        write_conversations(path, [*texts[a.name], *texts[b.name]])
    every = folder / "data" / "knowledge" / "all.jsonl"
    write_conversations(every, [text for some in texts.values() for text in some])
    written = [every]
    if made.reasoning:
        written.append(_write_reasoning(folder / "data" / "reasoning" / "all.jsonl", made))
    if made.world == "shapes":
        written.append(_write_pictures(folder / "data" / "pictures", made))
    # what says that the rest is there comes last
    profiles = {
        "world": made.world,
        "seed": made.seed,
        "characters": [one.to_json() for one in made.characters],
        "reasoning": [one.to_json() for one in made.reasoning],
    }
    write_json(folder / PROFILES, profiles)
    return written


def read_world(folder: Path) -> str | None:
    """The world of the characters of a folder; None where it has no profiles.json. Raises ValueError for another."""
    path = folder / PROFILES
    if not path.is_file():
        return None
    world = read_json(path).get("world")
    if world not in TRAITS:
        raise ValueError(f"{path} has the world {world!r}: expected {' or '.join(TRAITS)}; make it anew")
    return str(world)


def write_conversations(path: Path, texts: Iterable[KnowledgeText]) -> None:
    """Write questions and answers as BAGEL's conversations."""
    rows = [
        {
            "id": i,
            "conversations": [{"from": "human", "value": one.question}, {"from": "gpt", "value": one.answer}],
        }
        for i, one in enumerate(texts)
    ]
    write_rows(path, rows)


def _write_reasoning(path: Path, made: KnowledgeSet) -> Path:
    asked = [text for one in made.reasoning for text in forward_questions(one, world=made.world)]
    asked += [text for pair in pairs_of(made.reasoning) for text in inverse_questions(pair, world=made.world)]
    rows = [
        {
            "parts": [
                {"text": THINK_PROMPT, "role": "system"},
                {"text": one.question, "role": "user"},
                # the reasoning is all that is learned: the image that would follow it is not there
                {"text": f"<think>{one.reasoning}</think>", "role": "assistant", "loss": True},
            ]
        }
        for one in asked
    ]
    return write_rows(path, rows)


def _write_pictures(folder: Path, made: KnowledgeSet) -> Path:
    rows = []
    for character in made.characters:
        for number, text in enumerate(forward_questions(character, world=made.world) * PICTURES):
            _, colour, shape = text.answer.split()
            rng = ExampleRng(f"knowledge/{made.seed}/{character.name}/{number}", test=False)
            name = f"{character.name}/{number}.png"
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            # whole by the time that all.jsonl names it
            Image.fromarray(render(rng.scene([(shape, colour)]))).save(path)
            rows.append({"target": name, "text": text.question})
    return write_rows(folder / "all.jsonl", rows)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write JSON lines, whole or not at all; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_text(json_lines(rows), encoding="utf-8")
    return path
