"""One denoising step of BAGEL at real widths and few layers: how long it takes, and where the time goes.

    python benchmarks/denoise.py                          # the 7B's widths, 2 layers, a 512 x 512 picture, all three branches
    python benchmarks/denoise.py --layers 1 --side 256

Weights are random: only shapes matter. The main context holds a text and an input picture, as in an edit.
"""

from __future__ import annotations

import argparse

import torch
from timing import Machine, measure, show
from torch.profiler import ProfilerActivity, profile

from unimm.generation.guidance import Guidance
from unimm.models.bagel.cfg_contexts import CONTEXT_NAMES, CFGContexts
from unimm.models.bagel.config import BagelConfig
from unimm.models.bagel.latent_denoiser import LatentDenoiser
from unimm.models.bagel.model import Bagel
from unimm.models.bagel.processor import BagelSpecialTokens

LLM = dict(
    hidden_size=3584, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944, vocab_size=1024,
    max_position_embeddings=32768, rope_theta=1e6, rms_norm_eps=1e-6, hidden_act="silu",
)  # fmt: skip
VIT = dict(
    hidden_size=1152, num_hidden_layers=2, num_attention_heads=16, intermediate_size=4304, patch_size=14, image_size=980
)
# where an operation's own time belongs, by the beginning of its name; the rest is "other"
GROUPS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul", "aten::_scaled", "mkldnn"),
    "attention": (
        "aten::_scaled_dot",
        "aten::_flash",
        "aten::_efficient",
        "unimm::attention",
        "forward_kernel",
        "decode",
    ),
    "norms, rotary, gates": (
        "aten::mul",
        "aten::pow",
        "aten::mean",
        "aten::rsqrt",
        "aten::silu",
        "aten::add",
        "unimm::",
    ),
    "moving": (
        "aten::index",
        "aten::cat",
        "aten::copy_",
        "aten::_to_copy",
        "aten::clone",
        "aten::scatter",
        "aten::gather",
    ),
}


def group(name: str) -> str:
    """The group of an operation; attention's own names before the products' shorter ones."""
    order = ("attention", "products", "moving", "norms, rotary, gates")
    return next((found for found in order if name.startswith(GROUPS[found])), "other")


def build(layers: int, side: int, dtype: torch.dtype, device: str) -> tuple[Bagel, LatentDenoiser]:
    """A random model, and a denoiser over three different contexts."""
    markers = BagelSpecialTokens(bos=1, eos=2, boi=3, eoi=4)
    top = {"vae_config": {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}, "new_token_ids": markers.to_json()}
    torch.manual_seed(0)
    with torch.device(device):
        model = Bagel(BagelConfig.from_json({**LLM, "num_hidden_layers": layers}, VIT, top)).to(dtype).eval()
    latent = torch.randn(
        model.config.vae.latent_channels, side // model.config.vae.stride, side // model.config.vae.stride
    )
    seen = model.processor.vit_part(torch.randn(3, side // 14 * 14, side // 14 * 14))
    contexts = model.append_images([CFGContexts()], [[([model.processor.latent_part(latent), seen], (side, side))]])
    contexts = model.append_text(contexts, [model.processor.text_part(list(range(5, 45)))])
    return model, model.latent_denoiser(contexts, [(side, side)], guidance=[Guidance()])


@torch.inference_mode()
def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28 if gpu else 2)
    parser.add_argument("--side", type=int, default=1024 if gpu else 512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    args = parser.parse_args()
    dtype, device = getattr(torch, args.dtype), "cuda" if gpu else "cpu"
    model, denoiser = build(args.layers, args.side, dtype, device)
    x = torch.randn(sum(denoiser.n_tokens), model.config.latent_dim, device=device)
    branches = [(0, name) for name in CONTEXT_NAMES]
    timesteps = torch.tensor([0.5], dtype=torch.float64)

    def step() -> list[torch.Tensor]:
        return model.denoiser_states(denoiser, x, timesteps, branches)

    times = measure(step, seconds=5.0)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as found:
        step()
    spent: dict[str, list[float]] = {}
    for event in found.key_averages():
        own = event.self_device_time_total if gpu else event.self_cpu_time_total
        entry = spent.setdefault(group(event.key), [0.0, 0])
        entry[0] += own / 1e3
        entry[1] += event.count if own else 0
    total = sum(ms for ms, _ in spent.values())
    rows = [
        {"part": name, "ms": ms, "%": 100 * ms / total, "calls": int(calls)}
        for name, (ms, calls) in sorted(spent.items(), key=lambda item: -item[1][0])
    ]
    what = f"{args.layers} layers, {args.side} px, {args.dtype}, 3 branches"
    title = f"{what}: {times.median:.1f} ms a step ({times.p20:.1f} - {times.p80:.1f}); {Machine.here(dtype)}"
    show(rows, title=title)


if __name__ == "__main__":
    main()
