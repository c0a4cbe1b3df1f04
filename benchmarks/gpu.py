"""Everything that a GPU is asked for, in one run of at most eight minutes, the most important first.

    python benchmarks/gpu.py --out results          # on an H200; every part has a process of its own
    python benchmarks/gpu.py --out results --parts kernels bagel-1024
    python benchmarks/gpu.py --out results --toy    # tiny sizes, on any machine, to try the script

First every kernel is compared with float64. After each part results/gpu.json is written anew, so that a run that is cut short
still tells; a part that fails, or takes longer than its share, says so there and the next one begins. Nothing is
downloaded: weights are random, and rivals that are not installed are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from timing import LOG, Machine, relative_error, show

from unimm.kernels import AttentionMask, KeyRange, attention, use_kernels

HERE = Path(__file__).parent
BUDGET = 480.0  # seconds of all parts together
ATTENTION = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A command, its arguments at full and at tiny size, and the seconds that it may take."""

    name: str
    script: str
    full: str
    toy: str
    seconds: float
    needs: str = ""  # a package


PARTS = (
    Part(name="kernels", script="gpu.py", full="--exact", toy="--exact", seconds=60),
    Part(
        name="attention",
        script="attention.py",
        full="--tokens 8192 32768 --backends triton flex sdpa",
        toy="--tokens 256 --heads 4 2 32 --backends sdpa",
        seconds=60,
    ),
    Part(name="ops", script="ops.py", full="", toy="--ops swiglu", seconds=40),
    Part(
        name="bagel-1024",
        script="compiled.py",
        full="--models bagel-7b --layers 28 --side 1024 --rounds 1",
        toy="--models janusflow-nano --rounds 1",
        seconds=90,
    ),
    Part(
        name="bagel-512",
        script="compiled.py",
        full="--models bagel-7b --layers 28 --side 512 --rounds 1",
        toy="--models janusflow-nano --rounds 1",
        seconds=60,
    ),
    Part(
        name="janus-7b token",
        script="compiled.py",
        full="--models janus-7b --layers 30",
        toy="--models janus-nano --rounds 1",
        seconds=60,
    ),
    Part(
        name="flux and sana",
        script="denoisers.py",
        full="--rounds 5",
        toy="--toy --layers 1 1 --sana-layers 1 --side 64 --sana-side 64 --text 8 --caption 8 --rounds 1",
        seconds=70,
        needs="diffusers",
    ),
    Part(
        name="loading",
        script="loading.py",
        full="--layers 3 --modes read mapped float32 cuda --repeats 1",
        toy="--release janus-toy --layers 1 --modes read mapped --repeats 1",
        seconds=60,
    ),
    Part(
        name="training",
        script="training.py",
        full="--family bagel --layers 4 --way packed --dtype bfloat16 --copies 16 --rounds 3",
        toy="--family janus --size toy --layers 1 --way packed --rounds 1",
        seconds=60,
    ),
)


# ---- the kernels against float64


def masks(device: str, *, scale: int) -> dict[str, AttentionMask]:
    """Documents with images that some rows see, prefixes, and one new row behind long caches."""
    hidden = [KeyRange(7 * scale), KeyRange(30 * scale, full=True, visible=False), KeyRange(30 * scale, full=True)]
    plain = [KeyRange(13 * scale, full=True), KeyRange(20 * scale)]
    return {
        "packed": AttentionMask([hidden, plain], device=device),
        "causal": AttentionMask([[KeyRange(40 * scale)]], device=device),
        "decoding": AttentionMask(
            [[KeyRange(37 * scale)], [KeyRange(52 * scale)]], query_lengths=[1, 1], device=device
        ),
    }


def attention_errors(device: str, *, scale: int) -> Iterator[dict[str, Any]]:
    """Outputs and gradients of attention, by dtype, mask and width of a head."""
    for name, mask in masks(device, scale=scale).items():
        for width in (64, 128):
            generator = torch.Generator().manual_seed(0)
            wide = [
                torch.randn(n, heads, width, generator=generator).to(device)
                for n, heads in ((mask.n_queries, 8), (mask.n_keys, 2), (mask.n_keys, 2))
            ]
            grad = torch.randn(wide[0].shape, generator=generator).to(device)
            for dtype, allowed in ATTENTION.items():
                inputs = [x.to(dtype) for x in wide]
                exact = attention_run("reference", [x.double() for x in inputs], grad.double(), mask)
                found = attention_run("auto", inputs, grad.to(dtype), mask, gradients=name != "decoding")
                error = max(relative_error(a, b) for a, b in zip(found, exact, strict=False))
                row = {"kernel": "attention", "case": f"{name}, heads of {width}", "dtype": str(dtype)[6:]}
                yield row | {"relative error": error, "right": error < allowed}


