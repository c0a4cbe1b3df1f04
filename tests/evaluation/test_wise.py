"""WISE: its two versions by their files, the judge's question read from its script, replies, and the overall score."""

import json

import pytest
from helpers.evaluation import judge_of, run_toy, scores_of
from PIL import Image

from unimm.evaluation.benchmarks.base import BenchmarkOptions
from unimm.evaluation.benchmarks.wise import LEGACY, NAMES, VERIFIED, WiseBenchmark, read_verified, read_wiscore
from unimm.evaluation.judges.base import JudgeReply
from unimm.evaluation.judges.message_files import IMAGE, Field, read_message_template
from unimm.evaluation.judges.readers import Reader
from unimm.models.base import Generation

SCRIPT = '''
import openai
INTRO = "Rate it."

def build_evaluation_messages(prompt_data, image_base64):
    return [
        {"role": "system", "content": [{"type": "text", "text": "Be " + "strict."}]},
        {"role": "user", "content": [
            {"type": "text", "text": f"""{INTRO} PROMPT: "{prompt_data['Prompt']}"
EXPLANATION: "{prompt_data['Explanation']}" """},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image_base64}"}},
        ]},
    ]

raise SystemExit
'''
# ids of each category, in the three files
LEGACY_IDS = ([1, 400], [401, 567, 568, 700], [701, 800, 801, 900, 901, 1000])
VERIFIED_IDS = ([1, 400], [401, 520, 521, 640], [641, 760, 761, 880, 881, 1000])


def checkout(folder, *, verified=False):
    data = folder / ("data_verified" if verified else "data")
    data.mkdir(parents=True)
    for name, ids in zip(NAMES, VERIFIED_IDS if verified else LEGACY_IDS, strict=True):
        rows = [
            {
                "Prompt": f"prompt {i}",
                "Explanation": f"because {i}",
                "Category": "x",
                "Subcategory": "y",
                "prompt_id": i,
            }
            for i in ids
        ]
        (data / f"{name}{'_verified' if verified else ''}.json").write_text(json.dumps(rows))
    (folder / ("vllm_eval.py" if verified else "gpt_eval.py")).write_text(SCRIPT)
    return data


def wise(items, **options):
    return WiseBenchmark(BenchmarkOptions(items=None if items is None else str(items), **options))


class Rates(Reader):
    """Rates every image in the same way, and notes the questions."""

    name, workers = "rates", 1

    def __init__(self, reply):
        self.reply, self.asked = reply, []

    def identity(self):
        return {"kind": "rates"}

    def answer(self, question):
        self.asked.append(question)
        return JudgeReply(reply=self.reply(question.text) if callable(self.reply) else self.reply)


class Grey:
    def generate(self, prompt, *, images, seed):
        return Generation([Image.new("RGB", (4, 4), "grey") for _ in prompt])


@pytest.mark.parametrize(("verified", "below"), [(False, "data"), (True, "data_verified"), (False, ""), (True, "")])
def test_versions(tmp_path, verified, below):
    checkout(tmp_path, verified=verified)
    made = wise(tmp_path / below)
    items = made.items()
    expected = ["culture"] * 2 + ["time"] * 2 + ["space"] * 2 + ["biology"] * 2 + ["physics"] * 2 + ["chemistry"] * 2
    assert [item.group for item in items] == expected
    assert items[0].id == "culture/1" and items[0].answer == "because 1"
    assert made.source.endswith("verified" if verified else "legacy")
    assert made.weights == (VERIFIED if verified else LEGACY).weights
    assert sum(made.weights.values()) == pytest.approx(1)
    assert bool(made.endpoint_options) == verified, "the judge of the Verified version answers at once"
    assert [item.id for item in wise(tmp_path / below, n=1, tasks=("time", "space")).items()] == [
        *("time/401", "space/521" if verified else "space/568")
    ]


def test_files_by_name(tmp_path):
    """As the rewritten prompts are given."""
    data = checkout(tmp_path)
    made = wise(f"{data / NAMES[0]}.json,{data / NAMES[2]}.json")
    assert {item.group for item in made.items()} == {"culture", "biology", "physics", "chemistry"}
    assert made.settings()["files"] == [f"{NAMES[0]}.json", f"{NAMES[2]}.json"]


def test_the_judges_question(tmp_path):
    data = checkout(tmp_path)
    reader = Rates("Consistency: 2\nRealism: 1\nAesthetic Quality: 0")
    state = run_toy(tmp_path / "run", Grey(), benchmark=wise(data, n=1), judge=judge_of(wise(data), reader))
    (first, *_) = reader.asked
    assert first.system == "Be strict." and first.max_tokens == 2000
    assert first.parts[0] == 'Rate it. PROMPT: "prompt 1"\nEXPLANATION: "because 1" '
    assert isinstance(first.parts[1], Image.Image) and len(first.parts) == 2
    # (0.7 x 2 + 0.2 x 1) / 2
    assert scores_of(state)["culture"] == 0.8 and scores_of(state)["overall"] == pytest.approx(0.8)
    assert "| BAGEL | 0.44 | 0.55 | 0.68 | 0.44 | 0.6 | 0.39 | 0.52 |" in state.markdown


