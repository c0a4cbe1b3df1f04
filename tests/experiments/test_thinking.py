"""The studies of thinking at nano size, with painters whose results are known."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments import common
from experiments.self_verifier import run as self_verifier
from experiments.thinking_gap import run as thinking_gap
from unimm.data.shapes import parse_scene
from unimm.data.shapes.language import NUMBERS, plural
from unimm.evaluation.benchmarks.base import BenchmarkOptions
from unimm.evaluation.benchmarks.unisandbox.benchmark import REASONING, UniSandBoxBenchmark
from unimm.evaluation.run import ModelSource
from unimm.models.base import Generation
from unimm.self_training.questions import StarsQuestions, round_seed

BLANK = np.full((64, 64, 3), 128, np.uint8)


class Painter:
    """Paints what is right after thinking, and nothing at once; after thinking wrongly of some levels, nothing."""

    def __init__(self, items, wrong=()):
        self.known = {item.prompt: item.payload for item in items}
        self.wrong = {item.prompt for item in items if item.group in wrong}

    def generate(self, prompt, *, images, seed, think=False, **options):
        found = [self.known[one] for one in prompt]
        made = [one.target if think and one.prompt not in self.wrong else BLANK for one in found]
        return Generation([Image.fromarray(one) for one in made], [one.think for one in found] if think else [])

    def understand(self, images, question, *, text_sampling):
        """How many there are of what it is asked for, and of all."""
        things = parse_scene(np.asarray(images[0]))
        n = sum(plural(f"{one.colour} {one.shape}") in question or "many shapes" in question for one in things)
        return NUMBERS[n]


def use(monkeypatch, module, painter):
    source = ModelSource(name="painter", load=lambda: painter)
    monkeypatch.setattr(module, "model_source", lambda *args, **options: source)


def test_the_gap_of_a_painter_that_must_think(tmp_path, monkeypatch):
    items = [item for seed in (1, 2) for item in UniSandBoxBenchmark(BenchmarkOptions(n=2, seed=seed)).items()]
    use(monkeypatch, thinking_gap, Painter(items, wrong=("mapping3",)))
    found = thinking_gap.study(tmp_path, "painter", n=2, seeds=(1, 2), steps=None)
    assert {name: one["difference"] for name, one in found["gap"].items()} == {
        **dict.fromkeys(REASONING, 1.0), "mapping3": 0.0, "average": 5 / 6
    }  # fmt: skip
    think = found["modes"]["think"]
    assert think["questions"]["math1"]["n"] == 4 and think["seeds"]["average"]["values"] == [pytest.approx(5 / 6)] * 2
    kept = json.loads((tmp_path / "thinking_gap.json").read_text())
    assert thinking_gap.results_table(kept) == (tmp_path / "thinking_gap.md").read_text()
    assert (tmp_path / "thinking_gap.png").stat().st_size > 1000


def test_the_verifier_that_counts_right(tmp_path, monkeypatch):
    items = [
        item
        for level in REASONING
        for item in StarsQuestions(
            BenchmarkOptions(n=2, seed=round_seed(1, 1), think=True, tasks=(level,), world="shapes"), left_out=()
        ).items()
    ]
    painter = Painter(items, wrong=("math2",))
    use(monkeypatch, self_verifier, painter)
    monkeypatch.setattr(self_verifier, "load", lambda name: painter)
    found = self_verifier.study(tmp_path, "painter", n=2, seeds=(1,), steps=None)["levels"]
    assert [found[level]["questions"]["accepted"] for level in REASONING] == [2, 0, 2, 4, 4, 4]
    assert found["math1"]["questions"]["precision"]["value"] == 1 and found["math2"]["questions"]["precision"] is None
    kept = json.loads((tmp_path / "self_verifier.json").read_text())
    assert self_verifier.results_table(kept) == (tmp_path / "self_verifier.md").read_text()


def test_seeds_have_students_interval():
    one = common.over_seeds([0.1, 0.2, 0.3])
    # 4.303 is the 97.5 % point of two degrees of freedom
    assert one["mean"] == pytest.approx(0.2) and one["high"] - 0.2 == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
    assert common.over_seeds([0.5])["low"] is None
