"""UniSandBox: its files, its labels and those put right, its judge's replies, new items, and whole runs."""

import json
import re

import pytest
from helpers.chat_server import chat_server, pictures, texts
from helpers.evaluation import judge_of, run_toy, scores_of
from helpers.unisandbox_toys import checkout, mapping, write_lines
from PIL import Image

from unimm.data.shapes import render
from unimm.data.shapes.language import NUMBERS
from unimm.evaluation.benchmarks.base import BenchmarkOptions
from unimm.evaluation.benchmarks.unisandbox.benchmark import REASONING, UniSandBoxBenchmark
from unimm.evaluation.benchmarks.unisandbox.files import find_file, read_task, write_task
from unimm.evaluation.benchmarks.unisandbox.generated import check_answer, photo_questions, shapes_questions
from unimm.evaluation.benchmarks.unisandbox.judge_questions import (
    crop_black_border,
    first_line,
    read_constants,
    read_number,
    read_object,
    read_score,
)
from unimm.evaluation.benchmarks.unisandbox.labels import WRONG_LABELS, corrected, right_count, split_answer
from unimm.evaluation.judges.base import JudgeReply, JudgeTask
from unimm.evaluation.judges.openai_endpoint import OpenAIReader
from unimm.evaluation.judges.readers import Reader
from unimm.models.base import Generation


def benchmark(items=None, **options) -> UniSandBoxBenchmark:
    return UniSandBoxBenchmark(BenchmarkOptions(items=None if items is None else str(items), **options))


def protocol_of(made):
    """What is written of a reader's questions."""
    return judge_of(made, Script())().identity()["protocol"]


@pytest.fixture
def copy(tmp_path):
    return checkout(tmp_path / "UniSandBox")


# ---- files


def test_official_items(copy):
    items = benchmark(copy).items()
    assert [one.id for one in items if one.group == "math2"] == ["math2/9", "math2/3"]
    pair = [one for one in items if one.unit_id == "mapping1/12"]
    assert [(one.id, one.answer) for one in pair] == [("mapping1/12_A", "cup"), ("mapping1/12_B", "fork")]
    assert {one.group for one in items} == set(REASONING), "knowledge is asked for by name"
    assert next(one for one in items if one.id == "math1/1").answer == "2 cups.", "as it stands"


@pytest.mark.parametrize("below", ["", "benchmark", "benchmark/test_reasoning"])
def test_a_checkout_is_found_from_any_of_its_folders(copy, below):
    assert benchmark(copy / below, tasks=("math1",)).items()[0].id == "math1/1"
    assert protocol_of(benchmark(copy / below))["questions"] == "UniSandBox"


def test_n_counts_pairs(copy):
    assert [one.id for one in benchmark(copy, tasks=("mapping1",), n=1).items()] == ["mapping1/1_A", "mapping1/1_B"]


def test_knowledge(copy):
    items = benchmark(copy, tasks=("forward", "inverse")).items()
    assert [one.id for one in items] == ["forward/Aurelius/5", "forward/Aurelius/15", "inverse/Aurelius_Nyxella/39"]
    (one,) = benchmark(copy, tasks=("inverse.Aurelius_Nyxella",)).items()
    assert one.group == "inverse" and one.answer == "A woman."


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("math_1", "{", r"math_1\.jsonl, line 3, is no JSON"),
        ("math_1", "[]", r"line 3, holds \[\]"),
        ("math_1", '{"Question": "a", "id": "3"}', "line 3, has Answer None: expected a text"),
        ("math_1", '{"Question": " ", "Answer": "b", "id": "3"}', "has Question ' '"),
        ("math_1", '{"Question": "a", "Answer": "b"}', "has the id None: expected a number, under id or ID"),
        ("math_1", '{"Question": "a", "Answer": "b", "id": "../3"}', "has the id '../3'"),
        ("mapping1", '{"ID": 7, "Question": "a", "Answer": "b"}', "line 5, has no question: expected Question_A or"),
        ("mapping1", json.dumps(mapping("1")[0]), "is a second Question_A of ID 1"),
        ("mapping1", json.dumps(mapping("7")[0]), r"mapping1\.jsonl has one question of ID 7"),
    ],
)
def test_a_malformed_line(copy, file, line, message):
    path = find_file(copy, f"{file}.jsonl")
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_task(copy, "math1" if file == "math_1" else file)


