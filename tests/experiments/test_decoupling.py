"""The ablation of decoupled encoders: what each experiment looks through, learns and trains, and the command that runs
all."""

import dataclasses
import json

import pytest
import torch
from helpers.janus_recipes import BRANCH, CODES, parts, small, text_model
from PIL import Image
from safetensors.torch import load_file

from experiments.decoupling import run as script
from experiments.decoupling.task import EXPERIMENTS
from unimm import Janus
from unimm.tokenizers.semantic_vq import SemanticVQ
from unimm.training.losses import mean_losses
from unimm.training.tasks import janus
from unimm.training.tasks.base import build_task
from unimm.training.trainer import Trainer

RECIPE = script.RECIPE


@pytest.fixture(scope="module", autouse=True)
def quick_text_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(janus, "train_tokenizer", text_model)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def objectives(folder):
    return {
        name: build_task(small(RECIPE, folder, options={"experiment": name}, batch_size=15)) for name in EXPERIMENTS
    }


def test_language_models_begin_alike(objectives):
    first, *others = (one.model.decoder.state_dict() for one in objectives.values())
    assert all(torch.equal(other[name], x) for other in others for name, x in first.items())


def test_one_encoder_looks_through_the_codes_it_draws_with(objectives, folder):
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        for name in "AB":
            model = objectives[name].model
            ids = model.vq.encode_ids(image)
            seen = model.vision(image)
            assert len(ids.unique()) > 1
            if name == "A":
                torch.testing.assert_close(seen, model.vq.quantize.lookup(ids, (4, 4)).flatten(2).mT)
            else:
                semantic = SemanticVQ(CODES, BRANCH)
                semantic.vq.load_state_dict(load_file(folder / "vq.safetensors"))
                semantic.branch.load_state_dict(load_file(folder / "semantic.safetensors"))
                torch.testing.assert_close(seen, semantic.features(ids, grid=(4, 4)))
            assert model.vision.width == model.aligner.layers[0].in_features


def test_tasks_are_those_that_an_experiment_learns(objectives):
    for name, objective in objectives.items():
        batch = objective.batch(0)
        understands, draws = bool((batch.text_kinds >= 0).any()), batch.pack.gen_images is not None
        assert (understands, draws) == (name != "F", name != "E")
    # equal tasks, equal images to draw and words to say, whatever looks
    a, b, d = (objectives[name].batch(2) for name in "ABD")
    assert torch.equal(a.images, d.images) and torch.equal(b.images, d.images)
    assert torch.equal(a.text_kinds, d.text_kinds)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_few_steps_of_each(objectives, folder, name, tmp_path):
    objective = objectives[name]
    recipe = dataclasses.replace(small(RECIPE, folder, options={"experiment": name}), warmup_steps=0, lr=3e-3)
    trainer = Trainer(objective, recipe, torch.device("cpu"))
    batch, before = objective.batch(0), {key: x.clone() for key, x in objective.model.state_dict().items()}
    first = {key: loss.item() for key, loss in mean_losses(objective.losses(batch)).items()}
    for _ in range(4):
        trainer.update(batch)
    after = {key: loss.item() for key, loss in mean_losses(objective.losses(batch)).items()}
    assert first and all(after[key] < first[key] for key in first), (first, after)
    moved = {key.split(".")[0] for key, x in objective.model.state_dict().items() if not torch.equal(x, before[key])}
    # what looks is not trained
    draws = {"gen_embed", "gen_aligner", "gen_head"}
    assert moved == {"decoder"} | ({"aligner"} if name != "F" else set()) | (draws if name != "E" else set())
    objective.model.eval()
    assert isinstance(objective.model.understand(Image.new("RGB", (64, 64)), "how many circles are there?"), str)
    objective.save(tmp_path / "release") if EXPERIMENTS[name].encoder is None else objective.save(tmp_path)
    if EXPERIMENTS[name].encoder is None:
        Janus.from_pretrained(tmp_path / "release")
    else:
        assert "decoder.embed.weight" in load_file(tmp_path / "decoupling.safetensors")


