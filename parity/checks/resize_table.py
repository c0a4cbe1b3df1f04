"""The sizes that BAGEL's image processors give, against resize_table.json."""

import json
import re
from pathlib import Path

from parity.case import Row
from unimm.models.bagel.processor import BagelImageProcessor


def check_table(path: Path) -> list[Row]:
    """A row for each list of sizes in a resize_table.json.

    A label that ends in (longest, shortest, stride[, max_pixels N]) states a rule; "... A then B" applies two of them,
    and "A img_num=N" one of them for N images that share its pixels.
    """
    table = json.loads(path.read_text())
    rules = {label: rule for label in table if (rule := _rule(label))}
    rows = []
    for label, sizes in table.items():
        wrong = [entry for entry in sizes if not _fits(label, entry, rules)]
        note = f"{len(sizes)} sizes" + (f", first wrong {wrong[0]}" if wrong else "")
        rows.append(Row(name=f"{path.stem}: {label}", kind="compared", difference=len(wrong), note=note))
    return rows


def _rule(label: str) -> BagelImageProcessor | None:
    stated = re.search(r"\((\d+), *(\d+), *(\d+)(?:, *max_pixels (\d+))?\)", label)
    if not stated:
        return None
    longest, shortest, stride = (int(n) for n in stated.groups()[:3])
    pixels = {"max_pixels": int(stated[4])} if stated[4] else {}
    return BagelImageProcessor.from_json(pixels, max_size=longest, min_size=shortest, stride=stride)


def _fits(label: str, entry: dict[str, list[int]], rules: dict[str, BagelImageProcessor]) -> bool:
    def named(word: str) -> BagelImageProcessor:
        return next(rule for at, rule in rules.items() if at.startswith(word))

    size = tuple(entry["in_wh"])
    if chain := re.search(r"(\w+) then (\w+)", label):
        first = named(chain[1]).output_size(*size)
        return [*first] == entry[f"{chain[1]}_wh"] and [*named(chain[2]).output_size(*first)] == entry[f"{chain[2]}_wh"]
    images = int(shared[1]) if (shared := re.search(r"img_num=(\d+)", label)) else 1
    rule = rules.get(label) or named(label.partition(" ")[0])
    return [*rule.output_size(*size, n_images=images)] == entry["out_wh"]