def test_a_missing_file(tmp_path, copy):
    with pytest.raises(ValueError, match=r"no math_1\.jsonl in .*: expected a checkout of UniSandBox"):
        benchmark(tmp_path / "nothing").items()
    with pytest.raises(ValueError, match="got the task 'math4'"):
        benchmark(copy, tasks=("math4",)).items()
    with pytest.raises(ValueError, match=r"no Tom\.jsonl"):
        benchmark(copy, tasks=("forward.Tom",)).items()


def test_new_questions_in_the_format_of_its_files(tmp_path):
    for task in REASONING:
        questions = photo_questions(task, 5, seed=3)
        write_task(tmp_path, task, questions)
        assert read_task(tmp_path, task) == questions
    first = json.loads(find_file(tmp_path, "math_2.jsonl").read_text().splitlines()[0])
    assert list(first) == ["Question", "Answer", "id"]
    # their labels are right
    for task in REASONING[:3]:
        assert corrected(task, read_task(tmp_path, task)) == (read_task(tmp_path, task), {})


# ---- labels

# id: the expression of the question in the released file, its label, and its value, worked out apart from this package
EXPRESSIONS = {
    "math2": """9: 10 % 3 + 1 | 4 | 2; 10: \u221a49 / 3 | 1 | -; 44: 7 % 3 + 1 | 3 | 2; 51: 9 % 5 + 1 | 4 | 5;
        55: 8 % 3 + 2 | 3 | 4; 64: 7 % 3 + 1 | 3 | 2; 65: \u221a49 / 3 | 2 | -; 69: 9 % 5 + 2 | 4 | 6;
        70: 25 / \u221a9 | 3 | -; 75: 8 % 3 + 2 | 3 | 4; 80: 20 / \u221a16 | 4 | 5; 91: 9 / \u221a81 | 3 | 1""",
    "math3": """1: 3 + 2 - \u221a25 | 1 | -; 11: (2^3 / \u221a4) - 1 | 4 | 3; 14: (5 * 0) + 3 + \u221a9 | 3 | 6;
        19: (3^2) / 3 - 2 | 3 | 1; 22: (6 % 4) + 1 - 1 | 3 | 2; 24: (9 % 5) + 3 - 1 | 3 | 6; 26: (5 - \u221a9) + 3 | 3 | 5;
        30: (2 * 2) - \u221a9 + 1 | 3 | 2; 31: (5 % 3) + 3 - 1 | 3 | 4; 32: (\u221a16 - 1) * 1 + 1 | 5 | 4;
        36: (7 % 4) + 2 - 1 | 2 | 4; 45: (2^3 / \u221a16) - 1 | 3 | 1; 46: (5 % 2) + 3 - 1 | 4 | 3; 54: 4^2 / 8 - 3 | 2 | -;
        64: (16 % 6) + 2 | 4 | 6; 67: (7 % 3) + 2 | 4 | 3; 71: 5^2 / 25 + 3 | 5 | 4; 83: 2^2 - \u221a9 + 1 | 4 | 2;
        86: 3^2 / 9 + 2 | 5 | 3; 91: \u221a(M\u00b2 + 9) where M = 1 | 3 | -; 92: 14 / \u221a9 - 3 | 1 | -;
        96: 5 % 3 + 3 - 1 | 2 | 4""",
}
ROWS = [
    (task, *re.fullmatch(r"(\d+): (.+) \| (\d+) \| (\d+|-)", row.strip()).groups())
    for task, rows in EXPRESSIONS.items()
    for row in rows.split(";")
]


