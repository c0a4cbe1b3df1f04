"""What every family inherits: components from elsewhere, layouts, options that a family may lack, and releases as
data."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.toys import toy

import unimm
from unimm.models.base import ComponentModel
from unimm.models.registry import FAMILIES, optional_files

CLASSES = {name: getattr(unimm, name) for name in FAMILIES}
each_family = pytest.mark.parametrize("name", CLASSES)


@each_family
def test_only_known_components_are_taken(name):
    family = CLASSES[name]
    with pytest.raises(ValueError, match=f"got components nothing for a {name}: expected"):
        family.from_pretrained("bagel-nano", components={"nothing": "a/b"})
    assert bool(family.COMPONENTS) == issubclass(family, ComponentModel)


@each_family
def test_what_is_final_is_not_overridden(name):
    family = CLASSES[name]
    for method in ("from_folder", "from_pretrained", "save_pretrained", "supported_options"):
        owners = [
            base for base in family.__mro__ if method in vars(base) and base.__module__.startswith("unimm.models")
        ]
        assert [base.__name__ for base in owners] == ["UnifiedModel"], method


@each_family
def test_an_unknown_layout_is_refused(name, tmp_path):
    layouts = CLASSES[name].LAYOUTS
    assert "original" in layouts
    if name == "Bagel":
        with pytest.raises(ValueError, match="got layout 'diffusers': expected one of original"):
            toy(0).save_pretrained(tmp_path / "model", layout="diffusers")
        assert not (tmp_path / "model").exists()


def test_options_for_callers_that_do_not_know_the_family():
    assert unimm.Bagel.supported_options(think=True, steps=3) == {"think": True, "steps": 3}
    assert unimm.Janus.supported_options(think=False, steps=None) == {}
    with pytest.raises(NotImplementedError, match="Janus has no steps"):
        unimm.Janus.supported_options(steps=3)


@each_family
def test_releases_are_data(name):
    """A family's package imports nothing heavy, and what it says of its releases fits its class."""
    package = f"unimm.models.{FAMILIES[name].package}"
    code = f"import sys, {package}; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'PIL')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert all(release.family == name for release in FAMILIES[name].releases.values())
    assert CLASSES[name].RELEASES is FAMILIES[name].releases and CLASSES[name].FILES is FAMILIES[name].files


def test_a_licence_that_forbids_commercial_use_is_known():
    for family in FAMILIES.values():
        for release in family.releases.values():
            assert release.commercial == (release.hub not in family.files.non_commercial)


def test_a_file_of_any_family_is_refused_where_it_would_be_read(tmp_path):
    """Whichever family it is of: the folder would be another model's."""
    files, folders = optional_files()
    assert {"ae.safetensors", "vae_config.json", "task_head_final.pt"} <= set(files) and "siglip" in folders
    (tmp_path / "task_head_final.pt").touch()
    with pytest.raises(ValueError, match=r"holds task_head_final\.pt of another model"):
        toy(0).save_pretrained(tmp_path)


# every class that a call may come from
CALLERS = {"CausalLM", "UnifiedModel", *CLASSES, *(f"{name}Network" for name in CLASSES)}


@pytest.mark.parametrize("folder", ["generation", "sequence", "processing", "vlms/*", "models/*"])
def test_the_way_goes_down(folder):
    """No function receives a model in order to call it back; it gets tensors, a part of the model, or state.

    A family's flops.py counts from outside: it reads a network, which knows nothing of it. What serving makes of a
    model's verbs, step by step, holds the model whose request it works on.
    """
    from_outside = ("flops.py", "stepwise.py", "separate_outputs.py")
    paths = [path for path in Path(unimm.__file__).parent.glob(f"{folder}/*.py") if path.name not in from_outside]
    assert paths
    for path in paths:
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                arguments = (*function.args.args, *function.args.kwonlyargs)
                annotations = {ast.unparse(one.annotation).strip("\"'") for one in arguments if one.annotation}
                assert "model" not in {one.arg for one in arguments} and not annotations & CALLERS
