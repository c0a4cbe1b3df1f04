"""`unimm data check`: what it counts, which rows it says are broken, and how it ends."""

import json

import pytest
from typer.testing import CliRunner

from examples.data import make
from unimm.cli.data import load_named_tokenizer, parse_columns
from unimm.cli.main import app
from unimm.data.check import LISTED


def check(*args):
    return CliRunner().invoke(app, ["data", "check", *map(str, args)], env={"COLUMNS": "200"})


def report(*args, exit_code=0):
    """The JSON of a check, all that it prints to stdout."""
    result = check(*args, "--json")
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


def test_what_a_dataset_holds(tmp_path):
    found = report(make.make_uniworld(tmp_path), "--tokenizer", "bagel-nano")
    assert found["format"] == "uniworld" and found["n_rows"] == found["n_read"] == 5 and found["n_broken"] == 0
    assert found["kinds"] == {"understand": 2, "edit": 1, "generate": 1, "text": 1}
    assert (found["images"], found["generated_images"]) == (6, 2)
    assert found["widths"] == {"n": 6, "least": 48, "median": 64, "most": 64, "total": 64 * 4 + 48 * 2}
    assert found["common_sizes"] == [[64, 48, 2], [48, 64, 2], [64, 64, 2]]
    tokenizer = load_named_tokenizer("bagel-nano")
    texts = ["make it green", make.caption(2), "What is 2 + 2?", "4"]
    counts = [len(tokenizer.encode(text)) for text in texts]
    assert found["tokens"]["n"] == found["characters"]["n"] == 12
    assert found["tokens"]["most"] >= max(counts) and found["tokens"]["total"] == found["row_tokens"]["total"]
    assert found["row_tokens"]["n"] == 5 and found["characters"]["least"] == 1


def test_every_row_that_is_broken_is_listed_with_its_reason(tmp_path):
    folder = make.make_imagefolder(tmp_path)
    (folder / "2.png").write_bytes(b"rubbish")
    (folder / "3.png").unlink()
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "0.png"}\n')
    found = report(folder, exit_code=1)
    assert found["n_broken"] == 3 and found["n_read"] == 7 and found["kinds"] == {"generate": 4}
    assert [row["row"] for row in found["broken"]] == [2, 3, 6]
    assert all(row["source"].endswith("metadata.jsonl") for row in found["broken"])
    result = check(folder)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert sum(line.startswith("row ") for line in lines) == 3
    assert any(f"row 2 of {folder / 'metadata.jsonl'}: cannot read" in line for line in lines)
    assert check(folder, "--max-broken", 0.4).exit_code == 1
    assert check(folder, "--max-broken", 0.43).exit_code == 0  # 3 of 7
    assert check(folder, "--limit", 2).exit_code == 0


def test_many_broken_rows_are_counted_and_the_first_are_listed(tmp_path):
    rows = [{"parts": [{"text": "a", "loss": True}]}] + [{"parts": 0}] * (LISTED + 5)
    path = make.write_lines(tmp_path / "a.jsonl", rows)
    found = report(path, exit_code=1)
    assert found["n_broken"] == LISTED + 5 and len(found["broken"]) == LISTED
    assert "and 5 more broken rows" in check(path).stdout


def test_rows_over_a_limit_of_tokens(tmp_path):
    path = make.make_pairs(tmp_path)
    most = report(path, "--tokenizer", "bagel-nano")["row_tokens"]["most"]
    assert report(path, "--tokenizer", "bagel-nano", "--max-tokens", most)["n_broken"] == 0
    found = report(path, "--tokenizer", "bagel-nano", "--max-tokens", most - 1, exit_code=1)
    assert f"got {most} tokens of text, expected at most {most - 1}" in found["broken"][0]["reason"]


def test_the_table(tmp_path):
    shown = check(make.make_llava(tmp_path)).stdout
    for words in ("llava.json, format llava", "understand", "64x48", "3, of these 0 to generate", "characters a text"):
        assert words in shown


def test_columns_and_formats_are_named(tmp_path):
    folder = make.make_imagefolder(tmp_path)
    make.write_lines(folder / "metadata.jsonl", [{"file_name": "1.png", "before": "0.png", "order": "greener"}])
    assert report(folder, "--columns", "images=before,text=order")["kinds"] == {"edit": 1}
    assert report(folder / "metadata.jsonl", "--format", "imagefolder", "--columns", "text=order")["kinds"] == {
        "generate": 1
    }
    assert parse_columns("a=b, c=d=e") == {"a": "b", "c": "d=e"}


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["none"], "error: no dataset at none: expected a file or a folder"),
        ([".", "--format", "parq"], "error: unknown format 'parq': expected one of bagel-edit"),
        ([".", "--columns", "a"], "error: got --columns 'a': expected USE=NAME"),
        (["{pairs}", "--columns", "text=a"], "of format pairs: it takes none"),
        (["{pairs}", "--images", "."], "got images for"),
        (["{pairs}", "--tokenizer", "nothing"], "error: no model 'nothing'"),
        (["{pairs}", "--tokenizer", "{folder}"], "error: no tokenizer in"),
        (["{pairs}", "--max-tokens", "3"], "got max_tokens 3 and no tokenizer"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, args, line):
    monkeypatch.chdir(tmp_path)
    path = make.make_pairs(tmp_path)
    result = check(*(arg.format(pairs=path, folder=tmp_path) for arg in args))
    assert result.exit_code == 2 and result.stdout == ""
    errors = [one for one in result.stderr.splitlines() if one.startswith("error: ")]
    assert len(errors) == 1 and line in errors[0]
