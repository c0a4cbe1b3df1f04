"""The bundled uniworld-nano: its size, the VAE that it shares, what it routes, and that its release row is right."""

import json

import pytest
import torch
from PIL import Image

import unimm
from unimm import UniWorld
from unimm.checkpoint.hub import BUNDLED_FOLDER
from unimm.data.shapes import example
from unimm.models.base import Generation

FOLDER = BUNDLED_FOLDER / "uniworld-nano"


@pytest.fixture(scope="module")
def model():
    return UniWorld.from_pretrained("uniworld-nano")


def test_it_is_small_and_shares_its_vae(model):
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6, "the nano models of five families have 75 MB together"
    assert json.loads((FOLDER / "config.json").read_text())["generation"]["parts"] == {"vae": "bagel-nano"}
    theirs = unimm.Bagel.from_pretrained("bagel-nano").vae.state_dict()
    ours = model.auxiliary.required_vae.state_dict()
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


def test_its_row_says_what_it_is(model):
    row = UniWorld.RELEASES["uniworld-nano"]
    assert row.parameters == sum(p.numel() for p in model.parameters())
    assert (row.hub, row.licence) == (None, "Apache-2.0")
    assert isinstance(unimm.load("uniworld-nano"), UniWorld)


def test_every_verb(model):
    generated = model.generate(["a red circle", "two blue squares"], seed=0)
    assert [image.size for image in generated.images] == [(64, 64)] * 2
    assert model.generate("make it blue", images=generated.image, seed=0).image.size == (64, 64)
    assert isinstance(model.respond("draw a red circle"), Generation)
    one = example("answer.count", 0, split="test")
    assert isinstance(model.respond(one.prompt, images=Image.fromarray(one.images[0])), str)


def test_the_head_tells_questions_from_prompts(model):
    tasks = {"draw.one": 1, "draw.two": 1, "edit.remove": 1, "answer.count": 0, "answer.colour": 0, "answer.where": 0}
    examples = [(example(task, i, split="test"), wanted) for task, wanted in tasks.items() for i in range(10)]
    images = [[Image.fromarray(image) for image in one.images] for one, _ in examples]
    samples = [model.processor.prompt_parts(one.prompt, some) for (one, _), some in zip(examples, images, strict=True)]
    votes = [int(model.route_logits(output).argmax()) for output in model.encode_prompts(samples)]
    assert sum(vote == wanted for vote, (_, wanted) in zip(votes, examples, strict=True)) >= 57
