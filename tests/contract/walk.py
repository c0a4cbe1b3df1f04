"""What the contract walks: every bundled model and every stored case, taken up from the registry and from
tests/golden."""

import functools
import json

import torch
from helpers.cases import cases, found
from helpers.paths import GOLDEN

import unimm
from unimm.models.registry import detect_family

BUNDLED = {row.name: row for row in unimm.releases() if row.hub is None}
# stored cases without weights, and why
WEIGHTLESS = {
    "blocks/editweight/dev": "weights of a loss's places: arithmetic alone",
    "janus/preproc": "pictures and prompts as Janus prepares them",
}


def case_family(case: str) -> str | None:
    """The family whose release a stored case is laid out as; None for a part of one."""
    folder = GOLDEN / case
    return detect_family(folder) if (folder / "config.json").exists() and not case.startswith("blocks/") else None


GOLDENS = {case: family for case in cases() if (family := case_family(case))}
PARTS = [case for case in cases() if case not in GOLDENS and case not in WEIGHTLESS]
MODELS = [*BUNDLED, *GOLDENS]


def source(name: str):
    """What `unimm.load` takes: a bundled name, or the folder of a case."""
    return found(name) if name in GOLDENS else name


@functools.cache
def loaded(name: str) -> unimm.UnifiedModel:
    """A model in float32, once for all tests: they leave it as it is."""
    return unimm.load(source(name))


def verbs(name: str) -> tuple[str, ...]:
    """The verbs of a model: of its release, or of its family's first."""
    row = BUNDLED.get(name) or next(row for row in unimm.releases() if row.family == GOLDENS[name])
    return row.verbs


def numbers(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """All numbers of a state dict in order of size, whatever their names and shapes."""
    return torch.cat([x.float().flatten() for x in state.values()]).sort().values


def stored_keys(path) -> list[str]:
    """The names in a safetensors file, from its header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return [key for key in header if key != "__metadata__"]
