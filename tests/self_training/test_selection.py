"""What STARS asks, whom it believes, and what it then trains on."""

import errno
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.evaluation import run_toy
from PIL import Image

from unimm.data.shapes import render
from unimm.data.shapes.world import HELD_OUT
from unimm.evaluation.benchmarks.base import BenchmarkOptions
from unimm.evaluation.benchmarks.unisandbox.generated import photo_questions
from unimm.evaluation.items import EvalItem
from unimm.evaluation.judges.base import JudgeTask
from unimm.models.base import Generation
from unimm.self_training import selection
from unimm.self_training.questions import StarsQuestions, round_seed
from unimm.self_training.selection import choose_candidates, summarize, write_dataset
from unimm.self_training.verifiers import (
    PHOTO_QUESTION,
    accept_all,
    read_conclusion,
    read_final_answer,
    self_judge,
)


def questions(level="math1", *, n=4, seed=1, world="shapes", left_out=()):
    options = BenchmarkOptions(n=n, seed=seed, think=True, tasks=(level,), world=world, supports_thinking=True)
    return StarsQuestions(options, left_out=left_out)


# ---- questions


@pytest.mark.parametrize("level", ["math2", "mapping3"])
def test_questions_are_of_the_train_split(level):
    items = questions(level, n=30).items()
    assert len(items) == (30 if level == "math2" else 60) and all(item.think for item in items)
    pairs = {(want.shape, want.colour) for item in items for want in item.payload.goal.wants}
    assert not pairs & set(HELD_OUT)
    assert [item.unit_id for item in items] == [item.id for item in items], "each is judged by itself"
    assert [item.prompt for item in questions(level, n=5).items()] == [item.prompt for item in items][
        : 5 * len(items) // 30
    ]


def test_rounds_of_one_level_differ():
    seeds = [round_seed(0, number) for number in (1, 2)]
    one, other = ({item.prompt for item in questions(seed=seed, n=20).items()} for seed in seeds)
    assert len(one & other) < 10 and len(set(seeds)) == 2


@pytest.mark.parametrize("level", ["math1", "mapping1"])
def test_no_photograph_is_asked_for_that_an_evaluation_asks(level):
    asked = {one.question for one in photo_questions(level, 3, seed=1)}
    items = questions(level, n=5, world="photos", left_out=asked).items()
    assert not asked & {item.prompt for item in items}
    assert len(items) == (5 if level == "math1" else 10)


# ---- verifiers


@pytest.mark.parametrize(
    ("reply", "accepted"),
    [
        ("Four cups.\nFinal Answer: YES", True),
        ("final answer: **no**", False),
        ("Final Answer: YES? No. Final Answer: NO", False),
        ("Yes.", True),
        ("no, no and no", False),
        ("yes and no", None),
        ("Four cups, as asked.", None),
        ("I know not.", None),
        ("", None),
    ],
)
def test_final_answers(reply, accepted):
    assert read_final_answer(reply) is accepted


@pytest.mark.parametrize(
    ("reasoning", "count", "words"),
    [
        ("<think>9 - 6 = 3. draw three blue squares.</think>", 3, "blue square"),
        ("A means B. draw an orange cross.", 1, "orange cross"),
        ("draw two red crosses. draw one red cross.", 1, "red cross"),
        ("2 + 2 = 4.", None, None),
        ("draw five red circles.", None, None),
    ],
)
def test_conclusions(reasoning, count, words):
    found = read_conclusion(reasoning)
    assert (found.count, found.words) == (count, words) if count else found is None


class Script:
    """Gives replies in turn, and notes what it was asked."""

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), []

    def understand(self, images, question, *, text_sampling):
        self.asked.append(question)
        return self.replies.pop(0)


def verdict(model, world, item, tmp_path, text=""):
    path = tmp_path / "a.png"
    Image.new("RGB", (64, 64), "white").save(path)
    ((_, found),) = self_judge(model, world).judge([JudgeTask(item=item, text=text, image_path=path)])
    return found


@pytest.mark.parametrize(
    ("text", "replies", "score"),
    [
        ("draw three blue squares.", ("three", "three"), 1),
        ("draw three blue squares.", ("three", "four"), 0),
        ("draw three blue squares.", ("two", "three"), 0),
        ("draw three blue squares.", ("three", "many"), 0),
        ("no idea", (), 0),
    ],
)
def test_it_verifies_what_it_concluded_itself(tmp_path, text, replies, score):
    item = EvalItem(id="a", group="math1", prompt="2 + 2 red stars", seed=0, answer="red star; " * 4)
    model = Script(*replies)
    assert verdict(model, "shapes", item, tmp_path, text).score == score
    assert model.asked == ["how many blue squares are there?", "how many shapes are there?"][: len(replies)]


