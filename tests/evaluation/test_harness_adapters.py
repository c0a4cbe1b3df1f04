"""Adapters for the harnesses of others: what they ask arrives at the model; lmms-eval, the real one, runs a toy task."""

import json
from functools import partial

import numpy as np
import pytest
from PIL import Image

from unimm.data.shapes import example
from unimm.evaluation.adapters.harness_model import HarnessModel, read_visuals, split_message
from unimm.generation.text_sampling import TextSampling

TASK = """
task: toy_colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function toy.images
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 8, temperature: 0, do_sample: false, until: ["\\n"]}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}]
"""
FUNCTIONS = """
from PIL import Image

def images(row):
    return [Image.open(row["path"])]
"""


@pytest.fixture(scope="module")
def harness():
    return HarnessModel("bagel-nano", dtype="float32", device="cpu", max_tokens=12)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Questions with the paths of their images."""
    folder = tmp_path_factory.mktemp("asked")
    rows = []
    for i in range(4):
        one = example("answer.colour", i, seed=5, split="test")
        path = folder / f"{i}.png"
        Image.fromarray(one.images[0]).save(path)
        rows.append({"path": str(path), "question": one.prompt, "answer": one.answer})
    return rows


def test_a_message_of_vlmevalkit(harness, asked):
    """As its documentation has them: [{type: image, value: PATH}, {type: text, value: ...}]."""
    for row in asked:
        message = [{"type": "image", "value": row["path"]}, {"type": "text", "value": row["question"]}]
        images, text = split_message(message)
        assert text == row["question"] and images[0].size == (64, 64)
        (answer,) = harness.answer([images], [text], harness.sampling({}))
        assert answer == row["answer"]
    texts = [{"type": "text", "value": "a"}, {"type": "text", "value": "b"}]
    assert split_message(texts) == ([], "a\nb")
    with pytest.raises(ValueError, match="got a part of type 'video'"):
        split_message([{"type": "video", "value": "a.mp4"}])


def test_the_class_for_vlmevalkit(asked):
    pytest.importorskip("vlmeval", reason="VLMEvalKit is not on PyPI: install it from its repository")
    from unimm.evaluation.adapters.vlmevalkit_model import VLMEvalKitModel

    model = VLMEvalKitModel("bagel-nano", max_tokens=8)
    message = [{"type": "image", "value": asked[0]["path"]}, {"type": "text", "value": asked[0]["question"]}]
    assert model.generate(message) == asked[0]["answer"]


def test_likelihoods_of_choices(harness, asked):
    colours = sorted({row["answer"] for row in asked} | {"red", "green", "blue"})
    for row in asked:
        found = harness.likelihoods(
            read_visuals([row["path"]]), "<image>" + row["question"], [" " + c for c in colours]
        )
        assert colours[min(range(len(colours)), key=lambda i: found[i].loss)] == row["answer"]
        assert [one.is_greedy for one in found] == [colour == row["answer"] for colour in colours]


def test_options_of_a_task(harness):
    plain = {"until": ["\n\n", ""], "max_new_tokens": 1024, "temperature": 0, "top_p": 0, "num_beams": 1}
    assert harness.sampling(plain) == TextSampling(max_tokens=12, stop=("\n\n",))
    sampled = {"until": "end", "temperature": 0.7, "top_p": 0.9, "do_sample": True, "max_new_tokens": 3}
    assert harness.sampling(sampled) == TextSampling(temperature=0.7, top_p=0.9, max_tokens=3, stop=("end",))
    greedy = {"do_sample": False, "temperature": 1.0, "image_aspect_ratio": "pad", "max_new_tokens": None}
    assert harness.sampling(greedy) == TextSampling(max_tokens=12)
    with pytest.raises(ValueError, match="got num_beams 5"):
        harness.sampling({"num_beams": 5})
    with pytest.raises(ValueError, match="got the options penalty_alpha"):
        harness.sampling({"penalty_alpha": 1})


def test_images_of_a_document(asked):
    grey = Image.new("L", (3, 2), 7)
    found = read_visuals([grey, asked[0]["path"]])
    assert [one.mode for one in found] == ["RGB", "RGB"] and np.asarray(found[0]).max() == 7
    assert read_visuals(None) == []
    with pytest.raises(ValueError, match="got dict for an image"):
        read_visuals([{"array": [0.0]}])


# ---- the real lmms-eval

WHY = "lmms-eval is in an extra of its own, since it pins old versions: pip install 'unimm[lmms-eval]'"


@pytest.mark.filterwarnings("ignore")
def test_lmms_eval_runs_a_toy_task(asked, tmp_path, monkeypatch):
    """By the name `unimm`, as `python -m lmms_eval --model unimm` finds it; the score is that of the same questions
    asked of the model."""
    pytest.importorskip("lmms_eval", reason=WHY)
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    from unimm.evaluation.adapters.lmms_eval_model import MANIFEST

    MODEL_REGISTRY_V2.register_manifest(MANIFEST, overwrite=True)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.json"
    # one of four answers is made wrong
    made = [asked[0] | {"answer": "no colour"}, *asked[1:]]
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "toy.yaml").write_text(TASK.format(rows=rows))
    (folder / "toy.py").write_text(FUNCTIONS)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(
        model="unimm",
        model_args="pretrained=bagel-nano,max_tokens=12",
        batch_size=3,
        tasks=["toy_colours"],
        task_manager=manager,
        bootstrap_iters=0,
    )
    assert found["results"]["toy_colours"]["exact_match,none"] == 0.75


@pytest.mark.filterwarnings("ignore")
def test_rounds_and_options_of_lmms_eval(asked, monkeypatch):
    pytest.importorskip("lmms_eval", reason=WHY)
    from lmms_eval.api.instance import Instance

    from unimm.evaluation.adapters.lmms_eval_model import LMMsEvalModel

    model = LMMsEvalModel(pretrained="bagel-nano", max_tokens=12)
    model.task_dict = {"toy": {"test": asked}}
    images = lambda row: [Image.open(row["path"])]  # noqa: E731
    seen = []

    def next_text(row, *, previous_output, round_idx, previous_round_info, extra):
        """Two rounds; the second asks about another image."""
        seen.append((list(previous_output), round_idx, previous_round_info, extra))
        is_over = round_idx == 2
        return [Image.open(asked[1]["path"])], asked[1]["question"], is_over, previous_output, f"after {round_idx}"

    metadata = {"task": "toy", "doc_id": 0, "repeats": 1}
    arguments = (asked[0]["question"], {}, images, partial(next_text, extra=7), 0, "toy", "test")
    request = Instance("generate_until_multi_round", arguments, 0, metadata)
    first, second = asked[0]["answer"], asked[1]["answer"]
    assert model.generate_until_multi_round([request]) == [[first, second]]
    assert seen == [([first], 1, None, 7), ([first, second], 2, "after 1", 7)]
    # requests of different options are asked apart, and answered in their order
    requests = [
        Instance("generate_until", (row["question"], options, images, i, "toy", "test"), i, metadata)
        for i, (row, options) in enumerate(zip(asked, ({}, {"max_new_tokens": 6}, {}, {"until": ["zz"]}), strict=True))
    ]
    assert model.generate_until(requests) == [row["answer"] for row in asked]
    # choices of one question, as a text or as what finds it in the document, with the harness's space ahead; the answer
    # of the least loss is the model's, and it alone is the greedy one
    choices = ["no colour", "blue thing", " " + asked[2]["answer"], lambda row: row["answer"]]
    given = [(asked[2]["question"], choice, images, 2, "toy", "test") for choice in choices]
    *wrong, right, same = model.loglikelihood([Instance("loglikelihood", one, 0, metadata) for one in given])
    assert right == same and right[1] and all(loss > right[0] and not is_greedy for loss, is_greedy in wrong)
    with pytest.raises(ValueError, match="got batch_size 'auto'"):
        LMMsEvalModel(pretrained="bagel-nano", batch_size="auto")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="got WORLD_SIZE 2"):
        LMMsEvalModel(pretrained="bagel-nano")
