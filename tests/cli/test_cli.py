"""The command `unimm`: what it prints, what it writes, how it ends, and that its options do not grow by accident."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
import yaml
from helpers.paths import GOLDEN
from PIL import Image
from typer.testing import CliRunner

import unimm
from unimm.cli.demo import caption_grid
from unimm.cli.generate import parse_height_width
from unimm.cli.main import app
from unimm.cli.releases import format_count
from unimm.evaluation.benchmarks.shapes import TASKS

RECIPES = Path(unimm.__file__).parent / "training" / "recipes"
OPTIONS = {
    "demo": "out model seed",
    "generate": "prompt prompts image think model seed steps size n out batch device dtype quantize offload tensor_parallel",
    "understand": "image question stream model device dtype quantize offload",
    "train": "recipe out device resume init workers hours set_",
    "plan": "name train gpus memory size batch dtype device set_ as_json",
    "eval": "benchmark model items labels n seed judge think out shard as_json tasks world judge_prompts judge_model "
    "judge_workers images steps guidance size batch compare device dtype quantize offload",
    "app": "model host port no_auth device dtype quantize offload",
    "serve": "model host port device dtype quantize offload threads api_key_file api_keys no_auth allow_remote_images "
    "max_running max_waiting memory_mb timeout drain",
    "stars": "recipe out device workers set_ as_json",
    "data": "",
    "releases": "as_json",
    "fetch": "name revision offline as_json",
    "convert": "source out layout dtype max_shard_size",
}
DATA_OPTIONS = {
    "check": "path format tokenizer columns images max_tokens max_broken limit as_json",
    "knowledge": "out n reasoning world seed",
    "unisandbox": "out n seed",
}


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def fine(*args):
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result


def fails(*args):
    """The one line that tells a user what to put right."""
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr
    return lines[0]


@pytest.fixture
def scene(tmp_path):
    path = tmp_path / "scene.png"
    fine("generate", "a red circle left of a blue square", "--out", path)
    return path


def test_help():
    shown = fine("--help").stdout
    assert all(command in shown for command in OPTIONS)
    assert all(fine(command, "--help").stdout for command in OPTIONS)


def test_options_are_those_pinned_here():
    commands = typer.main.get_command(app).commands
    for found, pinned in ((commands, OPTIONS), (commands["data"].commands, DATA_OPTIONS)):
        assert {name: " ".join(p.name for p in command.params) for name, command in found.items()} == pinned


def test_help_does_not_import_torch():
    code = "import sys, unimm.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("given", "found"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_without_spinning(given, found):
    """Set before torch is imported, since libgomp reads it once, and only where the user has not set it."""
    code = (
        "import os, sys\n"
        "import unimm.cli.main as main\n"
        "main.app = lambda: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)\n"
        "main.main()"
    )
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    env |= {} if given is None else {"OMP_WAIT_POLICY": given}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert ran.stdout.split() == [found, "False"]


def test_python_m_unimm():
    ran = subprocess.run([sys.executable, "-m", "unimm", "releases"], capture_output=True, text=True, check=True)
    assert "bagel-nano" in ran.stdout


@pytest.mark.parametrize("device", ["gpu", "auto", "cuda:99", "cuda:x", ""])
def test_a_device_that_is_not_there(tmp_path, device):
    for command in (("generate", "a red circle", "--steps", 1), ("train", "bagel-nano", tmp_path / "run")):
        out = ("--out", tmp_path / "a.png") if command[0] == "generate" else ()
        assert "got device" in fails(*command, *out, "--device", device)
    assert not list(tmp_path.iterdir())


def test_releases():
    shown = "".join(fine("releases").stdout.split())
    assert "bagel-nano" in shown and "bundled" in shown and "Apache-2.0" in shown and "14.7G" in shown
    rows = {row.name: row for row in unimm.releases()}
    assert rows["bagel-nano"].source == "bundled" and rows["bagel-nano"].commercial
    assert (
        not rows["LanguageBind/UniWorld-V1"].commercial and "non-commercial" in rows["LanguageBind/UniWorld-V1"].licence
    )
    assert rows["ByteDance-Seed/BAGEL-7B-MoT"].source == "ByteDance-Seed/BAGEL-7B-MoT"


def test_unknown_model():
    line = fails("generate", "a red circle", "--model", "bagel-nanno")
    assert "no model 'bagel-nanno'" in line and "bagel-nano" in line


def test_load_picks_the_class(tmp_path):
    assert isinstance(unimm.load("bagel-nano"), unimm.Bagel)
    assert isinstance(unimm.load(GOLDEN / "bagel" / "dev"), unimm.Bagel)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"model_type 'llama', expected one of Bagel \(model_type 'bagel'\)"):
        unimm.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        unimm.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="no config that says"):
        unimm.load(tmp_path)


def test_generate(scene):
    with Image.open(scene) as image:
        assert image.size == (64, 64)


def test_generate_several_is_generate_one_by_one(tmp_path):
    said = fine("generate", "three green triangles", "-n", 2, "--seed", 5, "--out", tmp_path / "a.png").stdout
    assert said.split() == [str(tmp_path / "a-1.png"), str(tmp_path / "a-2.png")]
    fine("generate", "three green triangles", "--seed", 6, "--out", tmp_path / "b.png")
    with Image.open(tmp_path / "a-2.png") as batched, Image.open(tmp_path / "b.png") as single:
        pairs = zip(batched.tobytes(), single.tobytes(), strict=True)
        # equal to the rounding of float32, which may move a pixel by one level
        assert max(abs(x - y) for x, y in pairs) <= 1


def test_edit(scene, tmp_path):
    out = tmp_path / "edited.png"
    assert fine("generate", "make the circle green", "--image", scene, "--out", out).stdout.strip() == str(out)
    assert out.read_bytes() != scene.read_bytes()


def test_think(tmp_path):
    out = tmp_path / "thought.png"
    text, path = fine("generate", "draw 3 - 2 red circles", "--think", "--out", out).stdout.rstrip().rsplit("\n", 1)
    assert text and path == str(out) and out.exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--size", "64"), "expected HEIGHTxWIDTH"),
        (("--size", "60x64"), "the nearest is"),
        (("--steps", 0), "expected at least 1"),
        (("--seed", -1), "expected 0 or more"),
        (("-n", 0), "expected at least 1"),
        (("--out", "picture.txt"), "image file's suffix"),
        (("--out", "picture.cur"), "image file's suffix"),
        (("--out", "nowhere/out.png"), "no folder nowhere"),
        (("--dtype", "int8"), "got dtype"),
        (("--image", "no.png"), "no.png"),
        (("--quantize", "int2"), "got quantize 'int2': expected one of int8"),
        (("--offload", "cpu"), "expected a GPU"),
        (("--offload", "disk", "--quantize", "int4"), "expected one of them"),
        (("--tensor-parallel",), "got --tensor-parallel in one process"),
        (("--tensor-parallel", "--quantize", "int4"), "expected one of them"),
    ],
)
def test_generate_bad_input(options, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert told in fails("generate", "a red circle", *options)
    assert not list(tmp_path.iterdir())


def test_understand(scene):
    answer = fine("understand", scene, "what colour is the square?").stdout
    assert answer.strip()
    assert fine("understand", scene, "what colour is the square?", "--stream").stdout == answer


def test_understand_bad_input(scene, tmp_path):
    (tmp_path / "broken.png").write_bytes(scene.read_bytes()[:100])
    assert "nothing.png" in fails("understand", tmp_path / "nothing.png", "what is it?")
    assert "broken" in fails("understand", tmp_path / "broken.png", "what is it?")
    assert "empty prompt" in fails("understand", scene, " ")


def test_eval_json():
    tasks = ["draw.one", "answer.count", "edit.add", "reason.math1.think"]
    said = fine("eval", "shapes", "--n", 2, "--seed", 1, "--json", "--tasks", ",".join(tasks)).stdout
    scores = json.loads(said)
    assert said.count("\n") == 1 and list(scores) == tasks
    for score in scores.values():
        assert score.keys() == {"accuracy", "n", "low", "high"}
        assert score["n"] == 2 and 0 <= score["low"] <= score["accuracy"] <= score["high"] <= 1


def test_what_is_generated_says_how_the_model_was_loaded(tmp_path):
    """Files of prompts and benchmarks take what one prompt takes; another way of loading is another run."""
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    out = tmp_path / "drawn"
    drawing = ("generate", "--prompts", tmp_path / "prompts.txt", "--steps", 1, "--out", out)
    fine(*drawing, "--quantize", "fp8")
    run = json.loads((out / "run.json").read_text())
    assert run["quantize"] == "fp8" and len(run["weights"]["sha256"]) == 64
    assert "holds another run: quantize fp8 there, null now" in fails(*drawing)
    scoring = ("eval", "shapes", "--tasks", "answer.shape", "--n", 1, "--out")
    fine(*scoring, tmp_path / "whole", "--offload", "disk")
    fine(*scoring, tmp_path / "rounded", "--quantize", "int4")
    whole, rounded = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "rounded"))
    assert whole["quantize"] is None and rounded["quantize"] == "int4" and whole["weights"] != rounded["weights"]
    assert "got offload 'cpu'" in fails(*scoring, tmp_path / "none", "--offload", "cpu")
    assert not (tmp_path / "none").exists()


def test_eval_table():
    shown = fine("eval", "shapes", "--n", 1, "--tasks", "answer.shape").stdout
    assert "answer.shape" in shown and not any(task in shown for task in TASKS if task != "answer.shape")


def test_eval_keeps_its_outputs_and_compares(tmp_path):
    out, other = tmp_path / "a", tmp_path / "b"
    base = ("eval", "shapes", "--tasks", "answer.shape,draw.one", "--n", 2)
    shown = fine(*base, "--out", out, "--shard", "1/2")
    assert "2 items of other shards are missing" in shown.stderr and not shown.stdout
    assert "saved" in fine(*base, "--out", out, "--shard", "2/2").stdout
    before = (out / "result.json").read_text()
    # all is there: nothing is generated again
    assert "draw.one" in fine(*base, "--out", out).stdout and (out / "result.json").read_text() == before
    assert "another run: seed 1 there, 2 now" in fails(*base, "--seed", 2, "--out", out)
    fine(*base, "--steps", 1, "--out", other)
    compared = json.loads(fine("eval", "--compare", out, other, "--json").stdout)
    assert list(compared) == ["answer.shape", "draw.one", "all"]
    assert compared["draw.one"]["n"] == 2 and compared["answer.shape"]["difference"] == 0
    assert "b - a" in fine("eval", "--compare", out, other / "result.json").stdout
    assert "no result at" in fails("eval", "--compare", out, tmp_path / "c")


def test_eval_unisandbox(tmp_path):
    base = ("eval", "unisandbox", "--tasks", "math1", "--n", 2, "--out", tmp_path / "run")
    result = json.loads(fine(*base, "--json").stdout)
    assert result["scores"]["math1"]["n"] == 2 and result["judge"]["kind"] == "exact"
    assert len(result["run"]["weights"]["sha256"]) == 64 and result["run"]["items"] == "generated, shapes"
    # the same images, by another judge, in process
    again = json.loads(fine(*base, "--json", "--judge", "vlm:bagel-nano").stdout)
    assert again["judge"]["kind"] == "vlm" and again["judge"]["weights"] == result["run"]["weights"]
    assert "vlm:MODEL or openai:URL" in fails("eval", "unisandbox", "--world", "photos")
    assert "not shipped" in fails("eval", "unisandbox", "--world", "photos", "--judge", "vlm:bagel-nano")
    made = fine("data", "unisandbox", tmp_path / "new", "--n", 3).stdout
    assert "math_1.jsonl" in made and "mapping3.jsonl" in made
    assert "no test_reasoning" not in fails("eval", "unisandbox", "--items", tmp_path / "new")


def test_eval_bad_input():
    assert "unknown benchmark 'shape': expected shapes" in fails("eval", "shape")
    assert "draw.one" in fails("eval", "shapes", "--tasks", "draw.on")
    assert "got n 0" in fails("eval", "shapes", "--n", 0)
    assert "got no benchmark" in fails("eval")
    assert "--labels for shapes" in fails("eval", "shapes", "--labels", "corrected")
    assert "JanusFlow has no think" in fails("eval", "shapes", "--model", "janusflow-nano", "--think")
    assert "--judge 'oracle'" in fails("eval", "shapes", "--judge", "oracle")
    assert "--judge vlm for shapes: expected exact" in fails("eval", "shapes", "--judge", "vlm:bagel-nano")
    assert "no --out" in fails("eval", "shapes", "--shard", "1/2")
    for name in ("wise", "geneval", "imgedit"):
        assert f"got no --items for {name}" in fails("eval", name)


def test_train(tmp_path):
    recipe = yaml.safe_load((RECIPES / "bagel-nano-vae.yaml").read_text())
    recipe |= {"steps": 2, "batch_size": 2, "log_every": 1, "precision": "float32"}
    recipe["options"] |= {"measured_scenes": 4}
    path, out = tmp_path / "tiny.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(recipe))
    shown = fine("train", path, out, "--workers", 0)
    assert shown.stdout == "" and "step 2 of 2" in shown.stderr
    assert (out / "release" / "ae.safetensors").exists()
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [1, 2]
    assert "holds a run of 2 steps" in fails("train", path, out, "--workers", 0)


def test_train_bad_input(tmp_path):
    assert "bagel-nano.yaml" in fails("train", "bagel-nanno", tmp_path)
    (tmp_path / "bad.yaml").write_text("stepps: 3")
    assert "did you mean 'steps'" in fails("train", tmp_path / "bad.yaml", tmp_path / "run")
    text = (RECIPES / "bagel-nano-vae.yaml").read_text()
    (tmp_path / "odd.yaml").write_text(text.replace("image_size: 64", "image_size: 48"))
    assert "odd.yaml: image_size in options" in fails("train", tmp_path / "odd.yaml", tmp_path / "run")
    assert "got hours nan" in fails("train", "bagel-nano-vae", tmp_path / "run", "--hours", "nan")
    assert "got workers -1" in fails("train", "bagel-nano-vae", tmp_path / "run", "--workers", -1)
    assert not (tmp_path / "run").exists()


def test_demo(tmp_path):
    began = time.monotonic()
    shown = fine("demo", "--out", tmp_path / "demo.png").stdout
    assert time.monotonic() - began < 60
    assert "what colour is the square?" in shown
    with Image.open(tmp_path / "demo.png") as image:
        assert image.width > 800
    assert [path.name for path in tmp_path.iterdir()] == ["demo.png"]


def test_a_sheet_holds_every_image():
    colours = ["red", "lime", "blue", "yellow", "black"]
    page = caption_grid(
        [(Image.new("RGB", (64, 64), colour), f"this is {colour} " * 20) for colour in colours], columns=2
    )
    found = {colour for _, colour in page.getcolors(maxcolors=10_000)}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 0, 0)} <= found


def test_sizes_and_amounts():
    assert parse_height_width("64x96") == (64, 96)
    assert [format_count(n) for n in (12, 9_515_379, 14_691_079_811)] == ["12", "9.5 M", "14.7 G"]


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_releases_are_written_out(columns):
    shown = CliRunner().invoke(app, ["releases"], env={"COLUMNS": str(columns)}).stdout
    assert "\u2026" not in shown and "Apache-2.0" in shown


def test_plan_predicts_memory_without_data():
    done = fine("plan", "--train", "bagel-nano-finetune", "--device", "cpu", "--json")
    found = json.loads(done.stdout)
    parts = ("weights", "gathered", "optimizers", "average", "gradients", "activations")
    assert found["total"] == sum(found[name] for name in parts)
    assert found["n_trained"] < found["n_parameters"]
