"""ImgEdit: its files, the judge's question about two images, replies, and scores of 1 to 5."""

import json

import pytest
from helpers.evaluation import judge_of, run_toy, scores_of
from PIL import Image

from unimm.evaluation.benchmarks.base import BenchmarkOptions
from unimm.evaluation.benchmarks.imgedit import ImgEditBenchmark, read_scores
from unimm.evaluation.judges.base import JudgeReply
from unimm.evaluation.judges.readers import Reader
from unimm.models.base import Generation

QUESTIONS = {"add": "Added <edit_prompt>?", "remove": "Removed <edit_prompt>?"}
EDITS = {
    "82": {"id": "animal/1.jpg", "prompt": "a cat", "edit_type": "add"},
    "83": {"id": "animal/1.jpg", "prompt": "a dog", "edit_type": "add"},
    "100": {"id": "human/2.png", "prompt": "the hat", "edit_type": "remove"},
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "basic_edit.json").write_text(json.dumps(EDITS))
    (tmp_path / "prompts.json").write_text(json.dumps(QUESTIONS))
    for name, colour in (("animal/1.jpg", "red"), ("human/2.png", "blue")):
        (tmp_path / "images" / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(tmp_path / "images" / name)
    return tmp_path


def imgedit(folder, **options):
    options = {"images": folder / "images", **options}
    return ImgEditBenchmark(BenchmarkOptions(items=str(folder / "basic_edit.json"), **options))


class Rates(Reader):
    """Rates by the prompt, and notes the questions."""

    name, workers = "rates", 1

    def __init__(self):
        self.asked = []

    def identity(self):
        return {"kind": "rates"}

    def answer(self, question):
        self.asked.append(question)
        scores = {"Added a cat?": (5, 4, 3), "Added a dog?": (2, 2, 2)}.get(question.text, (5, 5, 5))
        names = ("Prompt Compliance", "Visual Naturalness", "Physical & Detail Integrity")
        return JudgeReply(
            reply="Brief reasoning: fine\n" + "\n".join(f"{n}: {s}" for n, s in zip(names, scores, strict=True))
        )


class Inverts:
    """Edits an image by inverting it."""

    def generate(self, prompt, *, images, seed):
        return Generation([some[0].point(lambda value: 255 - value) for some in images])


def test_a_run(folder):
    reader = Rates()
    made = imgedit(folder)
    state = run_toy(folder / "run", Inverts(), benchmark=made, judge=judge_of(made, reader))
    assert scores_of(state) == {"add": 3.0, "remove": 5.0, "overall": 4.0}
    score = state.result["scores"]["add"]
    assert 1 <= score["low"] < 3 < score["high"] <= 5 and state.result["scale"] == [1.0, 5.0]
    text, before, after = reader.asked[0].parts
    assert text == "Added a cat?"
    assert before.getpixel((3, 3))[0] > 250 and after.getpixel((3, 3))[0] < 5, "the image before comes first"
    assert "| UniWorld-V1 |  |  | 3.37 |" in state.markdown


def test_some_of_the_items(folder):
    assert [item.id for item in imgedit(folder, n=1).items()] == ["add/82", "remove/100"]
    assert [item.id for item in imgedit(folder, tasks=("remove",)).items()] == ["remove/100"]
    made = imgedit(folder, tasks=("remove",))
    state = run_toy(folder / "run", Inverts(), benchmark=made, judge=judge_of(made, Rates()))
    assert list(scores_of(state)) == ["remove"], "without one of the types there is no overall score"


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("Brief reasoning: good.\nPrompt Compliance: 5\nVisual Naturalness: 4\nDetail Integrity: 3", [5, 4, 3]),
        ("**Prompt Compliance:** 5\n- **Visual Naturalness**: 4\n* Detail Integrity: **3**", [5, 4, 3]),
        ("  Prompt Compliance:  1 \n\nVisual Naturalness: 1\nDetail: 1.", [1, 1, 1]),
        ("Brief reasoning: it has 3: 4\nA: 1\nB: 2\nC: 3", [1, 2, 3]),
        ("Score: 4\nA: 1\nB: 2\nC: 3", None),
        ("A: 1\nB: 2", None),
        ("A: 1\nB: 2\nC: 6", None),
        ("5 4 3", None),
        ("", None),
    ],
)
def test_replies(reply, scores):
    assert read_scores(reply) == scores


@pytest.mark.parametrize(
    ("file", "contents", "message"),
    [
        ("basic_edit.json", "{", "is no JSON"),
        ("basic_edit.json", "[]", "expected an object of edits"),
        ("basic_edit.json", '{"7": {"id": "a", "prompt": "b"}}', "edit 7, has edit_type None"),
        ("basic_edit.json", '{"7": 3}', "edit 7, has id 3"),
        (
            "basic_edit.json",
            '{"7": {"id": "a.png", "prompt": "b", "edit_type": "add"}}',
            r"no image a\.png in .*, for 7",
        ),
        ("prompts.json", '{"add": "Added?"}', "expected a text with <edit_prompt>"),
        ("prompts.json", '{"add": "<edit_prompt>"}', "no question for the type remove"),
    ],
)
def test_malformed_files(folder, file, contents, message):
    (folder / file).write_text(contents)
    with pytest.raises(ValueError, match=message):
        judge_of(imgedit(folder), Rates())


def test_files_that_are_missing(folder):
    with pytest.raises(ValueError, match="got no --items for imgedit"):
        ImgEditBenchmark(BenchmarkOptions())
    with pytest.raises(ValueError, match="got the task 'paint': expected some of add, remove"):
        imgedit(folder, tasks=("paint",)).items()
    (folder / "prompts.json").unlink()
    with pytest.raises(ValueError, match=r"no prompts\.json in .*not shipped"):
        judge_of(imgedit(folder), Rates())
    (folder / "basic_edit.json").unlink()
    with pytest.raises(ValueError, match=r"cannot read .*basic_edit\.json"):
        imgedit(folder).items()