def test_what_is_missing_is_named(folder):
    with pytest.raises(ValueError, match=r"got 'C' for experiment.*one of \['A', 'B', 'D', 'E', 'F'\]"):
        build_task(small(RECIPE, folder, options={"experiment": "C"}))
    with pytest.raises(ValueError, match=r"run `unimm train janus-nano-semantic"):
        build_task(small(RECIPE, folder, options={"experiment": "B", "semantic": "/nowhere"}))
    with pytest.raises(ValueError, match="experiment F learns"):
        build_task(small(RECIPE, folder, options={"experiment": "F", "tasks": {"caption": 1}}))


def test_one_command_for_all(folder, tmp_path):
    recipe = small(RECIPE, folder, batch_size=15)
    study = script.Study(
        out=tmp_path,
        recipe=recipe,
        seeds=(3,),
        minutes=None,
        steps=2,
        n_examples=1,
        eval_seed=1,
        device="cpu",
        workers=0,
    )
    script.run(study)
    runs = json.loads((tmp_path / "decoupling.json").read_text())["runs"]
    assert [(one["experiment"], one["seed"], one["steps"]) for one in runs] == [(name, 3, 2) for name in EXPERIMENTS]
    learned = {one["experiment"]: {task.split(".")[0] for task in one["scores"]} for one in runs}
    both = {"answer", "draw"}
    assert learned == {"A": both, "B": both, "D": both, "E": {"answer"}, "F": {"draw"}}
    assert all(len(one["scores"]) == 4 * len(learned[one["experiment"]]) for one in runs)
    # 6 tasks of 15 draw, each once; E and F fill the batch with the others
    seen = {one["experiment"]: (one["understood"], one["generated"]) for one in runs}
    assert seen == {"A": (18, 12), "B": (18, 12), "D": (18, 12), "E": (30, 0), "F": (0, 30)}
    assert all(set(one["losses"]) == learned[one["experiment"]] for one in runs)
    table = (tmp_path / "decoupling.md").read_text()
    assert all(f"| {name} | {one.description} | 3 | 2 |" in table for name, one in EXPERIMENTS.items())
    # what is scored already is not made again
    before = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("scores.json"))]
    script.run(study)
    assert before == [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("scores.json"))] and len(before) == 5
    # and stands for no other question
    with pytest.raises(ValueError, match="was made under"):
        script.run(dataclasses.replace(study, n_examples=2))


def test_a_table_of_several_seeds_has_their_means(folder, tmp_path):
    study = script.Study(
        out=tmp_path,
        recipe=small(RECIPE, folder),
        seeds=(0, 1),
        minutes=15.0,
        steps=None,
        n_examples=10,
        eval_seed=1,
        device="cpu",
    )
    runs = [
        {"experiment": "E", "seed": seed, "steps": 100 + 10 * seed, "understood": 50, "generated": 0}
        | {"losses": {"answer": 0.5 + seed}}
        | {
            "scores": {
                task: {"accuracy": 0.5 + 0.1 * seed, "low": 0.25, "high": 0.75, "n": 10} for task in script.ANSWER_TASKS
            }
        }
        for seed in (0, 1)
    ]
    lines = script.results_table(study, runs).splitlines()
    assert "15 minutes each" in lines[0]
    assert lines[-3].startswith("| E | D, understanding only | 0 | 100 | 50 / 0 | 0.500 / - | 0.50 (0.25-0.75) |")
    means = "0.55 | 0.55 | 0.55 | 0.55 | 0.550 | - | - | - | - | -"
    assert lines[-1] == f"| E | D, understanding only | mean | 105 | 50 / 0 | 1.000 / - | {means} |"
    assert len({line.count("|") for line in lines[5:]}) == 1


def test_a_run_that_was_stopped_is_not_scored(folder, tmp_path, monkeypatch):
    study = script.Study(
        out=tmp_path,
        recipe=small(RECIPE, folder),
        seeds=(0,),
        minutes=15.0,
        steps=9,
        n_examples=1,
        eval_seed=1,
        device="cpu",
        workers=0,
    )
    monkeypatch.setattr(script, "train", lambda *args, **options: 4)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 4"):
        script.run_experiment(study, "D", 0)
    assert not list(tmp_path.rglob("scores.json"))
