"""STARS: whole runs at toy size, stopped at every stage and taken up again, and what a user can get wrong."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from unimm import Bagel
from unimm.cli.main import app
from unimm.data.sources.formats import open_source
from unimm.evaluation.judges.base import ExactJudge, Verdict
from unimm.evaluation.manifest import Manifest
from unimm.self_training import run as stages
from unimm.self_training import selection
from unimm.self_training.config import STARS_RECIPES, read_stars_recipe, round_recipe
from unimm.self_training.report import stars_markdown
from unimm.self_training.run import run_stars
from unimm.training.trainer import Trainer

SMALL = (
    "levels=[math1,mapping1]",
    "questions=2",
    "verifier=none",
    "sampling={batch_size: 2, steps: 2}",
    "evaluation={levels: [math1], n: 2, seed: 1}",
    "train.steps=2",
    "train.batch_size=2",
    "train.save_every=1",
    "train.log_every=1",
    "train.options.timesteps_per_image=1",
)


def recipe(*settings):
    return read_stars_recipe(STARS_RECIPES / "stars-nano.yaml", settings=[*SMALL, *settings])


def run_small(out: Path, *settings):
    return run_stars(recipe(*settings), out, workers=0, progress=False)


def command(*arguments):
    return CliRunner().invoke(app, ["stars", *map(str, arguments)])


def arguments(*settings):
    return [part for one in (*SMALL, *settings) for part in ("--set", one)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two rounds, that nothing happened to, by the command."""
    out = tmp_path_factory.mktemp("stars") / "run"
    torch.set_num_threads(1)
    done = command("stars-nano", out, "--workers", 0, "--json", *arguments())
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads((out / "result.json").read_text())
    return out


def weights(folder: Path):
    return load_file(folder / "ema.safetensors")


def test_a_run_keeps_what_it_says(whole):
    names = {path.name for path in whole.iterdir()}
    assert names == {"stars.json", "before", "round1-math1", "round2-mapping1", "result.json", "result.md"}
    rows = [json.loads(line) for line in (whole / "round2-mapping1" / "selection.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"mapping1/{i}_{side}" for i in (1, 2) for side in "AB"]
    assert all(row["verified"] and row["used"] and row["right"] in (True, False) for row in rows)
    result = json.loads((whole / "result.json").read_text())
    assert [one["selection"]["acceptance_rate"]["value"] for one in result["rounds"]] == [1.0, 1.0]
    assert result["rounds"][1]["training"]["steps"] == 2 and set(result["rounds"][1]["training"]["losses"]) == {"mse"}
    assert (whole / "result.md").read_text() == stars_markdown(result), "the table can be made again from the JSON"
    assert "| on math1, mapping1 | 4 |" in stars_markdown(result)


def test_questions_are_learned_without_reasoning(whole):
    place = whole / "round1-math1"
    outputs = [json.loads(line) for line in (place / "generated" / "outputs.jsonl").read_text().splitlines()]
    assert all(row["think"] and row["text"] for row in outputs), "it reasoned"
    records = list(open_source(place / "accepted").read(range(2)))
    assert [record.kind for record in records] == ["generate"] * 2
    assert [[text.text for text in record.texts] for record in records] == [[row["prompt"]] for row in outputs]
    done = CliRunner().invoke(app, ["data", "check", str(place / "accepted")])
    assert done.exit_code == 0, done.output


def test_each_round_starts_from_the_last(whole):
    bundled = Bagel.from_pretrained("bagel-nano")
    first, second = (
        Bagel.from_pretrained(whole / name / "training" / "release") for name in ("round1-math1", "round2-mapping1")
    )
    name = next(name for name, tensor in bundled.state_dict().items() if "experts.gen" in name and tensor.ndim == 2)
    assert not torch.equal(bundled.state_dict()[name], first.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], second.state_dict()[name])
    runs = [
        json.loads((whole / place / "run.json").read_text())
        for place in ("before/normal", "round1-math1/generated", "round1-math1/normal", "round2-mapping1/generated")
    ]
    hashes = [run["weights"]["sha256"] for run in runs]
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3]