@pytest.mark.parametrize(("reply", "score"), [("Final Answer: YES", 1), ("Final Answer: NO", 0), ("Hm.", 0)])
def test_the_right_answer_is_not_shown(tmp_path, reply, score):
    item = EvalItem(id="a", group="math1", prompt="Draw 2 + 2 mugs.", seed=0, answer="4 mugs")
    model = Script(reply)
    assert verdict(model, "photos", item, tmp_path).score == score
    assert model.asked == [PHOTO_QUESTION.format(prompt="Draw 2 + 2 mugs.")] and "4 mugs" not in model.asked[0]


def test_without_a_verifier_all_is_accepted():
    tasks = [JudgeTask(item=item) for item in questions().items()]
    assert [found.score for _, found in accept_all().judge(tasks)] == [1.0] * 4


class Painter:
    """Reasons as its examples do, and paints every second image without one of its things."""

    def __init__(self, items):
        self.known = {item.prompt: (i, item.payload) for i, item in enumerate(items)}

    def generate(self, prompt, *, images, seed, think):
        found = [self.known[one] for one in prompt]
        made = [example.target if i % 2 == 0 else wrong(example) for i, example in found]
        return Generation([Image.fromarray(one) for one in made], [example.think for _, example in found])


def wrong(example):
    """An example's image without its first thing."""
    scene = example.target_scene
    return render(replace(scene, things=scene.things[1:]))


def test_planted_wrong_images_are_known_to_be_wrong(tmp_path):
    asked = questions("math2", n=6)
    items = asked.items()
    state = run_toy(tmp_path, Painter(items), benchmark=asked)
    right = {name: unit["score"] for name, unit in state.result["units"].items()}
    chosen = choose_candidates(items, verified=dict.fromkeys(right, 1.0), right=right, most=None)
    assert summarize(chosen)["precision"]["value"] == 0.5
    assert [one.right for one in chosen] == [True, False] * 3


# ---- selection

ITEMS = [EvalItem(id=name, group="math1", prompt=f"draw {name}", seed=0) for name in "abcdef"]
VERIFIED = {"a": 1.0, "b": 0.0, "c": 1.0, "d": None, "e": 1.0, "f": 0.0}
RIGHT = {"a": 1.0, "b": 1.0, "c": 0.0, "d": 1.0, "e": 1.0, "f": 0.0}


def test_counts_and_rates():
    chosen = choose_candidates(ITEMS, verified=VERIFIED, right=RIGHT, most=2)
    assert [one.id for one in chosen if one.used] == ["a", "c"]
    found = summarize(chosen)
    counts = {name: found[name] for name in ("generated", "accepted", "failed", "used", "right", "accepted_right")}
    assert counts == {"generated": 6, "accepted": 3, "failed": 1, "used": 2, "right": 4, "accepted_right": 2}
    rates = {name: found[name]["value"] for name in ("acceptance_rate", "accuracy", "precision", "recall")}
    assert rates == {"acceptance_rate": 3 / 6, "accuracy": 4 / 6, "precision": 2 / 3, "recall": 2 / 4}
    assert found["precision"]["low"] < 2 / 3 < found["precision"]["high"]


def test_rates_that_are_not_known():
    nobody = dict.fromkeys(VERIFIED, 0.0)
    assert summarize(choose_candidates(ITEMS, verified=nobody, right=RIGHT, most=None))["precision"] is None
    unknown = summarize(choose_candidates(ITEMS, verified=VERIFIED, right=None, most=None))
    assert unknown["acceptance_rate"]["value"] == 0.5 and unknown["precision"] is None and unknown["right"] is None


@pytest.fixture
def images(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    for item in ITEMS:
        Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / f"{item.id}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("links", [True, False])
def test_a_full_disk_leaves_the_dataset_before(tmp_path, images, monkeypatch, links):
    folder = tmp_path / "accepted"
    chosen = choose_candidates(ITEMS, verified=VERIFIED, right=None, most=None)
    write_dataset(folder, chosen[:3], images)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    with monkeypatch.context() as broken:
        broken.setattr(selection.os, "link", full)
        broken.setattr(selection, "copy_file", full)
        with pytest.raises(OSError, match=r"No space left on device: .*accepted/a\.png"):
            write_dataset(folder, chosen, images)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    if not links:
        monkeypatch.setattr(selection.os, "link", full)
    write_dataset(folder, chosen, images)
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "c.png", "e.png", "metadata.jsonl"]
    assert (folder / "a.png").read_bytes() == (images / "a.png").read_bytes()
