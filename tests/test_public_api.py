"""The public names, and the signature of every verb: public_api.txt is changed by hand, where a change is meant."""

import dataclasses
import difflib
import inspect
from pathlib import Path

import pytest

import unimm

PINNED = Path(__file__).with_name("public_api.txt")
# every verb of every family; a family has those that it has
VERBS = (
    "from_pretrained",
    "save_pretrained",
    "generate",
    "understand",
    "chat",
    "interleave",
    "extend",
    "respond",
    "optimize_for_cpu",
    "compile",
    "add_adapter",
    "load_adapter",
    "save_adapter",
    "set_adapter",
    "combine_adapters",
    "merge_adapter",
    "unload_adapter",
)
# what all `generate`s share, in this order
SHARED = ("prompt", "images", "n", "size", "seed", "steps", "guidance", "think", "progress")
# shared parameters that a family does not have, as its class attributes say
LACKS = {
    "Emu3": {"steps", "think"},
    "Janus": {"steps", "think"},
    "JanusFlow": {"think"},
    "MetaQuery": {"think"},
    "ShowO": {"think"},
    "UniWorld": {"think"},
}

FAMILIES = [
    name for name in unimm.__all__ if inspect.isclass(thing := getattr(unimm, name)) and hasattr(thing, "RELEASES")
]


def parameters(function) -> list[inspect.Parameter]:
    """A function's parameters without `self`, `cls` and annotations, which name modules that may move."""
    found = inspect.signature(function).parameters.values()
    return [one.replace(annotation=inspect.Parameter.empty) for one in found if one.name not in ("self", "cls")]


def signature(function) -> str:
    """Names, order, kinds and defaults, as they are written."""
    return str(inspect.Signature(parameters(function)))


def verbs(name: str) -> list[str]:
    """A line for each verb of a family, inherited ones too."""
    family = getattr(unimm, name)
    return [f"{name}.{verb}{signature(getattr(family, verb))}" for verb in VERBS if hasattr(family, verb)]


def public() -> list[str]:
    """All public names, then the signatures of functions, of values (but configs, which files are read into), of
    verbs."""
    things = {name: getattr(unimm, name) for name in unimm.__all__}
    functions = [f"{name}{signature(thing)}" for name, thing in things.items() if inspect.isfunction(thing)]
    values = {
        name: thing for name, thing in things.items() if dataclasses.is_dataclass(thing) and not name.endswith("Config")
    }
    made = [f"{name}{signature(thing)}" for name, thing in values.items()]
    return [
        *unimm.__all__,
        *functions,
        *made,
        *verbs("UnifiedModel"),
        *(line for name in FAMILIES for line in verbs(name)),
    ]


def pinned() -> list[str]:
    """The lines of the file, but for empty ones and comments."""
    lines = [line.strip() for line in PINNED.read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_the_public_names_and_signatures_are_the_pinned_ones():
    changed = list(difflib.unified_diff(pinned(), public(), "tests/public_api.txt", "unimm", lineterm="", n=0))
    assert not changed, "\n".join(["if this is meant, change tests/public_api.txt and tell CHANGELOG:", *changed])


def test_a_changed_default_is_seen(monkeypatch):
    def generate(self, prompt, *, steps=7):
        """Another one."""

    monkeypatch.setattr(unimm.Bagel, "generate", generate)
    assert set(public()) - set(pinned()) == {"Bagel.generate(prompt, *, steps=7)"}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_generate_shares_its_parameters(name):
    ours = {one.name: one for one in parameters(getattr(unimm, name).generate)}
    shared = [one for one in ours if one in SHARED]
    assert set(SHARED) - set(shared) == LACKS.get(name, set()), "LACKS says what a family does not have"
    family = getattr(unimm, name)
    assert family.supports_thinking == ("think" in ours) and family.supports_steps == ("steps" in ours)
    assert shared == [one for one in SHARED if one in shared]
    for other in FAMILIES:
        theirs = {one.name: one for one in parameters(getattr(unimm, other).generate)}
        for key in set(shared) & set(theirs):
            assert ours[key] == theirs[key], f"{key}: {name} and {other} differ in its kind or its default"


@pytest.mark.parametrize("verb", ["understand", "chat"])
def test_verbs_that_answer_are_the_same_in_every_family(verb):
    """But for `think`, which only families that support it have."""
    having = [family for family in (getattr(unimm, name) for name in FAMILIES) if hasattr(family, verb)]
    found = {family: parameters(getattr(family, verb)) for family in having}
    assert len({tuple(map(str, (one for one in ours if one.name != "think"))) for ours in found.values()}) == 1
    if verb == "understand":
        assert all(
            family.supports_thinking == ("think" in {one.name for one in ours}) for family, ours in found.items()
        )


def test_every_release_names_verbs_that_are_there():
    for row in unimm.releases():
        family = getattr(unimm, row.family)
        assert set(row.verbs) <= set(VERBS), f"add the verbs of {row.family} to VERBS"
        assert all(hasattr(family, verb) for verb in row.verbs)