def test_34_labels_are_wrong():
    assert len(ROWS) == 34 == sum(map(len, WRONG_LABELS.values()))
    assert {(task, name) for task, name, *_ in ROWS} == {(t, name) for t, some in WRONG_LABELS.items() for name in some}


@pytest.mark.parametrize(
    ("task", "name", "expression", "gold", "value"), ROWS, ids=[f"{row[0]}-{row[1]}" for row in ROWS]
)
def test_what_their_questions_give(task, name, expression, gold, value):
    right = None if value == "-" else int(value)
    assert right_count(f"Show as many cups as {expression}.") == right
    assert WRONG_LABELS[task][name] == (int(gold), right)


def test_corrected_labels(copy):
    made = benchmark(copy, labels="corrected")
    answers = {one.id: one.answer for one in made.items()}
    assert answers["math2/9"] == "2 pens" and answers["math2/3"] == "2 dog" and answers["math1/99"] == "2 belts."
    assert answers["math3/6"] == "4 books" and "mapping2/12_A" not in answers and "mapping1/12_A" in answers
    assert made.notes["left_out"] == {
        "math3/1": "the arithmetic gives no number of things",
        "math3/76": "the question names no object",
        "mapping2/12": "the rules lead to no object",
        "mapping3/12": "the rules lead to no object",
    }
    assert {one.id: one.answer for one in benchmark(copy).items()}["math2/9"] == "4 pens"


@pytest.mark.parametrize(
    "row",
    [
        {"Question": "Show cups: 2 + 2.", "Answer": "3 cups", "id": "9"},  # this one, but another question
        {"Question": "Show cups: 2 + 2.", "Answer": "3 cups", "id": "7"},
    ],
)
def test_a_wrong_label_that_is_not_known(copy, row):
    write_lines(find_file(copy, "math_2.jsonl"), [row])
    with pytest.raises(ValueError, match="the label of math2, id ., is 3, its question gives 4, and it is not known"):
        benchmark(copy, labels="corrected").items()
    assert benchmark(copy, labels="official").items()


@pytest.mark.parametrize(
    ("answer", "parts"),
    [("2 cups.", (2, "cups")), ("4 pairs of socks", (4, "pairs of socks")), ("1 bowl", (1, "bowl"))],
)
def test_answers(answer, parts):
    assert split_answer(answer) == parts
    with pytest.raises(ValueError, match="expected a number and what is counted"):
        split_answer("cups")


# ---- the judge's texts and replies


def test_texts_are_read_and_not_run(copy):
    assert read_constants(copy / "eval" / "eval_knowledge.py")["CAPTION_PROMPT"] == "One line.\nStrictly.\n"
    one, other = (protocol_of(benchmark(copy, judge_prompts=copy)) for _ in range(2))
    assert one == other and len(one["sha256"]) == 64
    path = copy / "eval" / "eval_math.py"
    path.write_text(path.read_text().replace("Name and count", "Count"))
    assert protocol_of(benchmark(copy)) != one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "no eval/eval_math.py in .*not shipped; give a checkout"),
        (lambda path: path.write_text("CAPTION_PROMPT = 'a'"), r"eval_math\.py has no text EVALUATION_PROMPT_TEMPLATE"),
        (lambda path: path.write_text("CAPTION_PROMPT = f'{3}'"), r"has no text CAPTION_PROMPT"),
        (lambda path: path.write_text("CAPTION_PROMPT = '"), r"cannot read .*eval_math\.py"),
        (
            lambda path: path.write_text("CAPTION_PROMPT = 'a'\nEVALUATION_PROMPT_TEMPLATE = '{caption}'"),
            r"has no \{expected_answer\}",
        ),
    ],
)
def test_texts_that_are_missing(copy, change, message):
    change(copy / "eval" / "eval_math.py")
    with pytest.raises(ValueError, match=message):
        protocol_of(benchmark(copy))


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("**Score: YES**", 1.0),
        ("Score: NO", 0.0),
        ("score:yes", 1.0),
        ("Thinking it over ...\n\nScore:\nNo.", 0.0),
        ("Score: YES or NO? Score: NO", 1.0),  # the first one counts, as in the original
        ("**Score: [YES]**", None),
        ("**Score:** YES", None),
        ("YES", None),
        ("", None),
    ],
)
def test_scores_in_replies(reply, score):
    assert read_score(reply) == score


