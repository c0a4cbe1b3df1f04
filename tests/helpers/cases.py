"""Where the stored cases are: the small ones beside the tests, the larger ones in the folder that UNIMM_GOLDEN names.

tests/golden stays under 40 MB. A larger case is looked for under the same path in $UNIMM_GOLDEN, and what needs it is
skipped where it is absent.
"""

import json
import os
from pathlib import Path

import pytest

from helpers.paths import GOLDEN
from unimm.checkpoint.hub import bundled_names
from unimm.models.registry import FAMILIES

LARGER = ("blocks/dcae/dev", "blocks/fluxvae/dev", "blocks/qwen2p5vl/dev", "blocks/siglip2/dev")


def found(case: str) -> Path:
    """The folder of a case by its path in the store, say blocks/dcae/dev. Skips the test, with the reason, where it is
    not."""
    elsewhere = os.environ.get("UNIMM_GOLDEN")
    places = [GOLDEN / case] + ([Path(elsewhere) / case] if elsewhere else [])
    for place in places:
        if (place / "io.safetensors").is_file():
            return place
    where = f"it is not under UNIMM_GOLDEN={elsewhere}" if elsewhere else "set UNIMM_GOLDEN to the folder that holds it"
    pytest.skip(f"the stored case {case} is too large for tests/golden: {where}")


def cases() -> list[str]:
    """The names of all stored cases, those beside the tests and the larger ones."""
    beside = {path.parent.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("io.safetensors")}
    return sorted(beside | set(LARGER))


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released file's tensors, as blocks/manifests.json keeps them: `{20}` stands for 0 to 19."""
    whole = {}
    for key, shape in json.loads((GOLDEN / "blocks" / "manifests.json").read_text())[name].items():
        head, brace, rest = key.partition("{")
        count, _, tail = rest.partition("}")
        whole |= {f"{head}{i}{tail}": tuple(shape) for i in range(int(count))} if brace else {key: tuple(shape)}
    return whole


def small_model(family: str) -> str | Path:
    """What a small model of a family is loaded by: its nano, or the stored case of a family that has none."""
    name = f"{family.lower()}-nano"
    return name if name in bundled_names() else GOLDEN / FAMILIES[family].package / "dev"
