"""A step of generating, plain, compiled, and on a GPU recorded as a CUDA graph: milliseconds, and what compiling takes.

    python benchmarks/compiled.py                                        # two bundled models
    python benchmarks/compiled.py --models metaquery-nano --rounds 1     # another, the shortest way
    python benchmarks/compiled.py --models bagel-7b --layers 28 --side 1024   # released widths, random weights
    python benchmarks/compiled.py --models janus-7b --layers 30

The steps are those of one call of `generate`, one after the other; the first ones, which compile and record, do not count. A
row is printed as soon as it is there, and torch keeps what it compiled for the next time (TORCHINDUCTOR_CACHE_DIR).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import denoise
import janus_decode
import torch
from timing import Machine, show
from torch import Tensor

from unimm.models.registry import load

NANOS = ("bagel-nano", "janus-nano", "janusflow-nano", "metaquery-nano", "uniworld-nano")
RANDOM = ("bagel-7b", "janus-1b", "janus-7b")
# of each step the first ones, which warm up and record
UNCOUNTED = 3
STEPS = 12


def now() -> float:
    """Seconds, when the device has done what it was asked."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def build(name: str, args: argparse.Namespace, dtype: torch.dtype, device: str) -> tuple[Any, Callable[[], Any]]:
    """A model, and a call that takes STEPS steps."""
    if name == "bagel-7b":
        model, _ = denoise.build(args.layers, args.side, dtype, device)
        return model, lambda: random_bagel_steps(model, args.side)
    if name in RANDOM:
        janus = janus_decode.build(name.removeprefix("janus-"), args.layers, dtype, device)
        greedy = janus_decode.ours(janus)
        return janus, lambda: greedy(list(range(6, 306)), 1, STEPS)
    model = load(name, dtype=dtype, device=device)
    steps = {} if name == "janus-nano" else {"steps": STEPS}
    return model, lambda: model.generate("a red circle left of a blue square", seed=1, **steps)


@torch.inference_mode()
def random_bagel_steps(model: Any, side: int) -> Tensor:
    """An image after a text of forty words, guided."""
    contexts = model.append_text(model.start_contexts(1, None), [model.processor.text_part(list(range(5, 45)))])
    noise = model.initial_noise((side, side), torch.Generator().manual_seed(0))
    guidance = [model.config.defaults.generate_guidance]
    return model.denoise(contexts, [noise], [(side, side)], guidance=guidance, steps=STEPS, timestep_shift=3.0)[0]


def step_times(model: Any, call: Callable[[], Any]) -> list[float]:
    """Milliseconds of each step of a call."""
    method = "decode_image_step" if type(model).__name__ == "Janus" else "denoise_step"
    plain = getattr(model, method)
    found = []

    def timed(*args: Any, **options: Any) -> Any:
        began = now()
        result = plain(*args, **options)
        found.append(1e3 * (now() - began))
        return result

    with patch.object(model, method, timed):
        call()
    return found


def race(name: str, args: argparse.Namespace, dtype: torch.dtype, device: str) -> list[dict[str, Any]]:
    """A row for each way."""
    torch.compiler.reset()
    model, call = build(name, args, dtype, device)
    rows = []
    for way in ("plain", "compiled", *(["recorded too"] if device == "cuda" else [])):
        began = now()
        if way != "plain":
            model.compile(cuda_graphs=way == "recorded too")
            call()
        first = now() - began
        ms = [one for _ in range(args.rounds) for one in step_times(model, call)[UNCOUNTED:]]
        rows.append({
            "model": name,
            "way": way,
            "ms a step": statistics.median(ms),
            "least": min(ms),
            "times plain": rows[0]["ms a step"] / statistics.median(ms) if rows else 1.0,
            "s for the first call": first if way != "plain" else None,
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[*NANOS, *RANDOM], default=["janus-nano", "bagel-nano"])
    parser.add_argument("--layers", type=int, default=2, help="of random models")
    parser.add_argument("--side", type=int, default=256, help="pixels of random BAGEL's image")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if gpu else "float32")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    rows = [row for name in args.models for row in race(name, args, dtype, "cuda" if gpu else "cpu")]
    show(rows, title=f"{STEPS} steps, {args.rounds} rounds; {Machine.here(dtype)}")


if __name__ == "__main__":
    main()
