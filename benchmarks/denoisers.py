"""A step of FLUX's and of Sana's transformer against diffusers', at real widths and few layers, in one run.

    python benchmarks/denoisers.py                                        # both denoisers, float32
    python benchmarks/denoisers.py --denoisers flux --side 512 --layers 1 2 --rounds 3
    python benchmarks/denoisers.py --compiled --dtype bfloat16 --layers 19 38 --side 1024     # on a GPU

Weights are random and shared: diffusers' modules hold views of ours. Velocities must agree within 1e-4 of the largest
before anything is timed (float32; in bfloat16 within 3e-2). Rounds go from rival to rival, and a ratio is of one round,
so that what else the machine does falls on all; times on a CPU are of the process, not of the wall. Rivals: `ours`, a
step of a loop whose conditions and modulations are known; `ours, with its share`, which adds what is computed once,
shared by the loop's steps; `nothing kept`, which computes it in every step; `diffusers`, whose step always does.
`--compiled` runs both sides through torch.compile, on a GPU as CUDA graphs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timing import Machine, show
from torch import Tensor, nn

from unimm.checkpoint.save import released_state_dict
from unimm.denoisers.flux import FluxConfig, FluxTransformer, flux_key_map, flux_position_ids
from unimm.denoisers.sana import KEY_MAP, TIMESTEP_SCALE, SanaConfig, SanaTransformer

# of the released config files; the layers are an option
FLUX = dict(
    in_channels=64, num_attention_heads=24, attention_head_dim=128, joint_attention_dim=4096, pooled_projection_dim=768,
    guidance_embeds=True, axes_dims_rope=[16, 56, 56],
)  # fmt: skip
SANA = dict(
    in_channels=32, out_channels=32, sample_size=16, num_attention_heads=70, attention_head_dim=32, caption_channels=2304,
    num_cross_attention_heads=20, cross_attention_head_dim=112, cross_attention_dim=2240, mlp_ratio=2.5,
)  # fmt: skip
TOY = {
    "flux": dict(num_attention_heads=2, attention_head_dim=16, axes_dims_rope=[4, 6, 6], joint_attention_dim=24),
    "sana": dict(num_attention_heads=4, attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=16)
    | dict(cross_attention_dim=32, caption_channels=24),
}
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Field:
    """A denoiser's rivals, each a step; what is computed once before the loop; and how much of a step's work that
    is."""

    steps: dict[str, Step]
    once: Step
    share: float
    title: str


def randomly(model: nn.Module) -> None:
    """Weights that let signals through, in place."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    for name, p in model.named_parameters():
        if name.endswith("table"):
            nn.init.normal_(p, std=0.3)