def test_other_replies():
    assert read_object("Object: teapot\nIt is blue.") == "teapot"
    assert read_object(" a teapot ") == "a teapot" and read_object("Object:  Error ") == "Error"
    assert first_line("\n Flower: rose \nA rose.") == "Flower: rose"
    assert [
        read_number(reply) for reply in ("three", "Three.", "there are 3", "one or two", "many", "three, yes, 3")
    ] == [*(3, 3, 3, None, None, 3)]


def test_a_black_border_is_cropped():
    image = Image.new("RGB", (8, 8))
    assert crop_black_border(image).size == (8, 8)
    image.putpixel((2, 3), (1, 0, 0))
    assert crop_black_border(image).size == (1, 1)


class Script(Reader):
    """Replies in turn, and notes the questions."""

    name, workers = "script", 1

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), []

    def identity(self):
        return {"kind": "script"}

    def answer(self, question):
        self.asked.append(question)
        return JudgeReply(reply=self.replies.pop(0))


# replies of the judge, the score, and how many questions that took
DIALOGUES = {
    "math1/1": [
        (("Caption: 2 cups", "**Score: YES**"), 1.0, 2),
        (("2 cups", "Score: no"), 0.0, 2),
        (("Error",), 0.0, 1),
        ((" error \n",), 0.0, 1),
        # not the bare word: it goes to the second question, which says no
        (("Caption: Error", "Score: NO"), 0.0, 2),
        (("", "  ", "Caption: 2 cups", "Score: YES"), 1.0, 4),
        (("2 cups", "It matches.", "It matches!", "Yes."), None, 4),
    ],
    "mapping1/1_A": [
        (("Object: mug", "Score: YES"), 1.0, 2),
        (("a mug", "Score: YES"), 1.0, 2),
        (("Error",), 0.0, 1),
        (("Object: Error",), 0.0, 1),
        (("Object: fork", "Score: NO"), 0.0, 2),
    ],
    "forward/Aurelius/15": [
        (("Fruit: grape\nA bunch of grapes.", "Score: YES"), 1.0, 2),
        (("Reject",), 0.0, 1),
        (("Flower: rose", "Score: NO"), 0.0, 2),
    ],
}
CASES = [(name, *case) for name, cases in DIALOGUES.items() for case in cases]


@pytest.mark.parametrize("case", CASES)
def test_dialogues(copy, tmp_path, case):
    name, replies, score, n = case
    made = benchmark(copy, tasks=("math1", "mapping1", "forward"))
    item = next(one for one in made.items() if one.id == name)
    path = tmp_path / "image.png"
    Image.new("RGB", (4, 4), "red").save(path)
    reader = Script(*replies)
    ((_, verdict),) = judge_of(made, reader)().judge([JudgeTask(item=item, image_path=path)])
    assert verdict.score == score and len(reader.asked) == n and [one.reply for one in verdict.replies] == list(replies)
    first, last = reader.asked[0], reader.asked[-1]
    limit = 2048 if name.startswith("forward") else 10240
    assert len(first.images) == 1 and isinstance(first.parts[0], Image.Image) and first.max_tokens == limit
    if n > 1 and score is not None:
        assert not last.images and last.text.endswith(f"for {item.answer}?")
        assert last.max_tokens == (1024 if name.startswith("forward") else 10240)
        assert "A bunch" not in last.text, "of knowledge the first line counts"
    if replies[0] == "Caption: 2 cups":
        assert last.text == "Caption: 2 cups for 2 cups.?", "the whole reply, and the answer as it stands"


# ---- new items