def test_the_overall_score_is_weighted(tmp_path):
    data = checkout(tmp_path, verified=True)
    reader = Rates(lambda text: "Score: 1" if 'prompt 1"' in text or "prompt 400" in text else "0")
    state = run_toy(tmp_path / "run", Grey(), benchmark=wise(data), judge=judge_of(wise(data), reader))
    assert scores_of(state) == {
        **dict.fromkeys(VERIFIED.last_ids, 0.0),
        "culture": 1.0,
        "overall": pytest.approx(0.4),
    }
    assert reader.asked[0].max_tokens == 500 and "| BAGEL, thinking |  |  |  |  |  |  | 0.628 |" in state.markdown


def test_without_one_of_the_categories_there_is_no_overall_score(tmp_path):
    made = wise(checkout(tmp_path), tasks=("culture", "time"))
    state = run_toy(tmp_path / "run", Grey(), benchmark=made, judge=judge_of(made, Rates("2 1 0")))
    assert list(scores_of(state)) == ["culture", "time"]


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Consistency: 2\nRealism: 2\nAesthetic Quality: 2", 1.0),
        ("**Consistency**: 1\n**Realism:** 0\n**Aesthetic Quality** 0", 0.35),
        ("consistency: **2**\nrealism: **0**\naesthetic quality: **1**", 0.75),
        ("Here:\nAesthetic Quality: 1\nConsistency: 0\nRealism: 1", 0.15),
        ("2\n1\n0", 0.8),
        (" 0, 0, 2 ", 0.1),
        ("Consistency: 3\nRealism: 1\nAesthetic Quality: 1", None),
        ("Consistency: 2\nRealism: 1", None),
        ("2\n1", None),
        ("2 1 0 1", None),
        ("I cannot help with that.", None),
        ("", None),
    ],
)
def test_legacy_replies(reply, score):
    assert read_wiscore(reply) == score


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        *(("Score: 1", 1.0), ("score: 0.", 0.0), ("**Score:** 1", 1.0), ("1", 1.0), (" 0\n", 0.0)),
        *(("Score: 2", None), ("10", None), ("It shows 1 apple", None), ("", None)),
    ],
)
def test_verified_replies(reply, score):
    assert read_verified(reply) == score


# ---- bad input


def test_files_that_are_missing(tmp_path):
    with pytest.raises(ValueError, match="got no --items for wise"):
        wise(None)
    with pytest.raises(ValueError, match=r"no cultural_common_sense\.json in"):
        wise(tmp_path)
    with pytest.raises(ValueError, match="no file .*: expected one of WISE's"):
        wise(tmp_path / "x.json")
    data = checkout(tmp_path)
    (data / f"{NAMES[1]}.json").unlink()
    with pytest.raises(ValueError, match=r"no spatio-temporal_reasoning\.json in .*: expected all three"):
        wise(data)
    other = checkout(tmp_path / "other", verified=True)
    with pytest.raises(ValueError, match="of both versions"):
        wise(f"{data / NAMES[0]}.json,{other / NAMES[0]}_verified.json")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("{", "is no JSON"),
        ('{"a": 1}', "expected a list of prompts"),
        ("[3]", "prompt 1, is 3"),
        ('[{"Prompt": "a", "prompt_id": 1}]', "prompt 1, has Explanation None"),
        ('[{"Prompt": "a", "Explanation": "b", "prompt_id": 1001}]', "has the prompt_id 1001: expected 1 to 1000"),
        ('[{"Prompt": "a", "Explanation": "b"}]', "has the prompt_id None"),
    ],
)
def test_malformed_files(tmp_path, rows, message):
    data = checkout(tmp_path)
    (data / f"{NAMES[0]}.json").write_text(rows)
    with pytest.raises(ValueError, match=message):
        wise(data).items()


def test_a_script_that_is_missing(tmp_path):
    made = wise(checkout(tmp_path))
    (tmp_path / "gpt_eval.py").unlink()
    with pytest.raises(ValueError, match=r"no gpt_eval\.py in .*not shipped; give a checkout"):
        judge_of(made, Rates(""))


# ---- questions in files


def test_a_script_is_read_and_not_run(tmp_path):
    checkout(tmp_path)
    template = read_message_template(tmp_path / "gpt_eval.py", ("Prompt",))
    assert template.system == "Be strict." and template.user[-1] == IMAGE
    assert template.user[:3] == ("Rate it.", ' PROMPT: "', Field(name="Prompt"))
    assert template.fields == {"Prompt", "Explanation"}


def test_questions_of_ones_own(tmp_path):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"system": "s", "user": "{Prompt} for {Explanation}?"}))
    template = read_message_template(path, ("Prompt", "Explanation"))
    image = Image.new("RGB", (1, 1))
    assert template.fill({"Prompt": "a", "Explanation": "b"}, image) == ("a for b?", image)
    made = wise(checkout(tmp_path / "WISE"), judge_prompts=path)
    assert judge_of(made, Rates(""))().identity()["protocol"]["sha256"] == template.sha256


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.py", "x = 3", 'found no messages with a "role"'),
        ("a.py", "def f(:", "cannot read"),
        ("a.py", 'x = [{"role": "user", "content": f(3)}]', "cannot read line 1"),
        ("a.py", 'x = [{"role": "user", "content": "Rate it."}]', "do not name Prompt"),
        ("a.json", "{", "is no JSON"),
        ("a.json", "{}", 'has no "user"'),
    ],
)
def test_questions_that_cannot_be_read(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_message_template(tmp_path / name, ("Prompt",))
    with pytest.raises(ValueError, match="cannot read"):
        read_message_template(tmp_path / "nothing.py", ("Prompt",))
