"""Names and shapes of the released Qwen2.5-VL files."""

import json
import re

from helpers.paths import GOLDEN

MANIFESTS = GOLDEN / "blocks" / "qwen2p5vl" / "manifests.json"


def expanded(name: str) -> dict[str, tuple[int, ...]]:
    """A released checkpoint's names and shapes; `{n}` stands for the numbers of n layers."""
    found: dict[str, tuple[int, ...]] = {}
    for key, shape in json.loads(MANIFESTS.read_text())[name].items():
        n = re.search(r"\{(\d+)\}", key)
        found |= {key.replace(n[0], str(i)) if n else key: tuple(shape) for i in range(int(n[1]) if n else 1)}
    return found
