"""The small kernels against plain PyTorch: time, bytes moved a second, and the most memory held.

    python benchmarks/ops.py                 # on a GPU the Triton kernels, on a CPU what has another algorithm there
    python benchmarks/ops.py --ops swiglu --out results

Each row is first compared with float64. "eager" is the reference; Liger-Kernel joins where it is installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import Machine, measure, peak_megabytes, relative_error, save, show
from torch import Tensor

from unimm.kernels import (
    adaln_modulate,
    linear_cross_entropy,
    nearest_code,
    qk_norm_rope,
    rms_norm,
    swiglu,
    use_kernels,
)

ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Case:
    """Inputs (those that float get gradients), ways to compute by name, and what must be read and written at least."""

    inputs: tuple[Tensor, ...]
    ways: dict[str, Callable[..., Any]]
    size: str
    gradients: bool = True

    @property
    def bytes(self) -> int:
        """Inputs and outputs, once each."""
        out = flat(next(iter(self.ways.values()))(*self.inputs))
        return sum(t.numel() * t.element_size() for t in (*self.inputs, *out))


def flat(out: Any) -> tuple[Tensor, ...]:
    """An op's outputs as a tuple."""
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def with_kernels(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """The call under one backend."""

    def run(*inputs: Tensor) -> Any:
        with use_kernels(name):
            return call(*inputs)

    return run


def pair(call: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """An op that differs by backend only."""
    ways = {"eager": with_kernels("reference", call)}
    return {"triton": with_kernels("triton", call), **ways} if torch.cuda.is_available() else ways


def cases(device: str, dtype: torch.dtype) -> dict[str, Callable[[], Case]]:
    """Every op at the sizes of the 7B (on a CPU a fraction of its rows), made when asked for."""
    gpu = device == "cuda"
    rows = 16384 if gpu else 1024
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, to)

    def norm() -> Case:
        return Case((randn(rows, 3584), randn(3584)), pair(lambda x, w: rms_norm(x, w, 1e-6)), f"{rows} x 3584")

    def rotary() -> Case:
        cos_sin = randn(2, rows, 64)
        ways = pair(lambda q, k, a, b: qk_norm_rope(q, k, a, b, cos_sin, 1e-6))
        return Case(
            (randn(rows, 28, 128), randn(rows, 4, 128), randn(128), randn(128)), ways, f"{rows} x (28 + 4) x 128"
        )

    def gate() -> Case:
        return Case((randn(rows, 18944), randn(rows, 18944)), pair(swiglu), f"{rows} x 18944")

    def adaln() -> Case:
        inputs = (randn(4, rows // 4, 3072), randn(4, 3072), randn(4, 3072))
        return Case(inputs, pair(lambda x, s, t: adaln_modulate(x, s, t, 1e-6)), f"4 x {rows // 4} x 3072")

    def codes() -> Case:
        n = 16 * 576 if gpu else 2 * 576
        ways = {**pair(nearest_code), "whole matrix": nearest_whole}
        inputs = (randn(n, 8, to=torch.float32), randn(16384, 8, to=torch.float32))
        return Case(inputs, ways, f"{n} x 16384 x 8", gradients=False)

    def entropy() -> Case:
        n, wide, vocab = (8192, 3584, 152064) if gpu else (1024, 512, 32000)
        labels = torch.randint(0, vocab, (n,), generator=generator).to(device)
        ways: dict[str, Callable[..., Any]] = {
            "chunked": lambda x, w: linear_cross_entropy(x, w, labels),
            "eager": lambda x, w: F.cross_entropy((x @ w.t()).float(), labels, reduction="none"),
        }
        if gpu and find_spec("liger_kernel"):
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
            ways["liger (sum)"] = lambda x, w: liger(w, x, labels)
        return Case((randn(n, wide), randn(vocab, wide) * wide**-0.5), ways, f"{n} x {wide} x {vocab}")

    return {
        "rms_norm": norm, "qk_norm_rope": rotary, "swiglu": gate, "adaln_modulate": adaln, "nearest_code": codes,
        "linear_cross_entropy": entropy,
    }  # fmt: skip


def nearest_whole(z: Tensor, codebook: Tensor) -> Tensor:
    """Nearest code with the whole matrix of similarities, as VQ code is usually written."""
    return (F.normalize(z, dim=-1) @ F.normalize(codebook, dim=-1).t()).argmax(-1)


def row(way: Callable[..., Any], case: Case, truth: tuple[Tensor, ...], *, op: str, name: str, copy: float) -> dict:
    """One line: right, then fast. copy: of the machine, GB/s."""
    dtype = case.inputs[0].dtype
    line: dict[str, Any] = {"op": op, "size": case.size, "dtype": str(dtype).removeprefix("torch."), "way": name}
    with torch.no_grad():
        got = flat(way(*case.inputs))
        if truth[0].is_floating_point():
            summed = got[0].ndim < truth[0].ndim
            error = max(relative_error(a, b.sum() if summed else b) for a, b in zip(got, truth, strict=True))
        else:
            error = float((got[0] != truth[0]).float().mean())
        line["error"] = error
        if not error < ALLOWED[dtype] and truth[0].is_floating_point():
            return line | {"note": "off: not timed"}
        forward = measure(lambda: way(*case.inputs))
    rate = case.bytes / forward.median / 1e6
    line |= {"fwd ms": forward.median, "GB/s": rate, "% of copy": 100 * rate / copy}
    if not case.gradients:
        return line | {"peak MB": peak_megabytes(lambda: way(*case.inputs)), "note": ""}
    leaves = [t.detach().requires_grad_() for t in case.inputs]

    def both() -> None:
        out = flat(way(*leaves))
        torch.autograd.grad(out, leaves, [torch.ones_like(t) for t in out])

    return line | {"fwd + bwd ms": measure(both).median, "peak MB": peak_megabytes(both), "note": ""}


def main() -> None:
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16" if gpu else "float32")
    parser.add_argument("--ops", nargs="+", help="only these")
    parser.add_argument("--out", type=Path, help="a folder for ops.json")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    machine, lines = Machine.here(dtype), []
    for op, make in cases(device, dtype).items():
        if args.ops and op not in args.ops:
            continue
        case = make()
        with torch.no_grad():
            wide = [t.double() if t.is_floating_point() else t for t in case.inputs]
            # the same formula on the same numbers in float64; where it says float32 inside, it stays that
            truth = flat(list(case.ways.values())[-1](*wide))
        found = [row(way, case, truth, op=op, name=name, copy=machine.copy_gb_s) for name, way in case.ways.items()]
        lines += found
        show(found, title=f"{op}; {machine}")
    if args.out:
        save(args.out / "ops.json", machine, lines)


if __name__ == "__main__":
    main()
