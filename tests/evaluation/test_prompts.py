"""Files of prompts: what they ask for, bad lines, and the same images by one process, by several, and after a stop."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers.paths import TESTS
from PIL import Image

from unimm.evaluation.manifest import read_manifest
from unimm.evaluation.prompts import read_prompt_requests, run_prompts
from unimm.evaluation.run import ModelSource
from unimm.evaluation.sharding import RunShard
from unimm.models.registry import load

PROMPTS = [
    {"prompt": "a red circle"},
    {"prompt": "two blue squares", "seed": 7, "n": 2, "id": "squares"},
    {"prompt": "a green star", "size": [32, 64]},
    {"prompt": "make the circle green", "images": "scene.png"},
    {"prompt": "a yellow ring"},
]


class InterruptedDrawingError(Exception):
    """Stands for whatever stops a process."""


@pytest.fixture(scope="module")
def nano():
    return load("bagel-nano")


@pytest.fixture
def file(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "scene.png")
    return write(tmp_path / "prompts.jsonl", PROMPTS)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def draw(model, items, out, **options):
    source = ModelSource(name="nano", load=lambda: model, options={"steps": 2})
    return run_prompts(items, source, out, progress=False, **options)


def hashes(out):
    return {row["id"]: row["sha256"] for row in read_manifest(out / "manifest.jsonl")}


def test_what_a_file_asks_for(file):
    items = read_prompt_requests(file, seed=10)
    assert [(item.id, item.seed) for item in items] == [
        ("00001", 10), ("squares-1", 7), ("squares-2", 8), ("00003", 13), ("00004", 14), ("00005", 15),
    ]  # fmt: skip
    assert items[3].size == (32, 64) and items[4].images == (file.parent / "scene.png",)


def test_a_text_file_holds_a_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes('a red circle\r\n\n{"not": "JSON"} here\n'.encode("utf-8-sig"))
    items = read_prompt_requests(path, n=2)
    assert [item.prompt for item in items] == ["a red circle"] * 2 + ['{"not": "JSON"} here'] * 2
    assert [item.id for item in items] == ["00001-1", "00001-2", "00003-1", "00003-2"]
    assert [item.seed for item in items] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no JSON"),
        ('"a red circle"', "expected an object with a prompt"),
        ('{"text": "a"}', "expected an object with a prompt"),
        ('{"prompt": 3}', "got the prompt 3: expected a text"),
        ('{"prompt": ["a"]}', "expected a text"),
        ('{"prompt": " "}', "got an empty prompt"),
        ('{"prompt": "a", "sead": 1}', "got the key 'sead': expected some of prompt, id, seed"),
        ('{"prompt": "a", "seed": -1}', "got seed -1"),
        ('{"prompt": "a", "seed": [1]}', "expected one number"),
        ('{"prompt": "a", "seed": "one"}', "got seed 'one'"),
        ('{"prompt": "a", "n": 0}', "got n 0"),
        ('{"prompt": "a", "size": 64}', "got size 64"),
        ('{"prompt": "a", "think": "yes"}', "think"),
        ('{"prompt": "a", "images": "none.png"}', "no image at .*none.png"),
        ('{"prompt": "a", "images": [3]}', "expected a path"),
        ('{"prompt": "a", "id": 3}', "got the id 3: expected a text"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "a red circle"}}\n{line}\n')
    with pytest.raises(ValueError, match=f"prompts.jsonl has 1 bad lines: line 2: .*{message}"):
        read_prompt_requests(path)


def test_all_bad_lines_are_found_at_once(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("{\n" * 7)
    with pytest.raises(ValueError, match="has 7 bad lines: line 1: .*line 5: .*; and 2 more"):
        read_prompt_requests(path)


def test_files_that_are_no_prompts(tmp_path):
    for name, contents, message in [
        ("a.csv", b"", r"expected a \.txt file"),
        ("a.txt", b"\xff", "save it in UTF-8"),
        ("b.txt", b"\n", "has no items"),
        ("c.jsonl", b'{"prompt": "a", "id": "../x"}', "got the id '../x'"),
        ("d.jsonl", b'{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}', "got the id x twice"),
    ]:
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(ValueError, match=message):
            read_prompt_requests(tmp_path / name)
    with pytest.raises(ValueError, match="no file"):
        read_prompt_requests(tmp_path / "none.txt")


def test_images_are_those_of_generate(nano, file, tmp_path):
    """Line by line, to the bit in batches of one and but for rounding in larger ones; in the file's order in the
    manifest."""
    items = read_prompt_requests(file)
    draw(nano, items, tmp_path / "batches", batch_size=4)
    state = draw(nano, items, tmp_path / "out", batch_size=1)
    rows = read_manifest(state.manifest)
    assert [row["id"] for row in rows] == [item.id for item in items]
    assert [row["line"] for row in rows] == [1, 2, 2, 3, 4, 5]
    for item, row in zip(items, rows, strict=True):
        (alone,) = nano.generate(
            item.prompt, images=item.load_images() or None, size=item.size, seed=item.seed, steps=2
        ).images
        with Image.open(tmp_path / "out" / row["image"]) as drawn:
            assert drawn.tobytes() == alone.tobytes()
        with Image.open(tmp_path / "batches" / row["image"]) as drawn:
            assert np.abs(np.asarray(drawn, int) - np.asarray(alone, int)).max() <= 1


def test_a_stopped_run_goes_on_with_the_same_images(nano, file, tmp_path):
    """Stopped within a batch as one of two processes, gone on with as one of three."""
    items = read_prompt_requests(file)
    draw(nano, items, tmp_path / "whole", batch_size=2)

    class Stopped:
        calls = 0

        def generate(self, *args, **options):
            Stopped.calls += 1
            if Stopped.calls == 2:
                raise InterruptedDrawingError
            return nano.generate(*args, **options)

    with pytest.raises(InterruptedDrawingError):
        draw(Stopped(), items, tmp_path / "out", batch_size=2, shard=RunShard(index=0, count=2))
    (tmp_path / "out" / "images" / "squares-1.png").unlink(missing_ok=True)
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    (tmp_path / "out" / "run.json").write_text(json.dumps({key: run[key] for key in run if key != "weights"}))
    states = [
        draw(nano, items, tmp_path / "out", batch_size=2, shard=RunShard(index=index, count=3)) for index in range(3)
    ]
    assert [state.manifest is None for state in states] == [True, True, False]
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_other_prompts_in_the_same_folder_are_refused(nano, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n")
    draw(nano, read_prompt_requests(path), tmp_path / "out")
    with pytest.raises(ValueError, match="holds another run: prompts"):
        draw(nano, read_prompt_requests(path, seed=1), tmp_path / "out")


def test_what_the_model_refuses_names_the_line(nano, tmp_path):
    path = write(tmp_path / "prompts.jsonl", [{"prompt": "a red circle", "size": [65, 64]}])
    with pytest.raises(ValueError, match=r"item 00001: cannot generate .*65, 64"):
        draw(nano, read_prompt_requests(path), tmp_path / "out")


@pytest.mark.slow
def test_two_processes_of_torchrun_draw_what_one_does(nano, file, tmp_path):
    """Through the command; with paths that are relative, as a user has them."""
    draw(nano, read_prompt_requests(file), tmp_path / "one", batch_size=2)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "unimm", "generate", "--prompts", file.name, "--steps", "2", "--batch", "2", "--out", "two"]
    ran = subprocess.run([*torchrun, *command], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["two/manifest.jsonl"]
    assert len(list((tmp_path / "two").glob("outputs-*.jsonl"))) == 2
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.nightly
def test_two_processes_of_torchrun_draw_each_image_together(nano, tmp_path):
    """A file of prompts, and one prompt alone: written once, by the first process, but for rounding as one process draws
    it. What the model refuses ends both."""
    path = write(tmp_path / "prompts.jsonl", PROMPTS[:3])
    draw(nano, read_prompt_requests(path), tmp_path / "one", batch_size=2)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    base = [*torchrun, "-m", "unimm", "generate", "--steps", "2", "--tensor-parallel"]

    def run(*options):
        return subprocess.run([*base, *options], check=False, cwd=tmp_path, env=env, capture_output=True, text=True)

    ran = run("--prompts", path.name, "--batch", "2", "--out", "two")
    assert ran.stdout.split() == ["two/manifest.jsonl"]
    one, two = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two"))
    assert one["weights"] == two["weights"]
    for row in read_manifest(tmp_path / "two" / "manifest.jsonl"):
        with Image.open(tmp_path / "two" / row["image"]) as ours, Image.open(tmp_path / "one" / row["image"]) as theirs:
            assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1
    assert run("a red circle", "--out", "three.png").stdout.split() == ["three.png"]
    refused = run("--prompts", write(tmp_path / "bad.jsonl", [{"prompt": "a", "size": [65, 64]}]).name, "--out", "bad")
    assert refused.returncode and refused.stderr.count("error: item 00001: cannot generate") == 1
