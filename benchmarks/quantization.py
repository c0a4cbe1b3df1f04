"""Weights in few bits: what they cost in exactness and accuracy, and what int8 on a CPU gains in speed at real widths.

    python benchmarks/quantization.py                        # all four parts
    python benchmarks/quantization.py --only exactness golden
    python benchmarks/quantization.py --only accuracy --models bagel-nano --n 40 --tasks draw.one
    python benchmarks/quantization.py --only speed --dim 4096 --mlp 11008

Exactness: the relative error |y - y'| / |y| of the last layer's values after a text of 64 random ids, and for families
that denoise the mean difference of the pixels, of 255, of one image of ten steps from one seed. Golden: the stored outputs
of the originals (tests/golden), computed with weights in few bits: the median of their relative errors, and the greatest.
Accuracy: the part of examples of the shapes world that is right, as `unimm eval shapes` scores it. Speed: one block's seven
linears (q, k, v, output, gate, up, down) for a few rows, as decoding has them: plain in bfloat16, packed as float16, and in
int8.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
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
            row["outputs"] = len(errors)
            row[quantize] = f"{statistics.median(errors):.3g} ({max(errors):.3g})"
        rows.append(row)
    show(rows, title="against the originals' stored outputs: the median of the relative errors (the greatest)")


def accuracy(names: Sequence[str], tasks: Sequence[str] | None, n: int, out: Path) -> None:
    """The table of what small models get right, and of its paired difference to full precision with the 95 % interval.

    out: the folder of the runs, each of which goes on where it was stopped.
    """
    from unimm.evaluation.benchmarks.base import BenchmarkOptions
    from unimm.evaluation.benchmarks.shapes import ShapesBenchmark
    from unimm.evaluation.results import compare_results
    from unimm.evaluation.run import run_benchmark
    from unimm.evaluation.setup import model_source, prepare_judge
    from unimm.models.load_options import LoadOptions

    options = BenchmarkOptions(n=n, seed=1, tasks=tasks and tuple(tasks))
    for name in names:
        results = {}
        for quantize in (None, *WEIGHT_FORMATS):
            benchmark = ShapesBenchmark(options)
            source = model_source(name, "shapes", load=LoadOptions(quantize=quantize))
            judge = prepare_judge(None, benchmark, device="cpu", dtype="float32")
            folder = out / f"{name}-{quantize or 'float32'}"
            results[quantize] = run_benchmark(benchmark, source, judge, folder, progress=False).result
        whole = results.pop(None)
        differences = {quantize: compare_results(whole, result) for quantize, result in results.items()}
        rows = [
            {"task": task, "float32": f"{one.a:.3f}"}
            | {
                quantize: f"{theirs[task].b:.3f} ({theirs[task].low:+.3f} to {theirs[task].high:+.3f})"
                for quantize, theirs in differences.items()
            }
            for task, one in differences["int8"].items()
        ]
        show(rows, title=f"{name} in the shapes world, n = {n} a task: the part that is right (95 % of the difference)")


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
    parser.add_argument("--models", nargs="+", choices=NANOS, default=NANOS, help="of exactness and accuracy")
    parser.add_argument("--cases", nargs="+", choices=GOLDEN, default=GOLDEN, help="of the stored outputs")
    parser.add_argument("--tasks", nargs="+", help="of the accuracy; all but those after reasoning unless given")
    parser.add_argument("--n", type=int, default=50, help="examples of a task")
    parser.add_argument("--out", type=Path, help="where the runs of the accuracy are kept, to be gone on with")
    parser.add_argument("--dim", type=int, default=2048, help="Janus-Pro-1B's unless given")
    parser.add_argument("--mlp", type=int, default=5632)
    args = parser.parse_args()
    if "exactness" in args.only:
        exactness(args.models)
    if "golden" in args.only:
        golden(args.cases)
    if "accuracy" in args.only:
        with tempfile.TemporaryDirectory(prefix="unimm-quantization-") as folder:
            accuracy(args.models, args.tasks, args.n, args.out or Path(folder))
    if "speed" in args.only:
        speed(args.dim, args.mlp)
    print(Machine.here(torch.bfloat16))


if __name__ == "__main__":
    main()
