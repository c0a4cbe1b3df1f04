"""Favourites through the queries of a MetaQuery: with a model whose images, plans and answers are known."""

import json
from types import SimpleNamespace

import pytest
from PIL import Image

from experiments.query_transfer import run as script
from unimm.data.shapes import Scene, Thing, render
from unimm.data.shapes.language import FAVOURITES
from unimm.models.base import Generation

TOM = FAVOURITES["Tom"]


def image_of(*things):
    """An image of things, given by shape and colour, each in its own cell."""
    placed = (Thing(shape=shape, colour=colour, size="small", cell=i) for i, (shape, colour) in enumerate(things))
    return Image.fromarray(render(Scene(things=tuple(placed))))


class Painter:
    """Draws a favourite where it is named in words or its character was planned for; knows all facts."""

    config = SimpleNamespace(system_prompt="say what to draw.")

    def generate(self, prompt, *, seed):
        assert len(prompt) == len(seed) == len(set(zip(prompt, seed, strict=True)))
        return Generation([self.image(one) for one in prompt])

    def image(self, prompt):
        for name, (shape, colour) in FAVOURITES.items():
            if f"{colour} {shape}" in prompt or (name in script.PLANNED and name in prompt.split()):
                return image_of((shape, colour))
        return image_of()

    def chat(self, messages, *, system, text_sampling):
        prompts = [one[0]["content"] for one in messages]
        return [next((self.plan(name) for name in script.PLANNED if name in one.split()), "") for one in prompts]

    @staticmethod
    def plan(name):
        shape, colour = FAVOURITES[name]
        return f"a small {colour} {shape} at the top"

    def understand(self, images, question):
        return [
            next(FAVOURITES[name]["colour" in one or "color" in one] for name in FAVOURITES if name in one.split())
            for one in question
        ]


def test_what_an_image_matches():
    assert script.matches([TOM], TOM) == {"pair": True, "shape": True, "colour": True}
    assert script.matches([TOM, TOM], TOM) == {"pair": False, "shape": True, "colour": True}
    assert script.matches([TOM, (TOM[0], "blue")], TOM) == {"pair": False, "shape": True, "colour": False}
    assert script.matches([], TOM) == {"pair": False, "shape": False, "colour": False}


def test_chance_is_what_differs():
    """Others' favourites that have the asked one's colour are no chance for its colour: a perfect denoiser shows
    none."""
    requests = [script.Request(name=name, wording="draw what {name} likes", repetition=0) for name in FAVOURITES]
    found = script.favourite_matches([[FAVOURITES[one.name]] for one in requests], requests)
    assert found["right"] == {key: [1] * 12 for key in script.MATCHES}
    assert found["others"] == dict.fromkeys(script.MATCHES, 0) and found["empty"] == [0] * 12


def test_what_is_known_and_shown(tmp_path, monkeypatch):
    loads = []
    monkeypatch.setattr(script.MetaQuery, "from_pretrained", lambda name: loads.append(name) or Painter())
    script.study(tmp_path, "painter", n=2, seeds=(1, 2))
    result = json.loads((tmp_path / "query_transfer.json").read_text())
    shares = {
        name: {key: one["items"]["score"] for key, one in arm["scores"].items()} for name, arm in result["arms"].items()
    }
    all_right, none_right = dict.fromkeys(script.MATCHES, 1), dict.fromkeys(script.MATCHES, 0)
    assert shares == {
        "facts and plans, queries": all_right,
        "facts and plans, words": all_right,
        "facts and plans, named": all_right,
        "facts alone, queries": none_right,
        "facts alone, words": none_right,
        "facts alone, named": all_right,
        "strangers, queries": {},
        "strangers, words": {},
    }
    # six names, four wordings, twice, with two seeds
    assert all(arm["empty"]["items"]["n"] == 96 for arm in result["arms"].values())
    assert result["arms"]["facts alone, queries"]["empty"]["seeds"]["values"] == [1, 1]
    assert {group: one["facts"]["score"] for group, one in result["knowledge"].items()} == {
        "facts and plans": 1, "facts alone": 1
    }  # fmt: skip
    assert [one["planned"]["score"] for one in result["knowledge"].values()] == [1, 0]
    assert result["plans"]["draw what Tom likes"] == "a small red star at the top"
    table = (tmp_path / "query_transfer.md").read_text()
    assert (
        table == script.results_table(result) and "| strangers | name, through the queries | others' 0.000 |" in table
    )
    assert (tmp_path / "query_transfer.png").stat().st_size > 1000
    # an arm more is made, what is there is kept
    n = len(loads)
    script.study(tmp_path, "painter", n=2, seeds=(1, 2, 3))
    assert len(loads) - n == len(script.ARMS)
    with pytest.raises(ValueError, match="was made under"):
        script.study(tmp_path, "painter", n=3, seeds=(1,))


def test_noise_follows_from_the_seed():
    asked = script.requests_of(("Tom",), 2)
    seeds = {seed: script.noise_seeds(seed, asked) for seed in (1, 2)}
    assert len({*seeds[1], *seeds[2]}) == 16 and seeds[1] == script.noise_seeds(1, asked)
