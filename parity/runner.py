"""Compare the library with stored outputs of the originals: `python parity/runner.py CASE...`.

A case is a folder (released layout, io.safetensors, io.json), a resize_table.json or a tables.json. One line a stored
output: name, largest absolute difference, allowed, ok. Fails, too, where a stored output was not compared. Allowed in
float32: 1e-4 of the largest value stored (twice that for logits of Qwen2.5-VL); ids, masks and counts are exact; 8-bit
pixels may be off by 1.
"""
import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from parity.checks import (
    bagel,
    dc_ae,
    deepseek_vl_images,
    edit_weights,
    flux,
    janus,
    janusflow,
    kl_vae,
    metaquery,
    qwen2_5_vl,
    qwen_image,
    sana,
    siglip,
    tables,
    text_encoders,
    uniworld,
)
from unimm.models.bagel.processor import Resize

FLOAT = 1e-4  # of the largest value stored
PIXEL = 1.0  # of 255


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one stored tensor, or of one number in io.json."""

    name: str
    kind: Literal["input", "compared", "bettered", "missed"]
    difference: float = 0.0
    allowed: float = 0.0
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the row counts as passed; nan does not."""
        return self.kind != "missed" and self.difference <= self.allowed

    def __str__(self) -> str:
        if self.kind == "input":
            return f"{self.name:<88} input"
        verdict = ("ok" if self.ok else "FAILED") + (" (bettered)" if self.kind == "bettered" else "")
        return f"{self.name:<88} {self.difference:9.2e} {self.allowed:9.2e} {verdict}  {self.note}".rstrip()


def stored(folder: Path) -> Path:
    """Where the outputs of a case are: with it, or for a case in transformers' layout with the case that it was made of."""
    beside = folder.with_name(folder.name.removesuffix("_hf"))
    return folder if (folder / "io.safetensors").is_file() else beside


