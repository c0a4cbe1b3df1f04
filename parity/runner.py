"""Compare the library with stored outputs of the originals: `python -m parity CASE...`.

A case is a folder (released layout, io.safetensors, io.json), a resize_table.json or a tables.json. One line a stored
output: name, largest absolute difference, allowed, ok. Fails, too, where a stored output was not compared. Allowed in
float32: 1e-4 of the largest value stored (twice that for logits of Qwen2.5-VL); ids, masks and counts are exact; 8-bit
pixels may be off by 1.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parity.case import Case, Row, stored
from parity.checks import (
    bagel,
    dc_ae,
    deepseek_vl_images,
    edit_weights,
    emu3,
    flux,
    janus,
    janusflow,
    kl_vae,
    metaquery,
    qwen2_5_vl,
    qwen_image,
    sana,
    show_o,
    siglip,
    tables,
    text_encoders,
    uniworld,
)
from parity.checks.resize_table import check_table


@dataclass(frozen=True)
class Family:
    """How a case of a family is told from its files, in words and in code, and what compares it."""

    expects: str
    recognise: Callable[[Path], bool]
    check: Callable[[Any], None]


MODULES = {
    "bagel": bagel,
    "emu3": emu3,
    "janus": janus,
    "janus's preprocessing": deepseek_vl_images,
    "janusflow": janusflow,
    "metaquery": metaquery,
    "autoencoder": kl_vae,
    "dc-ae": dc_ae,
    "sana": sana,
    "flux": flux,
    "qwen-image": qwen_image,
    "show-o": show_o,
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