@pytest.mark.parametrize("task", REASONING)
@pytest.mark.parametrize("world", ["shapes", "photos"])
def test_generated_items(task, world):
    items = benchmark(tasks=(task,), n=30, world=world, seed=2).items()
    sides = 1 if task.startswith("math") else 2
    assert len(items) == 30 * sides == len({one.prompt for one in items}) == len({one.seed for one in items})
    assert len({one.unit_id for one in items}) == 30
    assert (
        items[:sides] == items[:sides]
        and items[0].prompt == benchmark(tasks=(task,), n=1, world=world, seed=2).items()[0].prompt
    )
    assert items[0].prompt != benchmark(tasks=(task,), n=1, world=world, seed=3).items()[0].prompt


def test_a_wrong_answer_is_found():
    one = shapes_questions("math1", 1, seed=1)[0].example
    check_answer("math1", one)
    wrong = type(one)(task=one.task, prompt="draw 9 - 1 red circles", goal=one.goal)
    with pytest.raises(AssertionError):
        check_answer("math1", wrong)


def test_more_questions_than_there_are():
    with pytest.raises(ValueError, match="only some .* different questions of math1; take fewer"):
        shapes_questions("math1", 5000, seed=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "corrected"}, "--labels for generated items"),
        ({"world": "moon"}, "got --world moon: expected shapes or photos"),
        ({"items": "x", "world": "photos"}, "--world for the benchmark's own items"),
        ({"items": "x", "labels": "right"}, "got --labels right: expected official or corrected"),
        ({"n": 0}, "got n 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        benchmark(**options)


def test_generated_items_have_no_knowledge():
    with pytest.raises(ValueError, match="got the task 'forward'"):
        benchmark(tasks=("forward",)).items()


def test_photos_have_no_exact_judge(copy):
    for made in (benchmark(world="photos"), benchmark(copy)):
        with pytest.raises(ValueError, match="got no --judge for unisandbox, .*: expected vlm:MODEL or openai:URL"):
            made.judge_spec(None)
        with pytest.raises(ValueError, match="which none can read"):
            judge_of(made)


# ---- whole runs


class Painter:
    """Paints the right scene of every item, but for `wrong` ones, which get that of another."""

    def __init__(self, items, wrong=()):
        self.scenes = {one.prompt: render(one.payload.target_scene) for one in items}
        blank = Image.new("RGB", (64, 64), (235, 235, 235))
        self.images = {prompt: Image.fromarray(pixels) for prompt, pixels in self.scenes.items()}
        self.images |= {one.prompt: blank for one in items if one.id in wrong}

    def generate(self, prompt, *, images, seed, think=False):
        return Generation([self.images[one] for one in prompt], ["hm"] * len(prompt) if think else [])


def test_an_exact_run(tmp_path):
    made = benchmark(n=3, seed=4, think=True)
    items = made.items()
    wrong = ("math2/1", "mapping1/2_B", "mapping3/1_A", "mapping3/1_B")
    state = run_toy(tmp_path, Painter(items, wrong), benchmark=made, batch=4)
    third = pytest.approx(2 / 3)
    scores = scores_of(state)
    assert scores == {
        "math1": 1,
        "math2": third,
        "math3": 1,
        "mapping1": third,
        "mapping2": 1,
        "mapping3": third,
        "average": pytest.approx(5 / 6),
    }
    assert state.result["scores"]["mapping3"]["n"] == 3, "a pair is one"
    assert state.result["units"]["mapping1/2"]["score"] == 0.0
    assert "| BAGEL, thinking | 0.6 | 0.44 | 0.23 | 0.74 | 0.6 | 0.45 | 0.51 |" in state.markdown
    assert "over new items" in state.markdown and "**oracle**, thinking" in state.markdown


def test_who_paints_one_image_for_both_questions_scores_nothing(tmp_path):
    made = benchmark(n=4, seed=4, tasks=("mapping2",))
    items = made.items()
    painter = Painter(items)
    for a, b in zip(items[::2], items[1::2], strict=True):
        painter.images[b.prompt] = painter.images[a.prompt]
    assert scores_of(run_toy(tmp_path, painter, benchmark=made)) == {"mapping2": 0.0}


def test_a_reader_of_the_little_world(tmp_path):
    """By what it counts: of the thing that was asked for, and of all."""
    made = benchmark(n=2, seed=4, tasks=("math1",))
    one, other = made.items()
    right, wrong = (NUMBERS[len(item.payload.goal.wants)] for item in (one, other))
    reader = Script(right, right, wrong, "four" if wrong != "four" else "one")
    state = run_toy(tmp_path, Painter(made.items()), benchmark=made, judge=judge_of(made, reader))
    assert {name: unit["score"] for name, unit in state.result["units"].items()} == {"math1/1": 1.0, "math1/2": 0.0}
    want = one.payload.goal.wants[0]
    assert reader.asked[0].text.startswith(f"how many {want.colour} {want.shape}")
    assert reader.asked[1].text == "how many shapes are there?"


class Paints:
    """Paints an image of one colour for every question, by what it asks for."""

    colours = (("cups", "red"), ("Draw 'A'", "red"), ("Draw 'B'", "blue"), ("", "green"))

    def generate(self, prompt, *, images, seed):
        named = [next(colour for words, colour in self.colours if words in one) for one in prompt]
        return Generation([Image.new("RGB", (4, 4), name) for name in named])


def endpoint_reply(body):
    """Sees two cups in red, a fork in blue, nothing in green; compares words."""
    seen = pictures(body)
    if seen:
        colour = seen[0].getpixel((0, 0))
        name = {(255, 0, 0): "cup", (0, 0, 255): "fork"}.get(colour)
        if texts(body) == "Name it.":
            return f"Object: {name}" if name else "Object: Error"
        return "2 cups" if name == "cup" else "Error"
    said, _, expected = texts(body).rstrip("?").partition(" for ")
    return f"**Score: {'YES' if said.removesuffix('s') == expected.rstrip('.').removesuffix('s') else 'NO'}**"


def test_an_official_run_with_an_endpoint(tmp_path, copy):
    made = benchmark(copy, tasks=("math1", "mapping1"))
    with chat_server(endpoint_reply, models=("Qwen/Qwen2.5-VL-7B-Instruct",)) as server:
        reader = OpenAIReader(server.url, workers=4)
        state = run_toy(tmp_path / "run", Paints(), benchmark=made, judge=judge_of(made, reader), batch=1)
    assert scores_of(state) == {"math1": 0.5, "mapping1": 1.0}
    assert (
        state.result["judge"]["model"] == "Qwen/Qwen2.5-VL-7B-Instruct" and state.result["judge"]["protocol"]["sha256"]
    )
    (path,) = (tmp_path / "run" / "verdicts").iterdir()
    rows = {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert [reply["reply"] for reply in rows["math1/1"]["replies"]] == ["2 cups", "**Score: YES**"]
    assert rows["math1/99"]["reason"] == "the judge sees nothing that can be right: Error"


def test_an_official_run_whose_endpoint_goes_down(tmp_path, copy):
    """Nothing is lost: what was judged is kept, and the same run goes on."""
    made = benchmark(copy, tasks=("math1", "math2", "mapping1", "mapping2", "mapping3"))
    left = [7]

    def reply(body):
        left[0] -= 1
        return endpoint_reply(body) if left[0] >= 0 else 503

    def judge(server):
        reader = OpenAIReader(server.url, workers=1, calls=2, sleep=lambda seconds: None)
        return judge_of(made, reader)

    with (
        chat_server(reply) as server,
        pytest.raises(ValueError, match="failed on 8 items one after another.*run again"),
    ):
        run_toy(tmp_path / "run", Paints(), benchmark=made, judge=judge(server))
    with chat_server(endpoint_reply) as server:
        state = run_toy(tmp_path / "run", None, benchmark=made, judge=judge(server))
    assert state.result["failed"] == 0 and scores_of(state)["mapping3"] == 1.0
