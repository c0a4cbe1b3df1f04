"""The house: who may import whom, what no file of the package does, sizes, the quick import, and the README's first
lines."""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

import unimm
from unimm.checkpoint.hub import bundled_names
from unimm.models.registry import FAMILIES

ROOT = Path(unimm.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
IDS = [str(path.relative_to(ROOT)) for path in FILES]
each_file = pytest.mark.parametrize("path", FILES, ids=IDS)

LINES, FUNCTION = 500, 60


def called(tree: ast.AST) -> list[str]:
    """The names of everything called: print, pickle.load, ..."""
    return [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def dotted(tree: ast.AST) -> list[str]:
    """What a file imports of the package, as full names, inside functions and under TYPE_CHECKING too.

    `from unimm.models import flux` gives unimm.models and unimm.models.flux: the second may be a module.
    """
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return [name for name in found if name.split(".")[0] == "unimm"]


def module(path: Path) -> str:
    """The full name of a file's module."""
    return ".".join(["unimm", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {module(path) for path in FILES}

# ---- families

# the folder of each family
FOLDERS = {family.package for family in FAMILIES.values()}


def family(name: str) -> str | None:
    """The family that a module belongs to, by its folder in models/."""
    parts = name.split(".")
    return parts[2] if parts[:2] == ["unimm", "models"] and len(parts) > 2 and parts[2] in FOLDERS else None


@each_file
def test_families_do_not_import_each_other(path):
    """Over all files of each family; what two of them use is a role, and lives in that role's room."""
    ours = family(module(path))
    theirs = {name: owner for name in dotted(TREES[path]) if (owner := family(name))}
    if ours:
        assert not {name for name, owner in theirs.items() if owner != ours}


def test_every_family_has_files():
    assert family("unimm.models.janusflow.uvit") == "janusflow" and family("unimm.models.janus.model") == "janus"
    assert family("unimm.models.common.deepseek_chat") is None and family("unimm.models") is None
    assert {family(module(path)) for path in FILES} == FOLDERS | {None}


@each_file
def test_only_the_registry_knows_the_families_and_only_by_strings(path):
    """What families are built on imports none of them, not in a function either; the registry imports them by their
    names."""
    here = module(path)
    parts = here.split(".")[1:]
    below = parts and room(here) not in (None, *ABOVE_FAMILIES)
    shared = parts[:1] == ["models"] and family(here) is None
    if below or shared:
        assert not [name for name in dotted(TREES[path]) if family(name)]


FAMILY_FILES = {"__init__.py", "config.py", "processor.py", "network.py", "model.py", "weights.py", "parallel.py"}


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_a_family_has_the_files_of_every_family(folder):
    """It may have more: those of parts that no other family has."""
    assert FAMILY_FILES <= {path.name for path in (ROOT / "models" / folder).iterdir()}


# ---- rooms

# floor by floor; a module imports from its own room and from those of earlier floors, never from the others of its
# floor
FLOORS = (
    ("kernels",),
    ("nn", "sequence", "checkpoint"),
    ("generation", "tokenizers", "adapters"),
    ("processing",),
    ("encoders", "denoisers"),
    ("vlms",),
    ("models",),
    ("data", "distributed"),
    ("training", "evaluation", "quantization", "serving"),
    ("self_training", "app"),
    ("cli",),
)
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
# rooms that may import a family: the families' own, and those above it but for the data
ABOVE_FAMILIES = ("models", *FLOORS[-3], *FLOORS[-2], *FLOORS[-1])


def room(name: str) -> str | None:
    """The room that a module is in; None for the package itself, which imports nothing until it is asked."""
    parts = name.split(".")[1:]
    return parts[0] if parts and parts[0] in FLOOR else None


def across(here: str, imports: Iterable[str]) -> list[str]:
    """The imports of a module that go up, or to another room of its floor."""
    ours = room(here)
    theirs = {name: there for name in imports if (there := room(name)) and there != ours}
    return [name for name, there in theirs.items() if ours and FLOOR[there] >= FLOOR[ours]]


@each_file
def test_rooms_import_only_what_is_on_earlier_floors(path):
    assert not across(module(path), dotted(TREES[path]))


def test_every_module_is_in_a_room():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} <= {*FLOOR, "__init__.py", "__main__.py"}


def test_imports_that_go_up_are_found():
    """Also where only a type checker, or a call, imports them."""
    assert across("unimm.kernels.common", ["unimm.tokenizers.text"]) == ["unimm.tokenizers.text"]
    assert across("unimm.evaluation.benchmarks.shapes", ["unimm.training.trainer"]) == ["unimm.training.trainer"]
    assert across("unimm.training.trainer", ["unimm.tokenizers.text", "unimm.kernels", "unimm.training.config"]) == []
    code = "if TYPE_CHECKING:\n    from unimm.data import batching\ndef f():\n    import unimm.training.ema"
    found = across("unimm.tokenizers.text", dotted(ast.parse(code)))
    assert found == ["unimm.data", "unimm.data.batching", "unimm.training.ema"]


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """The modules that cannot be put in an order in which each imports earlier ones only; empty where all can."""
    left = {name: set(imports) for name, imports in graph.items()}
    while free := [name for name, imports in left.items() if not imports & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def at_run_time(tree: ast.AST) -> ast.Module:
    """The imports that ever run, inside functions too: all but those for type checkers."""
    kept: list[ast.stmt] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            kept.append(node)
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            kept += at_run_time(node).body
    return ast.Module(kept, [])


def modules_of(imports: Iterable[str]) -> set[str]:
    """Those that are modules; of `from unimm.models import registry` the second alone, whose package comes with it."""
    known = {name for name in imports if name in MODULES}
    return {name for name in known if not any(other.startswith(f"{name}.") for other in known)}


def test_no_module_imports_itself_by_way_of_others():
    graph = {module(path): modules_of(dotted(at_run_time(tree))) for path, tree in TREES.items()}
    assert not cycle(graph)
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == ["a", "b", "c", "d"]


@each_file
def test_nothing_imports_what_is_built_on_the_package(path):
    outside = {"experiments", "parity", "benchmarks", "examples", "tests"}
    names = [
        name for node in ast.walk(TREES[path]) if isinstance(node, ast.Import) for name in (a.name for a in node.names)
    ]
    names += [node.module or "" for node in ast.walk(TREES[path]) if isinstance(node, ast.ImportFrom)]
    assert not outside & {name.split(".")[0] for name in names}


# ---- names


def test_class_names_are_unique():
    names = Counter(node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    shared = [name for name, n in names.items() if n > 1]
    assert not shared, "a class has a name of its own: say whose it is, BagelTrainingConfig"


def test_public_function_names_are_unique():
    names = Counter(
        node.name
        for tree in TREES.values()
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    )
    # a benchmark is found by its module, which has these two
    shared = [name for name, n in names.items() if n > 1 and name not in ("evaluate", "supported_tasks")]
    assert not shared


# ---- what no file does


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
def test_one_statement_a_line(path):
    """`a, b = x, y` is for a swap; kernels' launchers apart, whose names stand in rows by what they are."""
    if path.name.endswith("_triton.py"):
        return
    pairs = [
        (node.targets[0], node.value)
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
    ]
    packed = [
        ast.unparse(target)
        for target, value in pairs
        if {ast.unparse(one) for one in target.elts} != {ast.unparse(one) for one in value.elts}
    ]
    assert not packed


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
    # the command line sets one of OpenMP's before torch is imported, and Gradio's before that is; torchrun's says how many
    # processes a harness has
    assert readers == ["cli/app.py", "cli/main.py", "evaluation/adapters/lmms_eval_model.py", "kernels/dispatch.py"]


def test_every_family_is_exported():
    assert set(FAMILIES) <= set(unimm.__all__)
    assert all(getattr(unimm, name) is not None for name in unimm.__all__)
    assert set(unimm.__all__) == set(dir(unimm))
    with pytest.raises(AttributeError, match="no attribute 'Bagell'"):
        unimm.Bagell  # noqa: B018


def test_every_bundled_model_is_a_release():
    assert set(bundled_names()) == {row.name for row in unimm.releases() if row.hub is None}


IMPORT_TIMES = """
import time
times = [time.process_time()]
import torch; times.append(time.process_time())
import unimm; from unimm import Bagel; times.append(time.process_time())
print((times[2] - times[1]) / (times[1] - times[0]))
"""


def test_importing_costs_little():
    """At most three tenths of what importing torch costs: both in one process, so that other work slows both alike."""
    costs = [subprocess.run([sys.executable, "-c", IMPORT_TIMES], check=True, capture_output=True) for _ in range(3)]
    assert min(float(cost.stdout) for cost in costs) <= 0.3


def test_importing_has_no_effects():
    code = "import sys, unimm; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'PIL', 'rich', 'typer')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_readme_begins_with_lines_that_run(tmp_path):
    block = re.search(r"```python\n(.+?)```", (ROOT.parent / "README.md").read_text(), re.DOTALL)
    assert block and len(block[1].strip().splitlines()) <= 6
    # in a process of its own: it may write files, which belong in the temporary folder
    subprocess.run([sys.executable, "-W", "error", "-c", block[1]], cwd=tmp_path, check=True)
    assert list(tmp_path.glob("*.png")), "it makes a picture"
