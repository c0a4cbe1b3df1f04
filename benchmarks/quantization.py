"""Weights in few bits: what they cost in exactness and accuracy, and what int8 on a CPU gains in speed at real widths.

    python benchmarks/quantization.py                        # all four parts
    python benchmarks/quantization.py --only exactness golden
    python benchmarks/quantization.py --only accuracy --n 40 --tasks draw.one answer.count
    python benchmarks/quantization.py --only speed --dim 4096 --mlp 11008

Exactness: the relative error |y - y'| / |y| of the last layer's values after a text of 64 random ids, and for families
that denoise the mean difference of the pixels, of 255, of one image of ten steps from one seed. Golden: the stored outputs
of the originals (tests/golden), computed with weights in few bits: the median of their relative errors. Accuracy: the
part of examples of the shapes world that bagel-nano gets right. Speed: one block's seven linears (q, k, v, output, gate, up,
down) for a few rows, as decoding has them: plain in bfloat16, packed as float16, and in int8.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import torch
from timing import Machine, measure, show
from torch import Tensor, nn

import unimm
from unimm.generation.kv_cache import EMPTY_CACHE
from unimm.kernels.weight_formats import WEIGHT_FORMATS
from unimm.models.base import UnifiedModel
from unimm.nn.packed_linear import optimize_for_cpu
from unimm.sequence.parts import text_part

ROOT = Path(__file__).parents[1]
NANOS = ("bagel-nano", "janus-nano", "janusflow-nano", "metaquery-nano", "uniworld-nano")
GOLDEN = ("bagel/dev", "janus/dev", "janus/flow_dev", "metaquery/dev", "uniworld/dev")
PARTS = ("exactness", "golden", "accuracy", "speed")
IDS = 64


def last_values(model: UnifiedModel, ids: list[int]) -> Tensor:
    """The last layer's values after a text."""
    (cache,) = getattr(model, "mllm", model).prefill([EMPTY_CACHE], [[text_part(ids)]])
    return cache.chunks[0][-1, 1].double()


def pixels(model: UnifiedModel) -> Tensor:
    """One image of ten steps, as numbers up to 255."""
    image = model.generate("a red circle left of a blue square", **model.supported_options(steps=10)).image
    return torch.tensor(list(image.convert("RGB").tobytes())).double()


def exactness(names: Sequence[str]) -> None:
    """The table of errors of the small models."""
    rows = []
    for name in names:
        whole = unimm.load(name)
        torch.manual_seed(0)
        ids = torch.randint(5, 200, (IDS,)).tolist()
        truth, drawn = last_values(whole, ids), pixels(whole) if whole.supports_steps else None
        row: dict[str, object] = {"model": name}
        for quantize in WEIGHT_FORMATS:
            small = unimm.load(name, quantize=quantize)
            row[quantize] = float((last_values(small, ids) - truth).norm() / truth.norm())
            if drawn is not None:
                row[f"{quantize}, pixels"] = float((pixels(small) - drawn).abs().mean())
        rows.append(row)
    show(rows, title="against float32: relative error, and mean difference of pixels")


@contextmanager
def loaded_in(quantize: str) -> Iterator[None]:
    """Let all models that the body loads have weights in few bits."""
    load = UnifiedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def load_rounded(cls: type[UnifiedModel], *args: object, **options: object) -> UnifiedModel:
        return load(cls, *args, quantize=quantize, **options)

    with mock.patch.object(UnifiedModel, "from_pretrained", classmethod(load_rounded)):
        yield


class NoGradientError(RuntimeError):
    """A check came to the gradients of a training, which weights in few bits have none of."""


@contextmanager
def gradients_refused() -> Iterator[None]:
    """Raise NoGradientError where the body asks for gradients: checks compare those after all else."""

    def refuse(*args: object, **options: object) -> None:
        raise NoGradientError

    with mock.patch.object(Tensor, "backward", refuse), mock.patch.object(torch.autograd, "grad", refuse):
        yield


