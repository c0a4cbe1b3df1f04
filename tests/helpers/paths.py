"""Where the project, the tests, the stored cases and the recipes lie."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
RECIPES = ROOT / "unimm" / "training" / "recipes"
