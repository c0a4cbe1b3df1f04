"""The experiments' pages: each has the tables that its code makes of its JSON, its figure, and commands that are taken."""

import inspect
import json
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest

import experiments

FOLDER = Path(experiments.__file__).parent
ROOT = FOLDER.parent
STUDIES = sorted(path.parent.name for path in FOLDER.glob("*/run.py"))
COMMAND = re.compile(r"python -m experiments\.(\w+)((?: [\w./-]+)*)")
PAGES = sorted([*FOLDER.glob("*/*.md"), *FOLDER.glob("*/*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "CHANGELOG.md"])


def commands():
    """Every command of an experiment that a page or a docstring names: where, which, and its arguments."""
    for page in PAGES:
        for found in COMMAND.finditer(page.read_text(encoding="utf-8")):
            yield str(page.relative_to(ROOT)), found[1], shlex.split(found[2])


def test_every_experiment_has_a_page_and_its_command():
    named = {(place, name) for place, name, arguments in commands() if arguments}
    for name in STUDIES:
        assert (f"experiments/{name}/{name}.md", name) in named and (f"experiments/{name}/run.py", name) in named


@pytest.mark.parametrize("name", STUDIES)
def test_the_page_has_the_table_of_its_json(name):
    kept = json.loads((FOLDER / name / f"{name}.json").read_text(encoding="utf-8"))
    table = import_module(f"experiments.{name}.run").results_table(kept)
    page = (FOLDER / name / f"{name}.md").read_text(encoding="utf-8")
    assert table in page and f"]({name}.png)" in page
    figures = re.findall(r"]\((\w+\.png)\)", page)
    assert all((FOLDER / name / figure).stat().st_size > 1000 for figure in figures)


@pytest.mark.parametrize("command", list(commands()), ids=lambda command: f"{command[0]}-{command[1]}")
def test_commands_are_taken(command, tmp_path, monkeypatch, capsys):
    _, name, arguments = command
    if not arguments:
        assert name in STUDIES
        return
    module = import_module(f"experiments.{name}.run")
    taken = inspect.signature(module.study)

    def study(**options):
        taken.bind(**options)
        (tmp_path / f"{name}.md").write_text("the table")

    assert arguments[0] == "OUT"
    monkeypatch.setattr(module, "study", study)
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path), *arguments[1:]])
    module.main()
    assert capsys.readouterr().out == "the table"


@pytest.mark.parametrize("name", STUDIES)
def test_the_settings_of_the_page_are_those_of_its_json(name):
    """What the first command of a page gives is what its results say they were made with."""
    _, _, arguments = next(found for found in commands() if found[0] == f"experiments/{name}/{name}.md")
    made = json.loads((FOLDER / name / f"{name}.json").read_text(encoding="utf-8"))["made"]
    options = {
        words[0].replace("-", "_"): words[1:] for words in map(str.split, " ".join(arguments[1:]).split("--")[1:])
    }
    for option, values in options.items():
        if option in made:
            kept = made[option] if isinstance(made[option], list) else [made[option]]
            assert values == [str(one) for one in kept], option
    date = re.search(r"20\d\d-\d\d-\d\d", (FOLDER / name / f"{name}.md").read_text(encoding="utf-8"))
    assert date[0] == made["date"]
