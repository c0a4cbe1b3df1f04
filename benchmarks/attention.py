"""Generalized causal attention against its rivals, on the packs that the families train on.

    python benchmarks/attention.py                       # what this machine can do, checked first, then timed
    python benchmarks/attention.py --tokens 8192 16384 --layouts edit --out results

Each row is first compared with float64 on sampled rows; a backend that is off is reported and not timed. Useful work is
4 * visible pairs * H * K operations forward (two products), 2.5 times that backward (five).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import Machine, measure, peak_megabytes, relative_error, save, show
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from unimm.kernels import AttentionMask, KeyRange, attention, use_kernels

# tokens of a 512 x 512 image: latents by 16 pixels, patches by 14, two markers each
LATENT, PATCHES = 32 * 32 + 2, 36 * 36 + 2
LAYOUTS = ("t2i", "edit", "interleaved", "vlm", "causal")
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
BACKWARD_WORK = 2.5


def sample(layout: str, dice: random.Random) -> list[KeyRange]:
    """One training sample of a layout: BAGEL's plans (texts causal, images full, targets invisible), Janus's causal
    one."""
    text = lambda low, high: KeyRange(dice.randint(low, high))  # noqa: E731
    clean, seen, target = (
        KeyRange(LATENT, full=True),
        KeyRange(PATCHES, full=True),
        KeyRange(LATENT, full=True, visible=False),
    )
    plans: dict[str, Callable[[], list[KeyRange]]] = {
        "t2i": lambda: [text(20, 120), target],
        "edit": lambda: [clean, seen, text(10, 40), target],
        "interleaved": lambda: [part for _ in range(3) for part in (text(20, 80), target, clean, seen)],
        "vlm": lambda: [seen, text(100, 600)],
        "causal": lambda: [KeyRange(dice.randint(600, 1200))],
    }
    return plans[layout]()


def packed(layout: str, tokens: int, device: str) -> AttentionMask:
    """Samples of a layout until the pack is full; the last one is cut to fit."""
    dice, samples, room = random.Random(f"{layout}/{tokens}"), [], tokens
    while room:
        blocks = []
        for block in sample(layout, dice):
            length = min(block.length, room)
            room -= length
            blocks += [KeyRange(length, full=block.full, visible=block.visible)] if length else []
        samples.append(blocks)
    return AttentionMask(samples, device=device)


def rivals(mask: AttentionMask, device: str) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Every way to compute the same, by name, and the ceiling: attention without a mask, which is another result."""

    def ours(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with use_kernels(name):
                return attention(q, k, v, mask)

        return call

    dense = mask.dense()[None]
    return {
        **({"triton": ours("triton")} if device == "cuda" else {}),
        "sdpa": ours("sdpa"),
        "flex": ours("flex") if device == "cuda" else compiled_flex(mask),
        "sdpa, dense mask": lambda q, k, v: by_heads(q, k, v, dense),
        "sdpa, no mask (ceiling)": lambda q, k, v: by_heads(q, k, v, None),
    }


def by_heads(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    """torch's own attention over the whole pack."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, allowed, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)


def compiled_flex(mask: AttentionMask) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention, compiled, with the tiles that the mask gives; forward only on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    blocks, compiled = mask.block_mask(128, 128), torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)

    return call


def truth(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, rows: Tensor) -> Tensor:
    """The definition in float64 for some rows."""
    q, k, v = (x.double() for x in (q[rows], k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("nhk,mhk->hnm", q, k) * q.shape[2] ** -0.5
    scores = scores.masked_fill(~mask.dense()[rows], float("-inf"))
    return torch.einsum("hnm,mhk->nhk", scores.softmax(-1), v)


def row(
    call: Callable[..., Tensor], inputs: tuple[Tensor, ...], mask: AttentionMask, *, name: str, layout: str, peak: float
) -> dict:
    """One line: right, then fast. peak: of the machine's matrix products, TFLOP/s."""
    q, k, v = inputs
    n, heads, width = q.shape
    rows = torch.randperm(n, device=q.device)[:64]
    ceiling = "ceiling" in name
    line: dict[str, Any] = {
        "layout": layout, "tokens": n, "samples": len(mask.samples), "visible": round(mask.spans.n_visible_pairs / n**2, 4),
        "heads": f"{heads}/{k.shape[1]}/{width}", "dtype": str(q.dtype).removeprefix("torch."), "backend": name,
    }  # fmt: skip
    with torch.no_grad():
        error = None if ceiling else relative_error(call(q, k, v)[rows], truth(q, k, v, mask, rows))
    line |= {"error": error}
    if error is not None and not error < ALLOWED[q.dtype]:
        return line | {"note": "off: not timed"}
    pairs = n**2 if ceiling else mask.spans.n_visible_pairs
    work = 4 * pairs * heads * width
    with torch.no_grad():
        forward = measure(lambda: call(q, k, v))
        memory = peak_megabytes(lambda: call(q, k, v))
    rate = work / forward.median / 1e9
    line |= {"fwd ms": forward.median, "p20": forward.p20, "p80": forward.p80, "TFLOP/s": rate}
    line |= {"% of peak": 100 * rate / peak, "peak MB": memory}
    if name == "flex" and q.device.type == "cpu":
        return line | {"note": "no backward on a CPU"}
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = call(*leaves)
    grad = torch.randn_like(out)
    backward = measure(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))
    return line | {"bwd ms": backward.median, "bwd TFLOP/s": BACKWARD_WORK * work / backward.median / 1e9, "note": ""}


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 32768] if gpu else [2048, 4096])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument(
        "--heads", type=int, nargs=3, default=[28, 4, 128] if gpu else [16, 16, 64], metavar=("H", "G", "K")
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16" if gpu else "float32")
    parser.add_argument("--backends", nargs="+", help="only these rows")
    parser.add_argument("--out", type=Path, help="a folder for attention.json and attention.png")
    args = parser.parse_args()
    dtype, device = getattr(torch, args.dtype), "cuda" if gpu else "cpu"
    machine = Machine.here(dtype)
    heads, kv_heads, width = args.heads
    lines = []
    for layout in args.layouts:
        for tokens in args.tokens:
            mask = packed(layout, tokens, device)
            generator = torch.Generator().manual_seed(tokens)
            shapes = ((tokens, heads, width), (tokens, kv_heads, width), (tokens, kv_heads, width))
            inputs = tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
            found = [
                row(call, inputs, mask, name=name, layout=layout, peak=machine.matmul_tflop_s)
                for name, call in rivals(mask, device).items()
                if not args.backends or name in args.backends
            ]
            best = next((line["fwd ms"] for line in found if line["backend"] == "flex" and "fwd ms" in line), None)
            lines += [
                line | {"vs flex": best / line["fwd ms"] if best and "fwd ms" in line else None} for line in found
            ]
            show(lines[-len(found) :], title=f"{layout}, {tokens} tokens; {machine}")
    if args.out:
        save(args.out / "attention.json", machine, lines)
        plot(args.out / "attention.png", machine, lines)


def plot(path: Path, machine: Machine, lines: list[dict]) -> None:
    """Useful work a second by layout and backend, at the longest pack."""
    import matplotlib.pyplot as plt

    longest = max(line["tokens"] for line in lines)
    lines = [line for line in lines if line["tokens"] == longest and "TFLOP/s" in line]
    layouts, backends = (list(dict.fromkeys(line[name] for line in lines)) for name in ("layout", "backend"))
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    for i, backend in enumerate(backends):
        rates = {line["layout"]: line["TFLOP/s"] for line in lines if line["backend"] == backend}
        at = [j + (i - (len(backends) - 1) / 2) * 0.8 / len(backends) for j in range(len(layouts))]
        axis.bar(at, [rates.get(layout, 0.0) for layout in layouts], 0.8 / len(backends), label=backend)
    axis.set_xticks(range(len(layouts)), layouts)
    axis.set_ylabel("useful TFLOP/s, forward")
    axis.set_title(f"{longest} tokens, {machine.device}, {machine.dtype}")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
