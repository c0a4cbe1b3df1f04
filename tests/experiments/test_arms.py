"""What the small experiments are made of: conditions that are left out, weights of edits, experts that share, texts
alone; and results that are kept."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from experiments import common
from experiments.edit_conditions.run import FORMS, PartialBagel
from experiments.edit_weights.run import reweighted
from experiments.expert_variants.run import LLM, VARIANTS, build_variant
from experiments.stars_arms.run import share_stages
from experiments.stars_arms.words import OPTIONS, WordsDataset
from unimm import Bagel
from unimm.data.shapes import example
from unimm.training.tasks.edit_weights import AREA_FUNCTIONS, EditWeights


@pytest.fixture(scope="module")
def released():
    return Bagel.from_pretrained("bagel-nano")


def test_forms_of_an_image_are_left_out():
    model = PartialBagel.from_pretrained("bagel-nano")
    one = example("edit.remove", 0, seed=3)
    images = {}
    for name, forms in FORMS.items():
        model.forms = forms
        parts, _ = model.image_parts(Image.fromarray(one.images[0]), noise=None, latents=True)
        assert [part.kind for part in parts if part.segment.length] == list(forms)
        # a form that is left out takes its position, as in training
        assert sum(part.segment.advance for part in parts) == 2
        images[name] = model.generate(one.prompt, images=Image.fromarray(one.images[0]), steps=1).image.tobytes()
    assert len(set(images.values())) == 3


def test_weights_of_other_functions_are_those_of_the_task():
    one = example("edit.recolour", 4, seed=3)
    linear = EditWeights(function="linear")(one.images, one.target)
    assert linear.max() > 1
    for name in AREA_FUNCTIONS:
        torch.testing.assert_close(reweighted(linear, name), EditWeights(function=name)(one.images, one.target))
    assert reweighted(linear, "even").eq(1).all()


def test_experts_share_what_their_variant_says(released):
    models = {variant: build_variant(variant, released, seed=0) for variant in VARIANTS}
    experts = {name: model.decoder.blocks[0].experts for name, model in models.items()}
    assert experts["dense"]["und"] is experts["dense"]["gen"]
    assert experts["MoE"]["und"].q is experts["MoE"]["gen"].q
    assert experts["MoE"]["und"].mlp is not experts["MoE"]["gen"].mlp
    assert experts["MoT"]["und"].q is not experts["MoT"]["gen"].q
    # all begin as one function: the second set of weights is a copy
    for und, gen in ((one["und"].state_dict(), one["gen"].state_dict()) for one in experts.values()):
        assert all(torch.equal(x, gen[name]) for name, x in und.items())
    n = {name: sum(p.numel() for p in model.parameters() if p.requires_grad) for name, model in models.items()}
    dim, inner, layers = LLM["hidden_size"], LLM["intermediate_size"], LLM["num_hidden_layers"]
    # a feed-forward has three matrices; the norms behind the last block are doubled with it
    assert n["MoE"] - n["dense"] == layers * 3 * dim * inner + dim
    assert n["MoT"] > n["MoE"]


def test_reasoning_about_pairs_is_taught_in_words_alone(released):
    dataset = WordsDataset(
        options=OPTIONS,
        config=released.config,
        processor=released.processor,
        tokenizer=released.text_tokenizer,
        batch_size=8,
        seed=1,
        n_words=4,
    )
    a, b = dataset.words(0)[:2]
    assert a.prompt != b.prompt and a.answer.startswith("<think>") and a.answer != b.answer
    batch = dataset(0)
    # pairs add no image: as many as there are samples that draw
    assert len(batch.images) == 4 and (batch.text_kinds >= 0).all()
    again = replace(dataset, seed=1)(0)
    assert torch.equal(batch.pack.ids, again.pack.ids) and torch.equal(batch.noise, again.noise)


def test_a_result_is_kept_for_its_settings(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"value": 3}

    first = common.kept_result(tmp_path / "a.json", {"seed": 1}, make)
    assert first["value"] == 3 and common.kept_result(tmp_path / "a.json", {"seed": 1}, make) == first
    assert len(calls) == 1
    with pytest.raises(ValueError, match="was made under"):
        common.kept_result(tmp_path / "a.json", {"seed": 2}, make)


def test_arms_are_kept_one_a_seed(tmp_path):
    calls = []

    def run_arm(arm, *, seed):
        calls.append((arm, seed))
        return {"right": [int(arm == "tuned on latents"), seed % 2]}

    arms = ("released, both", "tuned on latents")
    found = common.kept_arms(tmp_path, arms, (1, 2), {"n": 2}, run_arm)
    assert calls == [(arm, seed) for seed in (1, 2) for arm in arms]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("released-both-1.json", "released-both-2.json", "tuned-on-latents-1.json", "tuned-on-latents-2.json")
    ]
    assert [one["right"] for one in found["tuned on latents"]] == [[1, 1], [1, 0]]
    again = common.kept_arms(tmp_path, arms, (1, 2, 3), {"n": 2}, run_arm)
    assert calls[4:] == [(arm, 3) for arm in arms] and again["released, both"][:2] == found["released, both"]
    with pytest.raises(ValueError, match="was made under"):
        common.kept_arms(tmp_path, arms, (1,), {"n": 3}, run_arm)


def test_a_score_has_an_interval_over_items_and_one_over_seeds():
    one = common.seeded_score([[1, 0, 0, 0], [1, 1, 1, 0]])
    assert one["items"]["score"] == one["seeds"]["mean"] == 0.5 and one["items"]["n"] == 8
    assert one["seeds"]["values"] == [0.25, 0.75]
    bar = common.Bar.of_seeded_score(one)
    # Wilson's interval of 4 of 8
    assert (bar.low, bar.high) == (pytest.approx(0.215, abs=1e-3), pytest.approx(0.785, abs=1e-3))
    assert bar.dots == [0.25, 0.75]
    items, seeds = common.seeded_rows("arm", [one, None])
    assert items == ["arm, by items", "0.500 (0.215 - 0.785), n 8", ""]
    # 12.7062 is the 97.5 % point of one degree of freedom; half the seeds' distance is their mean's deviation
    assert seeds == ["arm, by seeds", f"0.500 ({0.5 - 12.7062 * 0.25:.3f} - {0.5 + 12.7062 * 0.25:.3f})", ""]
    assert common.seeded_rows("arm", [common.seeded_score([[1, 0]]), None])[1:] == []


def test_arms_of_other_verifiers_take_over_what_is_the_same(tmp_path):
    for name in ("math1-self", "math1-exact"):
        for stage in ("before", "round1-math1/generated"):
            (tmp_path / name / stage).mkdir(parents=True)
            (tmp_path / name / stage / "file").write_text(name)
    # of an arm that is not finished nothing is taken
    (tmp_path / "math1-exact.json").write_text("{}")
    out = tmp_path / "math1-none"
    share_stages(tmp_path, out, "math1")
    assert {path.read_text() for path in out.rglob("file")} == {"math1-exact"}
    assert sorted(path.parent.name for path in out.rglob("file")) == ["before", "generated"]
