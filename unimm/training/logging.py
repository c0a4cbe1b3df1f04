"""The log of a run: JSON lines in a file, and the same on one line for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unimm.checkpoint.atomic import name_file


class JsonlLog:
    """A file of JSON lines, one for each stretch of steps."""

    def __init__(self, path: Path, *, after: int) -> None:
        """Keep the lines up to step `after`: a resumed run writes the later ones again."""
        self.path = path
        kept = []
        if path.exists() and after:
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _is_whole(line) and json.loads(line)["step"] <= after]
        partial = path.with_name(path.name + ".new")
        partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        partial.replace(path)

    def write(self, report: Mapping[str, Any]) -> None:
        """Append a line."""
        with name_file(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(report) + "\n")


def _is_whole(line: str) -> bool:
    """Whether a line is one that was written, and not one that a crash cut off."""
    try:
        return "step" in json.loads(line)
    except json.JSONDecodeError:
        return False


def format_losses(losses: Mapping[str, float]) -> str:
    """Losses by name."""
    return "  ".join(f"{name} {value:.4f}" for name, value in losses.items())


def format_report(report: Mapping[str, Any]) -> str:
    """A line of the log for people: losses, the gradient's norm, rates, the part of the device's peak, memory, packs."""
    parts = [format_losses(report["losses"]), f"norm {report['grad_norm']:.2f}", f"{report['samples_per_s']:.0f}/s"]
    if "tokens_per_s" in report:
        parts.append(f"{report['tokens_per_s']:.0f} tokens/s")
    if "mfu" in report:
        parts.append(f"{report['images_per_s']:.1f} images/s")
        parts.append(f"{report['tflops']:.3g} TFLOP/s  MFU {report['mfu']:.1%}")
    parts.append(f"{report['memory_mb']} MB")
    if "fill" in report:
        parts.append(f"packs {report['fill']:.0%} full")
    if left_out := report.get("broken_rows", 0) + report.get("left_out", 0):
        parts.append(f"{left_out} of {report['rows']} rows left out")
    return "  ".join(parts)