def same_weights(theirs: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """diffusers' module on our tensors."""
    theirs.load_state_dict(state, assign=True)
    return theirs.eval().requires_grad_(False)


def flux_field(args: argparse.Namespace, device: str, dtype: torch.dtype) -> Field:
    """FLUX.1-dev: modulations are linears of one vector, a text is projected."""
    from diffusers import FluxTransformer2DModel

    doubles, singles = args.layers
    files = FLUX | (TOY["flux"] if args.toy else {}) | {"num_layers": doubles, "num_single_layers": singles}
    config = FluxConfig.from_json(files)
    with torch.device(device):
        ours = FluxTransformer(config).to(dtype).eval().requires_grad_(False)
    randomly(ours)
    with torch.device("meta"):
        theirs = FluxTransformer2DModel.from_config(files)
    theirs = same_weights(theirs, released_state_dict(ours, flux_key_map(config)))
    side = args.side // 16
    rows = (args.rows, side * side, config.in_channels), (args.rows, args.text, config.text_dim)
    latents, text = (torch.randn(shape, device=device, dtype=dtype) for shape in rows)
    pooled, places = (
        torch.randn(args.rows, config.pooled_dim, device=device, dtype=dtype),
        flux_position_ids(side, side).to(device),
    )
    # diffusers rounds times and guidance, both times 1000, to the weights' dtype: numbers that bfloat16 holds
    now, guidance = torch.tensor([0.5], device=device), torch.tensor([4.0], device=device).expand(args.rows)
    times, text_places = torch.linspace(1, 0, args.steps + 1)[:-1].to(device), torch.zeros(args.text, 3, device=device)
    condition, modulation = ours.condition(text, places), ours.modulations(now, pooled, guidance=guidance)[0]
    run, other = (torch.compile(x, mode=args.mode) if args.compiled else x for x in (ours, theirs))

    def whole() -> Tensor:
        return run(latents, ours.condition(text, places), ours.modulations(now, pooled, guidance=guidance)[0])

    def once() -> Tensor:
        ours.condition(text, places)
        return ours.modulations(times, pooled, guidance=guidance)[0].final

    def diffusers() -> Tensor:
        time = now.expand(args.rows)
        return other(latents, text, pooled, time, places, text_places, guidance, return_dict=False)[0]

    steps = {
        "ours": lambda: run(latents, condition, modulation),
        "nothing kept": whole,
        "diffusers": diffusers,
    }
    kept = sum(m.weight.numel() for name, m in ours.named_modules() if name.endswith("modulation"))
    share = kept / sum(p.numel() for p in ours.parameters())
    title = f"flux, {doubles} double and {singles} single blocks, {args.side} px, {args.text} tokens of text"
    return Field(steps, once, share, f"{title}; modulation: {share:.0%} of the weights")


def sana_field(args: argparse.Namespace, device: str, dtype: torch.dtype) -> Field:
    """Sana 1.6B: a caption is projected, and its keys and values are, in every block."""
    from diffusers import SanaTransformer2DModel

    files = SANA | (TOY["sana"] if args.toy else {}) | {"num_layers": args.sana_layers}
    config = SanaConfig.from_json(files)
    with torch.device(device):
        ours = SanaTransformer(config).to(dtype).eval().requires_grad_(False)
    randomly(ours)
    with torch.device("meta"):
        theirs = SanaTransformer2DModel.from_config(files)
    theirs = same_weights(theirs, released_state_dict(ours, KEY_MAP))
    side, tokens = args.sana_side // 32, args.caption
    latents = torch.randn(args.rows, config.in_channels, side, side, device=device, dtype=dtype)
    caption = torch.randn(args.rows, tokens, config.caption_dim, device=device, dtype=dtype)
    times, condition = torch.full((args.rows,), 0.5, device=device), ours.condition(caption)
    run, other = (torch.compile(x, mode=args.mode) if args.compiled else x for x in (ours, theirs))
    steps = {
        "ours": lambda: run(latents, times, condition),
        "nothing kept": lambda: run(latents, times, ours.condition(caption)),
        "diffusers": lambda: other(latents, caption, TIMESTEP_SCALE * times, return_dict=False)[0],
    }
    # products a row, in units of the squared width: 13.5 a token of the image, 2 a token of the caption and block
    per_layer = (6 + 3 * config.mlp_ratio) * side**2
    kept = (2 * config.n_layers + 1 + config.caption_dim / config.dim) * tokens
    share = kept / (kept + config.n_layers * per_layer)
    title = f"sana, {config.n_layers} layers, {args.sana_side} px, {tokens} tokens of caption"
    return Field(steps, lambda: ours.condition(caption).tokens, share, f"{title}; caption: {share:.0%} of the products")


def clock(call: Step) -> float:
    """Milliseconds of one call: on a CPU of the processor's own time, which others on the machine take no part of."""
    if not torch.cuda.is_available():
        start = time.process_time()
        call()
        return 1e3 * (time.process_time() - start)
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def check(field: Field, dtype: torch.dtype) -> None:
    """All rivals give one velocity, or nothing is timed."""
    want = field.steps["diffusers"]()
    for name, step in field.steps.items():
        off = float((step() - want).abs().max() / want.abs().max())
        if not off <= CLOSE[dtype]:
            raise SystemExit(f"{field.title}: {name} is {off:.1e} off diffusers', nothing is timed")
        print(f"{name}: {off:.1e} of the largest off diffusers'")


def race(field: Field, rounds: int, n_steps: int) -> list[dict[str, Any]]:
    """A row a rival: the median step, and the ratios to diffusers' of every round."""
    calls = field.steps | {"once": field.once}
    ms: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            ms[name].append(clock(call))
    once = ms.pop("once")
    ms["ours, with its share"] = [step + one / n_steps for step, one in zip(ms["ours"], once, strict=True)]
    rows: list[dict[str, Any]] = []
    for name, found in ms.items():
        ratios = [theirs / our for theirs, our in zip(ms["diffusers"], found, strict=True)]
        row = {"rival": name, "ms a step": statistics.median(found), "least ms": min(found)}
        rows.append(row | {"times diffusers": statistics.median(ratios), "least": min(ratios), "most": max(ratios)})
    saved = [1 - our / whole for our, whole in zip(ms["ours"], ms["nothing kept"], strict=True)]
    return [*rows, {"rival": "saved by keeping, %", "ms a step": 100 * statistics.median(saved)}]


def options() -> argparse.Namespace:
    """The command line."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--denoisers", nargs="+", choices=["flux", "sana"], default=["flux", "sana"])
    parser.add_argument(
        "--layers", type=int, nargs=2, default=[19, 38] if gpu else [1, 1], help="of FLUX: double, single"
    )
    parser.add_argument("--sana-layers", type=int, default=20 if gpu else 2)
    parser.add_argument("--side", type=int, default=1024 if gpu else 256, help="pixels of FLUX's image")
    parser.add_argument("--sana-side", type=int, default=512)
    parser.add_argument("--text", type=int, default=512 if gpu else 128, help="tokens of FLUX's text")
    parser.add_argument("--caption", type=int, default=256, help="tokens of Sana's: MetaQuery's queries")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--steps", type=int, default=28, help="of the loop that shares what is computed once")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if gpu else "float32")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--mode", default="reduce-overhead" if gpu else "default", help="of torch.compile")
    parser.add_argument("--toy", action="store_true", help="narrow, to try the script")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    args = options()
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    for name in args.denoisers:
        field = {"flux": flux_field, "sana": sana_field}[name](args, args.device, dtype)
        check(field, dtype)
        rows = race(field, args.rounds, args.steps)
        how = f"{args.rows} rows, {args.dtype}{', compiled' if args.compiled else ''}, {args.rounds} rounds"
        show(rows, title=f"{field.title}; {how}; {Machine.here(dtype)}")


if __name__ == "__main__":
    main()
