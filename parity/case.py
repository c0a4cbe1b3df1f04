"""A stored case: its tensors and notes, and an account of what was compared."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

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
    """Where the outputs of a case are: with it, or for a case in transformers' layout with the case that it was made
    of."""
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
        self.descriptions = {name: entry.get("desc") or "" for name, entry in notes.get("tensors", notes).items()}
        self.rows: dict[str, Row] = {}
        self.inputs: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def names(self, pattern: str) -> list[str]:
        """Stored tensors whose whole name matches."""
        return [name for name in self.tensors if re.fullmatch(pattern, name)]

    def description(self, name: str) -> str:
        """The description of a tensor, or nothing."""
        return self.descriptions.get(name, "")

    def input(self, name: str) -> Tensor:
        """A stored tensor that the original was given."""
        self.inputs.add(name)
        return self.tensors[name]

    def input_note(self, name: str, default: Any = None) -> Any:
        """A note in `meta` that the original was given."""
        self.inputs.add(name)
        return self.meta.get(name, default)

    def compare(self, name: str, ours: Tensor, *, note: str = "", share: float = FLOAT) -> None:
        """Compare with a stored tensor; nothing where none is stored under the name. share: allowed, of its largest
        value."""
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
                if name in self.inputs or name.endswith(".args"):
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