def attention_run(
    backend: str, inputs: list[torch.Tensor], grad: torch.Tensor, mask: AttentionMask, *, gradients: bool = True
) -> list[torch.Tensor]:
    """The output, and the gradients of the inputs."""
    leaves = [x.clone().requires_grad_(gradients) for x in inputs]
    with use_kernels(backend):
        out = attention(*leaves, mask)
    return [out.detach(), *(torch.autograd.grad(out, leaves, grad) if gradients else ())]


def op_errors(device: str) -> Iterator[dict[str, Any]]:
    """Outputs and gradients of the small kernels, by dtype."""
    import ops

    for dtype, allowed in ops.ALLOWED.items():
        if device == "cpu" and dtype != torch.float32:
            continue
        for name, make in ops.cases(device, dtype).items():
            case = make()
            way, reference = next(iter(case.ways.values())), list(case.ways.values())[-1]
            found, exact = (op_run(call, case, wide=wide) for call, wide in ((way, False), (reference, True)))
            error = max(relative_error(a, b) for a, b in zip(found, exact, strict=True))
            row = {"kernel": name, "case": case.size, "dtype": str(dtype)[6:]}
            yield row | {"relative error": error, "right": error < allowed}


def op_run(call: Any, case: Any, *, wide: bool) -> list[torch.Tensor]:
    """Outputs, and gradients of what has them. wide: in float64."""
    inputs = [t.double() if wide and t.is_floating_point() else t for t in case.inputs]
    leaves = [t.clone().requires_grad_(case.gradients and t.is_floating_point()) for t in inputs]
    out = call(*leaves)
    outputs = list(out) if isinstance(out, tuple | list) else [out]
    if not case.gradients:
        return [t for t in outputs if t.is_floating_point()]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
    asked = [t for t in leaves if t.requires_grad]
    return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs, asked, grads)]


def check_kernels(*, toy: bool) -> None:
    """Print every kernel's distance from float64; exits with 1 where one is wrong."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = list(attention_errors(device, scale=1 if toy else 10))
    if not toy:
        rows += op_errors(device)
    show(rows, title=f"kernels against float64 on {device}")
    if wrong := [row for row in rows if not row["right"]]:
        raise SystemExit(f"{len(wrong)} of {len(rows)} are wrong: {wrong[:3]}")


# ---- the run


def run_part(part: Part, out: Path, *, toy: bool, seconds: float) -> dict[str, Any]:
    """Run a part in a process of its own: its tables, how it ended, and what it took."""
    if part.needs and find_spec(part.needs) is None:
        return {"part": part.name, "state": f"left out: {part.needs} is not installed"}
    log = out / f"{part.name.replace(' ', '-')}.jsonl"
    log.unlink(missing_ok=True)
    arguments = [*(part.toy if toy else part.full).split(), *(["--toy"] if toy and part.script == "gpu.py" else [])]
    began = time.monotonic()
    state = "done"
    words = ""
    try:
        ran = subprocess.run(
            [sys.executable, str(HERE / part.script), *arguments],
            env=os.environ | {LOG: str(log)},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        if ran.returncode:
            state = "failed"
            words = (ran.stdout + ran.stderr)[-2000:]
    except subprocess.TimeoutExpired:
        state = f"stopped after {seconds:.0f} s"
    tables = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    took = {"part": part.name, "state": state, "seconds": round(time.monotonic() - began, 1), "tables": tables}
    return took | ({"words": words} if words else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"), help="a folder for gpu.json")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="only these")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of all parts together")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--exact", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.exact:
        check_kernels(toy=args.toy)
        return
    if not (args.toy or torch.cuda.is_available()):
        raise SystemExit("no GPU: expected one, or --toy to try the script")
    args.out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    until = time.monotonic() + args.budget
    machine = "not measured" if args.toy else str(Machine.here(torch.bfloat16))
    for part in PARTS:
        if args.parts and part.name not in args.parts:
            continue
        left = until - time.monotonic()
        if left < 1:
            results.append({"part": part.name, "state": "left out: no time was left"})
        else:
            results.append(run_part(part, args.out, toy=args.toy, seconds=min(part.seconds, left)))
        partial = args.out / "gpu.json.partial"
        partial.write_text(json.dumps({"machine": machine, "parts": results}, indent=1) + "\n")
        partial.replace(args.out / "gpu.json")
        shown = results[-1]
        print(f"{shown['part']}: {shown['state']}, {shown.get('seconds', 0)} s", flush=True)
        for table in shown.get("tables", ()):
            show(table["rows"], title=table["title"])


if __name__ == "__main__":
    main()