def test_a_run_that_is_done_is_not_done_again(whole, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.png")}
    monkeypatch.setattr(stages, "train", lambda *args, **options: pytest.fail("trained again"))
    moved = whole.rename(whole.with_name("moved"))
    run_small(moved)
    moved.rename(whole)
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*.png")}


class StoppedError(Exception):
    """What stands for a process that is killed."""


def stop_at(monkeypatch, owner, name, nth):
    """Raise at the nth call."""
    calls = []
    real = getattr(owner, name)

    def stopping(*args, **options):
        calls.append(name)
        if len(calls) == nth:
            raise StoppedError(name)
        return real(*args, **options)

    monkeypatch.setattr(owner, name, stopping)


def test_a_run_that_is_stopped_anywhere_ends_as_one_that_is_not(whole, tmp_path):
    """At an evaluation, among the images, before the dataset, in the training, before the second round's evaluation."""
    out = tmp_path / "run"
    stops = [
        (Manifest, "append", 3),
        (Manifest, "append", 8),
        (selection, "_link", 2),
        (Trainer, "update", 2),
        (stages, "describe_training", 1),
        (Trainer, "update", 2),
        (stages, "build_stars_result", 1),
    ]
    for owner, name, nth in stops:
        with pytest.MonkeyPatch.context() as monkeypatch:
            stop_at(monkeypatch, owner, name, nth)
            with pytest.raises(StoppedError, match=name):
                run_small(out)
    assert not list(out.rglob("*.new*"))
    run_small(out)
    assert (out / "result.json").read_text() == (whole / "result.json").read_text()
    for place in ("round1-math1", "round2-mapping1"):
        ours, theirs = (weights(one / place / "training" / "release") for one in (out, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_training_that_is_asked_to_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "train", lambda *args, **options: 1)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 1 of 2; run again"):
        run_small(tmp_path)


def test_the_verifier_decides_what_is_trained_on(tmp_path, monkeypatch):
    """The model's own verdicts, with the exact ones beside them."""
    real = stages.choose_candidates
    seen = []

    def choose(items, **options):
        seen.append(options)
        first = next(iter(options["verified"]))
        return real(items, **(options | {"verified": options["verified"] | {first: 1.0}}))

    monkeypatch.setattr(stages, "choose_candidates", choose)
    result = run_small(tmp_path, "levels=[math2]", "verifier=self", "max_accepted=1")
    picked = result["rounds"][0]["selection"]
    assert picked["used"] == 1 and picked["generated"] == 2 and picked["accuracy"] is not None
    verdicts = {path.name.split("-")[0]: path for path in (tmp_path / "round1-math2/generated/verdicts").iterdir()}
    assert set(verdicts) == {"vlm", "exact"} and set(seen[0]["verified"]) == {"math2/1", "math2/2"}


def test_nothing_is_accepted(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "exact_shapes_judge", lambda: ExactJudge(lambda task: Verdict(score=0.0), "nobody"))
    done = command("stars-nano", tmp_path / "run", "--workers", 0, *arguments("verifier=exact", "levels=[math3]"))
    assert done.exit_code == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "the verifier exact accepted none of 2 images" in line
    assert json.loads((tmp_path / "run/round1-math3/selection.json").read_text())["accepted"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model=janus-nano"], "got janus-nano, which cannot think before it generates"),
        (["verifier=exact", "world=photos"], "got verifier exact for photos, which none can read"),
        (["world=photos"], "got no --judge for unisandbox, generated, photos"),
        (["evaluation.items=somewhere"], "got evaluation.items for the world of shapes"),
        (["verifer=none"], "there is no 'verifer' to set: did you mean 'verifier'?"),
        (["levels=[math4]"], r"got 'math4' for levels\[0\]"),
        (["train.seed=3"], "got seed in train: leave it out"),
        (["train.data={}"], "got data in train"),
        (["train.lora={rank: 4, alpha: 4}"], "got lora in train"),
        (["train.steps=0"], "got 0 for steps in train, expected at least 1"),
        (["train.learning_rate=1"], "got 'learning_rate' in train"),
    ],
)
def test_what_a_user_gets_wrong(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run_small(tmp_path / "run", *settings)
    assert not (tmp_path / "run" / "before").exists(), "nothing was generated"


def test_a_malformed_recipe_is_one_line(tmp_path):
    path = tmp_path / "a.yaml"
    contents = yaml.safe_load((STARS_RECIPES / "stars-nano.yaml").read_text())
    del contents["verifier"]
    path.write_text(yaml.safe_dump(contents))
    done = command(path, tmp_path / "run")
    assert done.exit_code == 2 and f"error: {path} lacks verifier" in done.stderr
    path.write_text("model: [")
    done = command(path, tmp_path / "run")
    assert done.exit_code == 2 and "is no YAML" in done.stderr
    assert "expected a file" in command("stars-giga", tmp_path / "run").stderr


@pytest.mark.parametrize("path", sorted(STARS_RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_bundled_recipes_are_read(path):
    config = read_stars_recipe(path)
    made = round_recipe(config, number=2, model="release", dataset=Path("accepted"))
    assert made.seed == config.seed + 1 and made.model["from_pretrained"] == "release"
    assert made.data.groups["accepted"].paths == ("accepted",)


def test_a_folder_of_another_run(whole, tmp_path):
    with pytest.raises(
        ValueError, match="holds another run, whose recipe differs in seed, verifier: take another folder"
    ):
        run_small(whole, "seed=5", "verifier=exact")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt and no stars\.json: expected an empty folder"):
        run_small(tmp_path)
