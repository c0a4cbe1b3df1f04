"""The documentation: every section that a comment names exists, and no page is named that the repository does not
hold."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("unimm", "benchmarks", "parity", "experiments", "tests", "examples")
FILES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".yaml", ".md"} and "golden" not in path.parts and path != Path(__file__)
)
PAGE = re.compile(r"docs/originals/(\w+)\.md((?:,?\s+(?:#\s+)?(?:and\s+(?:#\s+)?)?\"[^\"]+\")*)")
ELSEWHERE = re.compile(r"\bfacts/\w+\.md|\bof the facts\b|\(trap T?\d|\.\./shared|golden/README")


def headings(page: str) -> set[str]:
    """The headings of a page, without their numbers."""
    lines = (ROOT / "docs" / "originals" / f"{page}.md").read_text().splitlines()
    return {re.sub(r"^#+ (?:[\d.]+ )?", "", line) for line in lines if line.startswith("#")}


def cited(text: str) -> list[tuple[str, list[str]]]:
    """Pages and the headings named behind them, wherever lines are broken."""
    pages = [(found[1], re.findall(r'"([^"]+)"', found[2])) for found in PAGE.finditer(text)]
    return [(page, [" ".join(name.replace("# ", "").split()) for name in names]) for page, names in pages]


def test_every_cited_section_exists():
    found = [(path, page, names) for path in FILES for page, names in cited(path.read_text())]
    assert len(found) > 30, "the pattern finds no citations any more"
    lost = [
        f"{path.relative_to(ROOT)}: {page}, {name}" for path, page, names in found for name in {*names} - headings(page)
    ]
    assert not lost


def test_the_pattern_reads_broken_lines():
    page = "docs/originals/" + "bagel.md"  # in two, so that this is no citation
    assert cited(f'{page}, "Sampler" and\n# "Losses". More "words"') == [("bagel", ["Sampler", "Losses"])]
    assert cited(f'{page}, "No such\n    heading".') == [("bagel", ["No such heading"])]
    assert "No such heading" not in headings("bagel")


def test_no_page_is_cited_that_the_repository_does_not_hold():
    found = [
        f"{path.relative_to(ROOT)}:{n}"
        for path in FILES
        for n, line in enumerate(path.read_text().splitlines(), 1)
        if ELSEWHERE.search(line)
    ]
    assert not found
