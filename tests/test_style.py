"""The house: who may import whom, what no file of the package does, sizes, the quick import, and the README's first lines."""
import ast
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import unimm
from unimm.checkpoint.hub import bundled
from unimm.models.registry import FAMILIES

ROOT = Path(unimm.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
IDS = [str(path.relative_to(ROOT)) for path in FILES]
each_file = pytest.mark.parametrize("path", FILES, ids=IDS)

# a module imports rooms of the floors below its own, and its own room; rooms of one floor do not import each other
FLOORS = (
    ("kernels",),
    ("nn", "sequence", "checkpoint"),
    ("generation", "tokenizers"),
    ("processing",),
    ("encoders", "denoisers"),
    ("vlms",),
    ("models",),
    ("data",),
    ("training", "evaluation", "distributed", "adapters", "quantization", "serving"),
    ("cli",),
)
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
FACE = ("__init__",)  # imports nothing until it is asked
LINES, FUNCTION = 500, 60


def imported(tree: ast.AST) -> list[str]:
    """What a file imports of the package, as parts below unimm."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [name.split(".")[1] if "." in name else "__init__" for name in names if name.split(".")[0] == "unimm"]
    return found


def called(tree: ast.AST) -> list[str]:
    """The names of everything called: print, pickle.load, ..."""
    return [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@each_file
def test_imports_point_down(path):
    here = path.relative_to(ROOT).with_suffix("").parts[0]
    if here in FACE:
        return
    for there in imported(TREES[path]):
        assert there == here or FLOOR[there] < FLOOR[here], f"{here} may not import {there}"


def test_families_do_not_import_each_other():
    families = {family.home.split(":")[0] for family in FAMILIES.values()}
    for path in ROOT.glob("models/*.py"):
        froms = {node.module for node in ast.walk(TREES[path]) if isinstance(node, ast.ImportFrom)}
        assert not froms & (families - {f"unimm.models.{path.stem}"})


@each_file
def test_nothing_of_this_in_the_package(path):
    tree = TREES[path]
    bad = {"print", "hasattr", "eval", "exec", "pickle.load", "pickle.loads", "breakpoint"} & set(called(tree))
    assert not bad
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("everything", "Exception", "BaseException"), f"line {node.lineno} catches {caught}"
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("load_state_dict"):
            assert not any(word.arg == "strict" for word in node.keywords), f"line {node.lineno}: loading is strict"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
            assert safe, f"line {node.lineno}: weights_only=True"
    for function in functions(tree):
        assert function.args.kwarg is None, f"{function.name} takes **{function.args.kwarg.arg}"
        defaults = [*function.args.defaults, *function.args.kw_defaults]
        mutable = [default for default in defaults if isinstance(default, ast.List | ast.Dict | ast.Set)]
        assert not mutable, f"{function.name} has a mutable default"


@each_file
def test_docstrings(path):
    tree = TREES[path]
    assert ast.get_docstring(tree) or not path.read_text().strip(), "a file says in its first line what it is for"
    public = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    assert not [node.name for node in public if not ast.get_docstring(node)]


@each_file
def test_sizes(path):
    assert len(path.read_text().splitlines()) <= LINES
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions(TREES[path]) if f.end_lineno - f.lineno >= FUNCTION}
    assert not long


@each_file
def test_ascii(path):
    path.read_text(encoding="ascii")


def test_one_environment_variable():
    reads = re.compile(r"\bos\.environ\b|\bgetenv\b|\bfrom os import")
    readers = [path.relative_to(ROOT).as_posix() for path in FILES if reads.search(path.read_text())]
    assert readers == ["kernels/dispatch.py"]


def test_every_family_is_exported():
    assert set(FAMILIES) <= set(unimm.__all__)
    assert all(getattr(unimm, name) is not None for name in unimm.__all__)
    assert set(unimm.__all__) == set(dir(unimm))
    with pytest.raises(AttributeError, match="no attribute 'Bagell'"):
        unimm.Bagell  # noqa: B018


def test_every_bundled_model_is_a_release():
    assert set(bundled()) == {row.name for row in unimm.releases() if row.hub is None}


def seconds(statement: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - began


def test_importing_costs_little():
    ours, torchs = (min(seconds(statement) for _ in range(3)) for statement in ("import unimm", "import torch"))
    assert ours <= 1.3 * torchs


def test_importing_has_no_effects():
    code = "import sys, unimm; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'PIL', 'rich', 'typer')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_readme_begins_with_lines_that_run(tmp_path):
    block = re.search(r"```python\n(.+?)```", (ROOT.parent / "README.md").read_text(), re.DOTALL)
    assert block and len(block[1].strip().splitlines()) <= 6
    # in a process of its own: it may write files, which belong in the temporary folder
    subprocess.run([sys.executable, "-W", "error", "-c", block[1]], cwd=tmp_path, check=True)
    assert list(tmp_path.glob("*.png")), "it makes a picture"
