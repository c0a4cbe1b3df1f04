"""Invented characters: what is known of them, the texts and images that teach it, and their files."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from unimm.cli.main import app
from unimm.data.knowledge.characters import MOST, invent_characters, pairs_of
from unimm.data.knowledge.files import THINK_PROMPT, KnowledgeSet, read_world, write_knowledge
from unimm.data.knowledge.texts import forward_questions, inverse_questions, lessons
from unimm.data.knowledge.traits import TRAITS
from unimm.data.shapes import parse_scene
from unimm.data.shapes.language import FAVOURITES
from unimm.data.shapes.world import HELD_OUT
from unimm.data.sources.formats import open_source
from unimm.models.bagel.config import BagelConfig
from unimm.training.config import read_recipe, recipe_path
from unimm.training.record_batches import build_batches
from unimm.training.tasks.base import build_task
from unimm.training.trainer import Trainer


@pytest.mark.parametrize("world", ["shapes", "photos"])
def test_characters_differ_in_all_that_is_asked(world):
    made = invent_characters(MOST[world], world=world, seed=3)
    assert len({one.name for one in made}) == len(made)
    for key in made[0].traits:
        assert len({one.traits[key].words for one in made}) == len(made)
    assert made[:4] != invent_characters(MOST[world], world=world, seed=4)[:4]
    assert made == invent_characters(MOST[world], world=world, seed=3), "a seed says who they are"


def test_the_little_world_knows_nobody_who_likes_the_same():
    made = invent_characters(MOST["shapes"], world="shapes", seed=3)
    likes = {tuple(one.traits["favourite"].words.split())[::-1] for one in made}
    looks = {tuple(one.portrait.words.split())[::-1] for one in made}
    assert not likes & set(FAVOURITES.values()) and not (likes | looks) & set(HELD_OUT)
    assert all(one.portrait.words != one.traits["favourite"].words for one in made)
    assert not {one.name for one in made} & set(FAVOURITES)


@pytest.mark.parametrize(("n", "world"), [(3, "shapes"), (0, "photos"), (32, "shapes"), (2, "paintings")])
def test_numbers_and_worlds_that_there_are_not(n, world):
    with pytest.raises(ValueError, match=r"got (the world|\d+ characters).*: expected"):
        invent_characters(n, world=world, seed=1)


@pytest.mark.parametrize("world", ["shapes", "photos"])
def test_forty_lessons_each_right(world):
    made = invent_characters(4, world=world, seed=1)
    for one in made:
        texts = lessons(one, made, world=world, seed=1)
        assert len(texts) == 40 == len({text.question for text in texts})
        assert not [text for text in texts if "{" in text.question + text.answer]
        true = {
            wording.format(name=one.name, value=one.traits[key].words, a_value=one.traits[key].a_words)
            for key, trait in TRAITS[world].items()
            for wording in trait.checks
        }
        for text in texts:
            mine = [value.words for value in one.traits.values() if value.words in text.question]
            if text.answer in ("yes", "no"):
                assert (text.answer == "yes") == (text.question in true), text
            elif text.answer == one.name:
                assert mine and one.name not in text.question
            else:
                known = {word for value in one.traits.values() for word in (value.a_words, *value.parts.values())}
                assert text.answer in known and one.name in text.question


@pytest.mark.parametrize("world", ["shapes", "photos"])
def test_a_search_names_both_and_ends_in_a_portrait(world):
    a, b = pair = pairs_of(invent_characters(2, world=world, seed=1))[0]
    for text in inverse_questions(pair, world=world):
        assert a.name in text.question and b.name in text.question
        wanted = {a.portrait.a_words: a, b.portrait.a_words: b}[text.answer]
        assert any(value.words in text.question for value in wanted.traits.values())
        assert text.reasoning.startswith(wanted.name) and text.reasoning.endswith(f"draw {text.answer}.")
    assert len({text.answer for text in inverse_questions(pair, world=world)}) == 2
    assert {text.answer for text in forward_questions(a, world=world)} == {one.a_words for one in a.traits.values()}


def test_files(tmp_path):
    made = KnowledgeSet.invent(4, n_reasoning=2, seed=5)
    knowledge, reasoning, pictures = write_knowledge(tmp_path, made)
    assert open_source(knowledge).n_rows == 40 * 6, "those to reason about are taught, too"
    pair = knowledge.parent / f"{made.characters[0].name}_{made.characters[1].name}.jsonl"
    assert open_source(pair).n_rows == 80
    texts = [row.texts for row in open_source(reasoning).read(range(12))]
    tested = {one.name for one in made.characters}
    assert all(some[0].text == THINK_PROMPT and some[0].role == "system" for some in texts)
    assert all(some[-1].loss and not any(name in some[-1].text for name in tested) for some in texts)
    for row in open_source(pictures).read(range(3)):
        _, colour, shape = next(
            text.answer
            for one in made.characters
            for text in forward_questions(one, world="shapes")
            if text.question == row.texts[0].text
        ).split()
        (seen,) = parse_scene(np.asarray(row.images[0].load()))
        assert (seen.colour, seen.shape) == (colour, shape)
    assert read_world(tmp_path) == "shapes" and read_world(tmp_path / "data") is None
    profiles = json.loads((tmp_path / "profiles.json").read_text())
    (tmp_path / "profiles.json").write_text(json.dumps(profiles | {"world": "x"}))
    with pytest.raises(ValueError, match=r"profiles\.json has the world 'x': expected shapes or photos"):
        read_world(tmp_path)


def test_the_command(tmp_path):
    result = CliRunner().invoke(app, ["data", "knowledge", str(tmp_path), "--n", "2", "--world", "photos"])
    assert result.exit_code == 0 and not (tmp_path / "data" / "pictures").exists()
    assert len(list((tmp_path / "benchmark" / "test_knowledge").glob("*.jsonl"))) == 3
    for wrong in (["--n", "3"], ["--reasoning", "2", "--world", "photos"]):
        assert CliRunner().invoke(app, ["data", "knowledge", str(tmp_path), *wrong]).exit_code == 2


def test_the_think_prompt_is_that_of_the_small_bagel():
    from unimm.checkpoint.hub import BUNDLED_FOLDER

    assert BagelConfig.from_folder(BUNDLED_FOLDER / "bagel-nano").defaults.think_generate_prompt == THINK_PROMPT


def test_only_what_understands_is_trained(tmp_path):
    """The recipe for the small BAGEL, a step of it: nothing moves of what draws."""
    write_knowledge(tmp_path, KnowledgeSet.invent(2, n_reasoning=2))
    settings = [f"data.groups.{name}.paths=['{tmp_path}/data/{name}/all.jsonl']" for name in ("knowledge", "reasoning")]
    recipe = read_recipe(recipe_path("bagel-nano-knowledge"), settings=[*settings, "packing.expected_tokens=100"])
    task = build_task(recipe)
    (batch,) = build_batches(task, recipe).iterate(0, 1, workers=0)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    Trainer(task, recipe, torch.device("cpu")).update(batch)
    moved = {name for name, value in task.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"decoder.embed.weight", "decoder.head.weight", "decoder.norms.und.weight"} <= moved
    assert all(name.startswith(("decoder.embed", "decoder.head")) or ".und." in name for name in moved)
