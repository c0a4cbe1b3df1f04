"""The experiment on knowledge that was taught in words: what is taught, and what stays as it was."""

import json

import pytest
import torch

from experiments.knowledge_transfer.run import ARMS, COLUMNS, run_arm, summarize, teach, write_set
from unimm import Bagel
from unimm.data.knowledge.files import KnowledgeSet
from unimm.data.shapes import parse_scene
from unimm.data.shapes.world import HELD_OUT
from unimm.evaluation.benchmarks.shapes import to_scene_array


@pytest.fixture(scope="module")
def characters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("characters")
    write_set(folder, seed=3)
    return folder


def test_images_to_draw_show_nothing_that_was_held_out(characters):
    from PIL import Image

    rows = [json.loads(line) for line in (characters / "drawings" / "all.jsonl").read_text().splitlines()]
    assert len(rows) == 600 and all((characters / "drawings" / row["target"]).is_file() for row in rows)
    names = {one.name for one in KnowledgeSet.invent(10, n_reasoning=10, world="shapes", seed=3).everyone}
    for row in rows[:100]:
        assert not names & set(row["text"].split())
        seen = parse_scene(to_scene_array(Image.open(characters / "drawings" / row["target"])))
        assert not {(one.shape, one.colour) for one in seen} & set(HELD_OUT)


def test_texts_and_images_train_the_understanding_expert_alone(characters, tmp_path):
    drawing_weight = ARMS["texts and images"]
    assert drawing_weight is not None
    taught = Bagel.from_pretrained(teach(tmp_path, characters, drawing_weight, model="bagel-nano", seed=3, steps=2))
    before = dict(Bagel.from_pretrained("bagel-nano").named_parameters())
    moved = {name for name, x in taught.named_parameters() if not torch.equal(x, before[name])}
    assert any("experts.und" in name for name in moved)
    frozen = ("vae.", "vision.", "connector.", "time_embedder.", "vae2llm.", "llm2vae.", "decoder.norms.gen.")
    assert not [name for name in moved if name.startswith(frozen) or "experts.gen" in name]


def test_an_arm_is_asked_everything_and_leaves_nothing_behind(tmp_path):
    found = run_arm("before", out=tmp_path, model_name="bagel-nano", seed=3, n=2, steps=1)
    assert {column: len(right) for column, right in found["right"].items()} == dict.fromkeys(COLUMNS, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["characters-3"]
    scores = summarize({"before": [found, found]})["before"]
    assert scores["draw.one"]["items"]["n"] == 4 and len(scores["forward"]["seeds"]["values"]) == 2
