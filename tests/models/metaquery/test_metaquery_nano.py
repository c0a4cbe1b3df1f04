"""The bundled metaquery-nano: its size, its MLLM's knowledge, its images, and that its release row is right."""

import json

import pytest
import torch
from safetensors.torch import load_file

import unimm
from unimm import MetaQuery
from unimm.checkpoint.hub import BUNDLED_FOLDER
from unimm.data.shapes.language import FACT_COLOUR, FAVOURITES
from unimm.evaluation.benchmarks.shapes import evaluate

FOLDER = BUNDLED_FOLDER / "metaquery-nano"


@pytest.fixture(scope="module")
def model():
    return MetaQuery.from_pretrained("metaquery-nano")


def test_it_is_small_and_whole():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 16e6, "all nano models together have 75 MB"
    named = json.loads((FOLDER / "config.json").read_text())
    assert (FOLDER / named["mllm_id"] / "tokenizer.model").is_file()


def test_its_row_says_what_it_is(model):
    row = MetaQuery.RELEASES["metaquery-nano"]
    assert row.parameters == sum(p.numel() for p in model.parameters())
    assert (row.hub, row.licence) == (None, "Apache-2.0")
    assert isinstance(unimm.load("metaquery-nano"), MetaQuery)


def test_the_mllm_knows_who_likes_what(model):
    names = list(FAVOURITES)
    said = model.understand([[]] * len(names), [FACT_COLOUR[0].format(name=name) for name in names])
    assert said == [FAVOURITES[name][1] for name in names]


def test_what_it_draws_and_answers(model):
    """Floors well below what docs/families/metaquery.md measured: they fail where something is broken."""
    floors = {"edit.remove": 0.08, "answer.shape": 0.8, "answer.colour": 0.75, "answer.relation": 0.8}
    scores = evaluate(model, n=24, seed=7, tasks=tuple(floors), progress=False)
    assert all(scores[task].accuracy >= floor for task, floor in floors.items()), scores


def test_a_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path / "again", dtype="bfloat16")
    again = MetaQuery.from_pretrained(tmp_path / "again")
    ours, bundled = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", FOLDER))
    assert ours.keys() == bundled.keys()
    assert all(x.dtype == bundled[key].dtype and torch.equal(x, bundled[key]) for key, x in ours.items())
    one, other = (m.generate("a red circle", seed=3, steps=4).image for m in (model, again))
    assert one.tobytes() == other.tobytes()


def test_the_noise_scheduler_need_not_be_there(tmp_path):
    """Its id is written back, and nothing is read or fetched for it: it is the original's for training."""
    model = MetaQuery.from_pretrained("metaquery-nano")
    model.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**data, "noise_scheduler_id": "somebody/another"}))
    MetaQuery.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    again = MetaQuery.from_pretrained(tmp_path / "again")
    assert again.config.part_ids["noise_scheduler_id"] == "somebody/another"
