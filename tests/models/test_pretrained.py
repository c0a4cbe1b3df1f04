"""The bundled models: small enough, loadable from what the package ships, and as able as their pages say, within
chance."""

import pytest
from helpers.cases import GOLDEN

import unimm
from unimm.checkpoint.hub import bundled_names
from unimm.evaluation.benchmarks.shapes import evaluate

NANO = GOLDEN.parents[1] / "unimm" / "pretrained"
# well below what examples/*.md report, at 24 examples a task: a broken model generates and answers next to nothing
# right
FLOORS = {
    "bagel-nano": {
        "draw.one": 0.8,
        "draw.relation": 0.6,
        "answer.colour": 0.85,
        "answer.relation": 0.85,
        "edit.remove": 0.75,
    },
    "janus-nano": {"draw.one": 0.25, "answer.count": 0.6},
    "janusflow-nano": {"draw.one": 0.2, "answer.shape": 0.8},
    "showo-nano": {"draw.one": 0.15, "answer.count": 0.25},
}


def size(folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_all_are_small_and_known():
    sizes = {name: size(NANO / name) for name in bundled_names()}
    assert max(sizes.values()) <= 20e6 and sum(sizes.values()) <= 90e6, sizes
    known = {row.name for row in unimm.releases() if row.source == "bundled"}
    assert known == set(sizes) >= set(FLOORS)


@pytest.mark.parametrize("name", FLOORS)
def test_it_does_what_its_page_says(name):
    model = unimm.load(name)
    # some tables of positions are stored and not learned
    assert model.RELEASES[name].parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.01)
    scores = evaluate(model, n=24, seed=5, tasks=tuple(FLOORS[name]), progress=False)
    assert all(scores[task].accuracy >= floor for task, floor in FLOORS[name].items()), scores
