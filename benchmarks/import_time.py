"""How long importing takes, each statement in fresh Python processes, beside `import torch`.

python benchmarks/import_time.py --runs 7 --out benchmarks/results/import_time.json
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from timing import processor, show

STATEMENTS = (
    "import torch",
    "import unimm",
    "from unimm import Bagel",
    "from unimm import Janus",
    "from unimm import JanusFlow",
    "from unimm import MetaQuery",
    "from unimm import UniWorld",
)
TIMED = """
import time
start = time.perf_counter()
{statement}
print(time.perf_counter() - start)
"""


def import_seconds(statement: str) -> float:
    """Seconds that a statement takes in a fresh process, without the start of Python."""
    return float(subprocess.check_output([sys.executable, "-c", TIMED.format(statement=statement)], text=True))


def rows(statements: tuple[str, ...], runs: int) -> list[dict[str, float | str]]:
    """A row a statement: the least and the median of `runs` processes, which take turns so that load on the machine is
    shared.

    The ratio is that of the least times: of the work itself, whatever else the machine does.
    """
    found: dict[str, list[float]] = {statement: [] for statement in statements}
    for _ in range(runs):
        for statement, seconds in found.items():
            seconds.append(import_seconds(statement))
    torch_seconds = min(found["import torch"])
    return [
        {
            "statement": statement,
            "min s": min(seconds),
            "median s": statistics.median(seconds),
            "of import torch": min(seconds) / torch_seconds,
        }
        for statement, seconds in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    args = parser.parse_args()
    found = rows(STATEMENTS, args.runs)
    show(found, title=f"{args.runs} processes each, {processor()}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"processor": processor(), "runs": args.runs, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