def golden(names: Sequence[str]) -> None:
    """The table of errors against the originals' stored outputs."""
    sys.path.insert(0, str(ROOT))
    from parity.case import Case
    from parity.runner import check

    rows = []
    for name in names:
        row: dict[str, object] = {"case": name}
        for quantize in WEIGHT_FORMATS:
            errors: list[float] = []

            def compare(case: Case, key: str, ours: Tensor, errors: list[float] = errors, **options: object) -> None:
                stored = case.tensors.get(key)
                if stored is not None and stored.is_floating_point() and stored.shape == ours.shape and stored.any():
                    ours = ours.detach().double()
                    errors.append(float((ours - stored.double()).norm() / stored.double().norm()))

            comparing = mock.patch.object(Case, "compare", compare)
            with loaded_in(quantize), comparing, suppress(NoGradientError), gradients_refused():
                check(ROOT / "tests" / "golden" / name)
            row[quantize] = statistics.median(errors)
            row["outputs"] = len(errors)
        rows.append(row)
    show(rows, title="against the originals' stored outputs: the median of the relative errors")


def accuracy(tasks: Sequence[str], n: int) -> None:
    """The table of what bagel-nano gets right, with 95 % intervals."""
    from unimm.evaluation.benchmarks.shapes import evaluate

    rows = []
    for quantize in (None, *WEIGHT_FORMATS):
        model = unimm.load("bagel-nano", quantize=quantize)
        scores = evaluate(model, n=n, seed=1, tasks=tasks, progress=False)
        shown = {task: f"{one.accuracy:.3f} ({one.low:.3f}-{one.high:.3f})" for task, one in scores.items()}
        rows.append({"quantize": str(quantize), **shown})
        print(rows[-1], flush=True)
    show(rows, title=f"bagel-nano in the shapes world, n = {n}")


class Block(nn.Module):
    """The linears of a decoder's block, one after the other."""

    def __init__(self, dim: int, mlp: int):
        super().__init__()
        self.square = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.up = nn.ModuleList(nn.Linear(dim, mlp, bias=False) for _ in range(2))
        self.down = nn.Linear(mlp, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for linear in (*self.square, *self.up):
            y = linear(x)
        return self.down(y)


@torch.inference_mode()
def speed(dim: int, mlp: int) -> None:
    """The table of milliseconds."""
    block = Block(dim, mlp).bfloat16()
    kinds = {
        "bfloat16": block,
        "packed float16": optimize_for_cpu(block),
        "int8": optimize_for_cpu(block, int8=("square", "up", "down")),
    }
    rows = []
    for n in (1, 2, 8, 64):
        x = torch.randn(n, dim).bfloat16()
        times = {kind: measure(lambda one=one, x=x: one(x), seconds=2.0).median for kind, one in kinds.items()}  # type: ignore[misc]
        gains = {f"{kind}, times": times["bfloat16"] / times[kind] for kind in list(kinds)[1:]}
        rows.append({"rows": n, **{f"{kind} ms": ms for kind, ms in times.items()}, **gains})
    show(rows, title=f"the linears of a block, {dim} x {mlp}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--models", nargs="+", choices=NANOS, default=NANOS, help="of the exactness")
    parser.add_argument("--cases", nargs="+", choices=GOLDEN, default=GOLDEN, help="of the stored outputs")
    parser.add_argument("--tasks", nargs="+", default=["draw.one", "draw.count", "answer.count", "answer.relation"])
    parser.add_argument("--n", type=int, default=40, help="examples of a task")
    parser.add_argument("--dim", type=int, default=2048, help="Janus-Pro-1B's unless given")
    parser.add_argument("--mlp", type=int, default=5632)
    args = parser.parse_args()
    if "exactness" in args.only:
        exactness(args.models)
    if "golden" in args.only:
        golden(args.cases)
    if "accuracy" in args.only:
        accuracy(args.tasks, args.n)
    if "speed" in args.only:
        speed(args.dim, args.mlp)
    print(Machine.here(torch.bfloat16))


if __name__ == "__main__":
    main()
