"""UniSandBox's questions about characters that were made up: their files, goals, judges, and a run."""

import numpy as np
import pytest
from helpers.evaluation import judge_of, run_toy, scores_of
from PIL import Image
from typer.testing import CliRunner

from unimm.cli.main import app
from unimm.data.knowledge.files import KnowledgeSet, write_knowledge
from unimm.data.shapes import render
from unimm.data.shapes.rng import ExampleRng
from unimm.evaluation.benchmarks.base import BenchmarkOptions
from unimm.evaluation.benchmarks.unisandbox.benchmark import UniSandBoxBenchmark
from unimm.evaluation.benchmarks.unisandbox.knowledge import write_knowledge_benchmark
from unimm.models.base import Generation


def benchmark(folder, **options):
    return UniSandBoxBenchmark(BenchmarkOptions(items=str(folder), **options))


@pytest.fixture
def made():
    return KnowledgeSet.invent(4, n_reasoning=2, seed=2)


@pytest.fixture
def folder(made, tmp_path):
    write_knowledge(tmp_path / "set", made)
    write_knowledge_benchmark(tmp_path / "set", made)
    return tmp_path / "set"


class Student:
    """Answers from what it knows; draws what it thinks it is asked for."""

    def __init__(self, made, *, knows_who=True):
        self.made = made
        self.knows_who = knows_who
        self.thought = []

    def answer(self, question):
        """The character that something is true of, or what is true of the character that is named."""
        likes = "favourite" in question or ("like" in question and "look" not in question)
        trait = "favourite" if likes else "portrait"
        who = [one for one in self.made.characters if one.traits[trait].words in question]
        if who:
            return who[0] if self.knows_who else self.made.characters[0]
        (named,) = [one for one in self.made.characters if one.name in question]
        return named.traits[trait]

    def understand(self, images, questions):
        found = [self.answer(question) for question in questions]
        return [getattr(one, "name", None) or one.a_words.upper() for one in found]

    def generate(self, prompts, *, images, seed, think=False):
        self.thought += [think] * len(prompts)
        drawn = []
        for prompt in prompts:
            found = self.answer(prompt)
            colour, shape = getattr(found, "portrait", found).words.split()
            scene = ExampleRng(prompt, test=False).scene([(shape, colour)])
            drawn.append(Image.fromarray(np.asarray(render(scene))))
        return Generation(drawn, [""] * len(prompts))


def test_one_that_knows_all_is_right_and_one_that_does_not_know_who_is_not(folder, made, tmp_path):
    student = Student(made)
    state = run_toy(tmp_path / "all", student, benchmark=benchmark(folder, think=True), batch=9)
    assert scores_of(state) == dict.fromkeys(("forward", "inverse", "words_forward", "words_inverse"), 1.0)
    # 2 traits of 4 characters in 4 wordings, and 4 searches for each of 4; answers in words have no think mode
    assert student.thought == [True] * (2 * 4 * 4 + 4 * 4)
    assert {name: score["n"] for name, score in state.result["scores"].items()} == {
        "forward": 32, "inverse": 16, "words_forward": 40, "words_inverse": 40,
    }  # fmt: skip
    state = run_toy(tmp_path / "some", Student(made, knows_who=False), benchmark=benchmark(folder), batch=9)
    assert scores_of(state) == {"forward": 1.0, "inverse": 0.25, "words_forward": 1.0, "words_inverse": 0.25}


def test_those_to_reason_about_are_not_asked_about(folder, made):
    questions = " ".join(item.prompt for item in benchmark(folder).items())
    assert not [one.name for one in made.reasoning if one.name in questions]
    name = made.characters[0].name
    some = benchmark(folder, tasks=(f"forward.{name}", f"words_forward.{name}")).items()
    assert {item.group for item in some} == {"forward", "words_forward"} and all(name in item.prompt for item in some)


def test_tasks_and_judges_that_do_not_fit(folder, tmp_path):
    with pytest.raises(ValueError, match="got the task 'math1': expected some of forward, inverse, words_forward"):
        benchmark(folder, tasks=("math1",)).items()
    judged = benchmark(folder)
    with pytest.raises(ValueError, match="got --judge vlm for words_forward, whose answers are words: expected exact"):
        judged.judge_maker(judged.judge_spec("vlm:bagel-nano"), device="cpu")
    assert judge_of(benchmark(folder, tasks=("forward",)))().identity()["kind"] == "exact"
    path = next((folder / "benchmark" / "test_knowledge").glob("*.jsonl"))
    path.write_text('{"ID": 1, "Question": "draw X", "Answer": "an apple"}\n')
    with pytest.raises(ValueError, match=r"got the answer 'an apple' of .*/1: expected a colour and a shape"):
        benchmark(folder).items()
    photos = KnowledgeSet.invent(2, world="photos")
    write_knowledge(tmp_path / "photos", photos)
    write_knowledge_benchmark(tmp_path / "photos", photos)
    asked = benchmark(tmp_path / "photos")
    assert {item.group for item in asked.items()} == {"forward", "inverse"} and len(asked.items()) == 2 * 3 + 4
    with pytest.raises(ValueError, match="expected vlm:MODEL or openai:URL"):
        asked.judge_spec(None)


def test_the_command_with_the_small_bagel(folder, tmp_path):
    options = ["--items", str(folder), "--n", "2", "--steps", "2", "--out", str(tmp_path / "run"), "--json"]
    result = CliRunner().invoke(app, ["eval", "unisandbox", "--model", "bagel-nano", *options])
    assert result.exit_code == 0, result.output
    assert '"generated characters, shapes"' in result.stdout
