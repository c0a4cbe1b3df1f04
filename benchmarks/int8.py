"""Int8 on a CPU: what it costs in exactness on the nanos, and what it gains in speed at real widths.

    python benchmarks/int8.py                      # both
    python benchmarks/int8.py --only speed --dim 4096 --mlp 11008

Exactness: the relative error |y - y'| / |y| of the last layer's values after a text of 64 random ids, and for families
that denoise the mean difference of the pixels, of 255, of one image of ten steps from one seed. Speed: one block's
seven linears (q, k, v, output, gate, up, down) for a few rows, as decoding has them: plain in bfloat16, packed as
float16, and in int8.
"""

from __future__ import annotations

import argparse

import torch
from timing import Machine, measure, show
from torch import Tensor, nn

import unimm
from unimm.generation.kv_cache import EMPTY_CACHE
from unimm.models.base import UnifiedModel
from unimm.nn.packed_linear import optimize_for_cpu
from unimm.sequence.parts import text_part

NANOS = ("bagel-nano", "janus-nano", "janusflow-nano", "metaquery-nano", "uniworld-nano")
IDS = 64


def last_values(model: UnifiedModel, ids: list[int]) -> Tensor:
    """The last layer's values after a text."""
    (cache,) = getattr(model, "mllm", model).prefill([EMPTY_CACHE], [[text_part(ids)]])
    return cache.chunks[0][-1, 1].double()


def pixels(model: UnifiedModel) -> Tensor:
    """One image of ten steps, as numbers up to 255."""
    image = model.generate("a red circle left of a blue square", **model.supported_options(steps=10)).image
    return torch.tensor(list(image.convert("RGB").tobytes())).double()


def exactness() -> None:
    """The table of errors."""
    rows = []
    for name in NANOS:
        whole, small = unimm.load(name), unimm.load(name, quantize="int8")
        torch.manual_seed(0)
        ids = torch.randint(5, 200, (IDS,)).tolist()
        truth, got = last_values(whole, ids), last_values(small, ids)
        row = {"model": name, "relative error": float((got - truth).norm() / truth.norm())}
        if whole.supports_steps:
            row["pixels"] = float((pixels(whole) - pixels(small)).abs().mean())
        rows.append(row)
    show(rows, title="int8 against float32")


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
    parser.add_argument("--only", choices=["exactness", "speed"])
    parser.add_argument("--dim", type=int, default=2048, help="Janus-Pro-1B's unless given")
    parser.add_argument("--mlp", type=int, default=5632)
    args = parser.parse_args()
    if args.only != "speed":
        exactness()
    if args.only != "exactness":
        speed(args.dim, args.mlp)
    print(Machine.here(torch.bfloat16))


if __name__ == "__main__":
    main()
