"""The ablation of decoupled encoders: what each experiment looks through, learns and trains, and the command that runs
all."""

import dataclasses
import json

import pytest
import torch
import yaml
from helpers.janus_recipes import BRANCH, CODES, parts, small, text_model
from PIL import Image
from safetensors.torch import load_file

from experiments.decoupling import run as script
from experiments.decoupling.task import EXPERIMENTS
from unimm import Janus
from unimm.tokenizers.semantic_vq import SemanticVQ
from unimm.training.config import read_recipe
from unimm.training.losses import mean_losses
from unimm.training.tasks import janus
from unimm.training.tasks.base import build_task
from unimm.training.trainer import Trainer, train

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


@pytest.fixture
def recipe_file(folder, tmp_path):
    """The recipe with small numbers, as a file."""
    numbers = dataclasses.asdict(small(RECIPE, folder, batch_size=15))
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(numbers))))
    return path


def run_study(out, recipe, **changes):
    given = {"seeds": (3,), "minutes": None, "steps": 2, "n": 1, "device": "cpu", "workers": 0}
    return script.study(out, recipe, **(given | changes))


def test_one_command_for_all(recipe_file, tmp_path):
    out = tmp_path / "out"
    run_study(out, recipe_file)
    result = json.loads((out / "decoupling.json").read_text())
    arms = result["arms"]
    assert list(arms) == list(EXPERIMENTS) and all(one["steps"] == 2 for one in arms.values())
    assert result["made"]["budget"] == "2 steps each" and result["made"]["seeds"] == [3]
    learned = {name: {task.split(".")[0] for task in one["scores"] if "." in task} for name, one in arms.items()}
    both = {"answer", "draw"}
    assert learned == {"A": both, "B": both, "D": both, "E": {"answer"}, "F": {"draw"}}
    # four tasks of each kind that is learned, and all of them together
    assert all(len(one["scores"]) == 5 * len(learned[name]) for name, one in arms.items())
    assert arms["D"]["scores"]["all answers"]["items"]["n"] == 4
    # 6 tasks of 15 draw, each once; E and F fill the batch with the others
    seen = {name: (one["understood"], one["generated"]) for name, one in arms.items()}
    assert seen == {"A": (18, 12), "B": (18, 12), "D": (18, 12), "E": (30, 0), "F": (0, 30)}
    assert all(set(one["losses"]) == learned[name] for name, one in arms.items())
    table = (out / "decoupling.md").read_text()
    assert table == script.results_table(result)
    assert all(f"| {name} | {one.description} | 2 |" in table for name, one in EXPERIMENTS.items())
    assert (out / "decoupling.png").stat().st_size > 1000
    # what is scored already is not made again
    before = {path: path.stat().st_mtime_ns for path in out.glob("*-3.json")}
    run_study(out, recipe_file)
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*-3.json")} and len(before) == 5
    # and stands for no other question
    with pytest.raises(ValueError, match="was made under"):
        run_study(out, recipe_file, n=2)


def test_a_table_of_several_seeds_has_their_means():
    runs = [
        {"steps": 100 + 10 * seed, "understood": 50, "generated": 0, "losses": {"answer": 0.5 + seed}}
        | {"right": {task: [1] * (2 + seed) + [0] * (8 - seed) for task in script.SCORED["answer"]}}
        for seed in (0, 1)
    ]
    trainings, scores = script.results_table({"arms": {"E": script.summarize_arm(runs)}}).split("\n\n")
    # Student's interval of 0.5 and 1.5: 1 + 12.706 / 2
    assert trainings.splitlines()[-1] == "| E | D, understanding only | 105 | 50 | 0 | 1.000 (-5.353 - 7.353) |  |"
    items, seeds = scores.splitlines()[-2:]
    # 5 of 20 a task, 20 of 80 together; Wilson's intervals
    one, all_answers = "0.250 (0.112 - 0.469), n 20", "0.250 (0.168 - 0.355), n 80"
    assert items == f"| **E**, by items | {' | '.join([one] * 4)} | {all_answers} |{'  |' * 5}"
    # of 0.2 and 0.3: 0.25 + 12.706 * 0.05
    assert seeds == f"| **E**, by seeds | {' | '.join(['0.250 (-0.385 - 0.885)'] * 5)} |{'  |' * 5}"


def test_a_run_that_was_stopped_is_not_scored(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "train", lambda *args, **options: 4)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 4"):
        run_study(tmp_path / "out", recipe_file, minutes=15.0, steps=9)
    assert not list((tmp_path / "out").glob("*.json"))


def test_a_stopped_run_of_steps_goes_on_and_one_of_minutes_begins_anew(recipe_file, tmp_path, monkeypatch):
    calls = []

    def stopped(task, recipe, folder, *, resume, **options):
        calls.append((resume, (folder / "log.jsonl").is_file()))
        return 1

    folder = tmp_path / "A-3"
    train(build_task(experiment_a(recipe_file)), experiment_a(recipe_file), folder, workers=0)
    monkeypatch.setattr(script, "train", stopped)
    for minutes in (None, 15.0):
        with pytest.raises(KeyboardInterrupt):
            run_study(tmp_path, recipe_file, steps=9, minutes=minutes)
    assert calls == [(True, True), (False, False)]


def experiment_a(path):
    recipe = read_recipe(path)
    return dataclasses.replace(recipe, steps=1, options={**recipe.options, "experiment": "A"})