class Case:
    """A folder's stored tensors and notes, and an account of what was done with each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.outputs = folder, stored(folder)
        self.tensors = load_file(self.outputs / "io.safetensors")
        notes = json.loads((self.outputs / "io.json").read_text())
        self.meta: dict[str, Any] = notes.get("meta", {})
        self.special: dict[str, int] = notes.get("special_tokens", {})
        # tensors stand under a name of their own, or alone
        self.described = {name: entry.get("desc") or "" for name, entry in notes.get("tensors", notes).items()}
        self.rows: dict[str, Row] = {}
        self.given: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def names(self, pattern: str) -> list[str]:
        """Stored tensors whose whole name matches."""
        return [name for name in self.tensors if re.fullmatch(pattern, name)]

    def says(self, name: str) -> str:
        """The description of a tensor, or nothing."""
        return self.described.get(name, "")

    def input(self, name: str) -> Tensor:
        """A stored tensor that the original was given."""
        self.given.add(name)
        return self.tensors[name]

    def told(self, name: str, default: Any = None) -> Any:
        """A note in `meta` that the original was given."""
        self.given.add(name)
        return self.meta.get(name, default)

    def compare(self, name: str, ours: Tensor, *, note: str = "", share: float = FLOAT) -> None:
        """Compare with a stored tensor; nothing where none is stored under the name. share: allowed, of its largest value."""
        if name in self.tensors:
            difference, allowed, why = distance(ours, self.tensors[name], share)
            self._add(Row(name=name, kind="compared", difference=difference, allowed=allowed, note=why or note))

    def compare_note(self, name: str, ours: Any, stored: Any) -> None:
        """Compare exactly with a number, a text or a list in `meta`."""
        note = "" if ours == stored else f"got {ours!r}, stored {stored!r}"
        self._add(Row(name=name, kind="compared", difference=float(ours != stored), note=note))

    def compare_scalar(self, name: str, ours: float | None, stored: float | None, *, largest: float) -> None:
        """Compare with a float in `meta`, or with its absence; `largest` is that of the values stored with it."""
        if ours is None or stored is None:
            self.compare_note(name, ours, stored)
        else:
            self._add(Row(name=name, kind="compared", difference=abs(ours - stored), allowed=FLOAT * largest))

    def better(self, name: str, ours: Tensor, apart: Tensor, *, why: str) -> None:
        """A stored output that the library does not reproduce on purpose: hold ours to what it should be."""
        if name in self.tensors:
            difference, allowed, _ = distance(ours, apart)
            self._add(Row(name=name, kind="bettered", difference=difference, allowed=allowed, note=why))

    def miss(self, name: str, why: str) -> None:
        """Record that a stored output could not be compared."""
        self._add(Row(name=name, kind="missed", difference=float("nan"), note=why))

    def _add(self, row: Row) -> None:
        # a name that two checks compare keeps the verdict that fails
        if row.name not in self.rows or self.rows[row.name].ok:
            self.rows[row.name] = row

    def account(self) -> list[Row]:
        """A row for every stored tensor and note; what was neither compared nor an input is missed."""
        notes = [name for name in self.meta if not name.startswith("fact.")]
        for name in (*self.tensors, *notes):
            if name not in self.rows and not any(row.startswith(f"{name}: ") for row in self.rows):
                if name in self.given or name.endswith(".args"):
                    self.rows[name] = Row(name=name, kind="input")
                else:
                    self.miss(name, "not compared")
        order = {name: i for i, name in enumerate((*self.tensors, *self.meta))}
        return sorted(self.rows.values(), key=lambda row: order.get(row.name.partition(": ")[0], len(order)))


def distance(ours: Tensor, stored: Tensor, share: float = FLOAT) -> tuple[float, float, str]:
    """Largest absolute difference, what is allowed, and what is wrong with the shape."""
    ours = ours.detach().cpu()
    if ours.shape != stored.shape:
        return float("nan"), 0.0, f"got shape {list(ours.shape)}, stored {list(stored.shape)}"
    if not stored.numel():
        return 0.0, 0.0, ""
    if not stored.is_floating_point():
        difference = float((ours.long() - stored.long()).abs().max())
        # masks are stored in 8 bits, too, and are exact
        return difference, PIXEL if stored.dtype == torch.uint8 and int(stored.max()) > 1 else 0.0, ""
    # the same infinity on both sides is no difference
    apart = torch.where(ours == stored, 0.0, (ours.double() - stored.double()).abs())
    finite = stored[stored.isfinite()].abs()
    return float(apart.max()), share * float(finite.max()) if len(finite) else 0.0, ""


# ---- the table of resized sizes


def check_table(path: Path) -> list[Row]:
    """A row for each list of sizes in a resize_table.json.

    A label that ends in (longest, shortest, stride[, max_pixels N]) states a rule; "... A then B" applies two of them,
    and "A img_num=N" one of them for N pictures that share its pixels.
    """
    table = json.loads(path.read_text())
    rules = {label: rule for label in table if (rule := _rule(label))}
    rows = []
    for label, sizes in table.items():
        wrong = [entry for entry in sizes if not _fits(label, entry, rules)]
        note = f"{len(sizes)} sizes" + (f", first wrong {wrong[0]}" if wrong else "")
        rows.append(Row(name=f"{path.stem}: {label}", kind="compared", difference=len(wrong), note=note))
    return rows


def _rule(label: str) -> Resize | None:
    stated = re.search(r"\((\d+), *(\d+), *(\d+)(?:, *max_pixels (\d+))?\)", label)
    if not stated:
        return None
    longest, shortest, stride = (int(n) for n in stated.groups()[:3])
    pixels = {"max_pixels": int(stated[4])} if stated[4] else {}
    return Resize.from_files(pixels, longest=longest, shortest=shortest, stride=stride)


def _fits(label: str, entry: dict[str, list[int]], rules: dict[str, Resize]) -> bool:
    def named(word: str) -> Resize:
        return next(rule for at, rule in rules.items() if at.startswith(word))

    size = tuple(entry["in_wh"])
    if chain := re.search(r"(\w+) then (\w+)", label):
        first = named(chain[1]).size(*size)
        return [*first] == entry[f"{chain[1]}_wh"] and [*named(chain[2]).size(*first)] == entry[f"{chain[2]}_wh"]
    images = int(shared[1]) if (shared := re.search(r"img_num=(\d+)", label)) else 1
    rule = rules.get(label) or named(label.partition(" ")[0])
    return [*rule.size(*size, images=images)] == entry["out_wh"]


# ---- families


@dataclass(frozen=True)
class Family:
    """How a case of a family is told from its files, in words and in code, and what compares it."""

    expects: str
    recognise: Callable[[Path], bool]
    check: Callable[[Any], None]


MODULES = {
    "bagel": bagel,
    "janus": janus,
    "janus's preprocessing": deepseek_vl_images,
    "janusflow": janusflow,
    "metaquery": metaquery,
    "autoencoder": kl_vae,
    "dc-ae": dc_ae,
    "sana": sana,
    "flux": flux,
    "qwen-image": qwen_image,
    "siglip2": siglip,
    "text encoders": text_encoders,
    "edit weights": edit_weights,
    "uniworld": uniworld,
    "qwen2.5-vl": qwen2_5_vl,
}
FAMILIES = {name: Family(module.EXPECTS, module.recognise, module.check) for name, module in MODULES.items()}


def check(path: Path) -> list[Row]:
    """Every row of a case. Raises ValueError for a path that is none."""
    if path.name == "tables.json" and path.is_file():
        lists = tables.check_tables(path).items()
        return [Row(name=f"tables: {name}", kind="compared", difference=n, note=note) for name, (n, note) in lists]
    table = path / "resize_table.json" if path.is_dir() else path
    if table.name == "resize_table.json" and table.is_file() and not (path / "io.json").exists():
        return check_table(table)
    for family in FAMILIES.values():
        if all((stored(path) / name).is_file() for name in ("io.safetensors", "io.json")) and family.recognise(path):
            case = Case(path)
            family.check(case)
            return case.account()
    known = "; ".join(f"{name}: {family.expects}" for name, family in FAMILIES.items())
    raise ValueError(
        f"{path} is no case: expected a folder with io.safetensors, io.json and a family's files ({known}), "
        "or resize_table.json"
    )


def report(path: Path, rows: Iterable[Row]) -> tuple[list[str], bool]:
    """The lines to print for a case, and whether it passed."""
    rows = list(rows)
    outputs = [row for row in rows if row.kind != "input"]
    inputs = len(rows) - len(outputs)
    bad = [row for row in outputs if not row.ok]
    worst = max((row.difference / row.allowed for row in outputs if row.ok and row.allowed), default=0.0)
    bettered = sum(row.kind == "bettered" for row in rows)
    total = f"{path}: {len(outputs) - len(bad)} of {len(outputs)} outputs ok ({bettered} bettered), {inputs} inputs"
    lines = [*map(str, rows), f"{total}; the worst uses {worst:.1%} of what is allowed"]
    return lines, bool(outputs) and not bad


def main(arguments: Sequence[str] | None = None) -> int:
    """Check every case named; 0 where all pass, 1 where one fails, 2 where one is no case."""
    parser = argparse.ArgumentParser(description="Compare the library with stored outputs of the originals.")
    parser.add_argument("cases", nargs="+", type=Path, metavar="CASE", help="a case's folder, or a resize_table.json")
    code = 0
    for path in parser.parse_args(arguments).cases:
        try:
            lines, passed = report(path, check(path))
        except ValueError as error:
            lines, passed, code = [f"{path}: {error}"], False, 2
        print("\n".join(lines), flush=True)
        code = code or int(not passed)
    return code


if __name__ == "__main__":
    sys.exit(main())
