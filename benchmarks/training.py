"""A training step of BAGEL and of Janus, packed as ours is against padded with a dense mask, in one run.

    OMP_NUM_THREADS=1 python benchmarks/training.py                        # BAGEL-7B's widths, one layer
    OMP_NUM_THREADS=1 python benchmarks/training.py --family janus         # Janus-Pro-7B's
    python benchmarks/training.py --family bagel --way packed --rounds 1   # one way alone, to time the process from outside

Weights are random: only shapes matter. Texts' vocabulary is small, autoencoders are left out (latents and image tokens are
given), the vision encoder has as many layers as the decoder. Both ways run the same network on the same samples with the
same noise, and the same losses to rounding, which is checked first. The plain way pads every sample to the longest and
hides what a row must not see by a mask [B, 1, L, L] that is added to the scores, as code without packing does; it is
given to PyTorch's attention. A step is forward and backward; optimisers do the same in both ways.

Rounds go from way to way. MFU is the FLOPs that the samples need (unimm.models.<family>.flops; padding needs none) over
the step's time and the peak, a matrix product timed in the same round. On a CPU the time is the processor's own, which
other work on the machine changes less than the clock's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from timing import Machine, show
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from unimm.kernels import AttentionMask
from unimm.models.bagel.config import BagelConfig
from unimm.models.bagel.flops import bagel_flops
from unimm.models.bagel.network import BagelNetwork
from unimm.models.bagel.processor import BagelSpecialTokens
from unimm.models.janus.config import JanusConfig
from unimm.models.janus.flops import janus_flops
from unimm.models.janus.network import JanusNetwork
from unimm.sequence.packing import PackedBatch, pack_sequences
from unimm.sequence.parts import Part, image_part, text_part

WAYS = ("packed", "padded")
VOCAB = 1024
# of the released config files: width, feed-forward, heads, key/value heads; and one for the tests
WIDTHS = {
    "bagel": {"7b": (3584, 18944, 28, 4), "toy": (64, 96, 4, 2)},
    "janus": {"7b": (4096, 11008, 32, 32), "toy": (64, 96, 4, 4)},
}
# of BAGEL's images at 256 pixels: tokens of latents, patches of the ViT; of Janus's at 384: features, image tokens
BAGEL_LATENTS = 256
BAGEL_PATCHES = 324
JANUS_TOKENS = 576
# ids of a question and of an answer, of a prompt
QUESTION = 30
ANSWER = 80
PROMPTS = (25, 60, 110)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A network, the samples of its batch, and its loss on a batch of them."""

    network: nn.Module
    samples: Sequence[Sequence[Part]]
    loss: Callable[[PackedBatch], Tensor]
    # where its attention is called from
    module: str
    flops: Callable[[PackedBatch], int]


def random_weights(network: nn.Module) -> nn.Module:
    """The network, built without memory, with small random weights."""
    network.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    for tensor in (*network.parameters(), *network.buffers()):
        nn.init.normal_(tensor, std=0.02)
    return network.train()


def answer(n: int) -> Part:
    """A text of which every row has a label."""
    return text_part(list(range(5, 5 + n)), labels=list(range(6, 6 + n)))


def prompt(n: int) -> Part:
    """A text without labels."""
    return text_part(list(range(5, 5 + n)))


def bagel_step(size: str, layers: int, *, copies: int = 1) -> Step:
    """Two prompts with their images, an edit (clean latents, patches, instruction, noised latents), a question."""
    dim, mlp, heads, kv_heads = WIDTHS["bagel"][size]
    llm = dict(
        hidden_size=dim, num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=mlp, vocab_size=VOCAB,
        max_position_embeddings=32768, rope_theta=1e6, rms_norm_eps=1e-6, hidden_act="silu", num_hidden_layers=layers,
    )  # fmt: skip
    vit = dict(hidden_size=1152, num_attention_heads=16, intermediate_size=4304, patch_size=14, image_size=980)
    vit |= {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96} if size == "toy" else {}
    markers = BagelSpecialTokens(bos=1, eos=2, boi=3, eoi=4)
    vae = {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    with torch.device("meta"):
        config = BagelConfig.from_json(
            llm, vit | {"num_hidden_layers": layers + 1}, {"vae_config": vae, "new_token_ids": markers.to_json()}
        )
        network = BagelNetwork(config)
    network.vae.requires_grad_(False)
    random_weights(network)
    generator = torch.Generator().manual_seed(0)

    def latents(*, noised: bool) -> Part:
        tokens = torch.randn(BAGEL_LATENTS, config.latent_dim, generator=generator)
        places = torch.arange(BAGEL_LATENTS)
        return image_part("gen_image", tokens, places, boundary_ids=(3, 4), noised=noised, timestep=0.5 * noised)

    def patches() -> Part:
        return image_part(
            "und_image",
            torch.randn(BAGEL_PATCHES, 588, generator=generator),
            torch.arange(BAGEL_PATCHES),
            boundary_ids=(3, 4),
        )

    samples = [[prompt(n), latents(noised=True)] for n in PROMPTS[:2]]
    samples.append([latents(noised=False), patches(), prompt(PROMPTS[2]), latents(noised=True)])
    samples.append([patches(), prompt(QUESTION), answer(ANSWER)])
    samples *= copies
    n_latents = sum(part.n_tokens for parts in samples for part in parts if part.kind == "gen_image")
    noise = torch.randn(n_latents, config.latent_dim, generator=generator).to(network.llm2vae.weight.device)

    def loss(pack: PackedBatch) -> Tensor:
        losses = network(pack, noise)
        return losses.ce.mean() + losses.mse.mean()

    return Step(
        network=network,
        samples=samples,
        loss=loss,
        module="unimm.models.bagel.network.attention",
        flops=lambda pack: bagel_flops(network, pack, []).total,
    )


def janus_step(size: str, layers: int, *, copies: int = 1) -> Step:
    """Two prompts with their images, a question about an image, two texts."""
    dim, mlp, heads, _ = WIDTHS["janus"][size]
    projector = {"projector_type": "mlp_gelu", "depth": 2, "n_embed": dim}
    width, vit_heads = (64, 4) if size == "toy" else (1024, 16)
    vision = {"image_size": 384, "model_name": "siglip", "patch_size": 16}
    vision |= {"width": width, "layers": layers, "heads": vit_heads, "mlp_ratio": 4.0}
    codes = {"image_token_size": 16384, "n_embed": 8, "ch": 32, "num_res_blocks": 1, "z_channels": 32}
    llm = {"hidden_size": dim, "intermediate_size": mlp, "num_attention_heads": heads, "num_hidden_layers": layers}
    files = {
        "vision_config": {"params": vision},
        "aligner_config": {"params": projector | {"input_dim": width}},
        "gen_vision_config": {"cls": "VQ-16", "params": codes},
        "gen_aligner_config": {"params": projector | {"input_dim": 8}},
        "gen_head_config": {"params": {"image_token_embed": dim, "image_token_size": 16384, "n_embed": dim}},
        "language_config": llm | {"vocab_size": VOCAB, "max_position_embeddings": 16384},
    }
    with torch.device("meta"):
        network = JanusNetwork(JanusConfig.from_json(files, {}))
    network.vq.requires_grad_(False)
    network.vision.trunk.attn_pool.requires_grad_(False)
    random_weights(network)
    generator = torch.Generator().manual_seed(0)
    places = torch.arange(JANUS_TOKENS)
    pixels = torch.randn(JANUS_TOKENS, 16 * 16 * 3, generator=generator)
    seen = image_part("und_image", pixels, places, boundary_ids=(3, 4), causal=True)
    samples: list[list[Part]] = []
    for n in PROMPTS[:2]:
        tokens = torch.randint(16384, (JANUS_TOKENS,), generator=generator)
        drawn = image_part("gen_image", tokens, places, boundary_ids=(3,), causal=True)
        samples.append([prompt(n), drawn])
    samples += [[seen, prompt(QUESTION), answer(ANSWER)], [answer(120)], [answer(260)]]
    samples *= copies

    def loss(pack: PackedBatch) -> Tensor:
        losses = network(pack)
        return losses.text.mean() + losses.image.mean()

    return Step(
        network=network,
        samples=samples,
        loss=loss,
        module="unimm.models.janus.network.attention",
        flops=lambda pack: janus_flops(network, pack, []).total,
    )


STEPS = {"bagel": bagel_step, "janus": janus_step}


# ---- the plain way


def pad_samples(samples: Sequence[Sequence[Part]]) -> list[list[Part]]:
    """The samples, each with a text behind it that makes it as long as the longest."""
    lengths = [sum(part.segment.length for part in parts) for parts in samples]
    return [
        [*parts, *([text_part([0] * (max(lengths) - n))] if n < max(lengths) else [])]
        for parts, n in zip(samples, lengths, strict=True)
    ]


class DenseAttention:
    """Attention of a padded batch through one call of PyTorch's, under a mask that is added to the scores."""

    def __init__(self, mask: AttentionMask, dtype: torch.dtype) -> None:
        n = len(mask.samples)
        hidden = torch.stack([~mask.dense_sample(i) for i in range(n)])[:, None]
        self.added = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        """q [N, H, K], k and v [N, G, K] of B samples of L rows -> [N, H, K]."""
        b = len(self.added)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        q, k, v = (x.unflatten(0, (b, -1)).transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, self.added).transpose(1, 2).flatten(0, 1)


def prepare(step: Step, way: str, dtype: torch.dtype) -> Callable[[], float]:
    """A step in one of the ways, which returns its loss."""
    device = next(step.network.parameters()).device
    pack = pack_sequences(step.samples if way == "packed" else pad_samples(step.samples)).to(device)
    dense = None if way == "packed" else DenseAttention(pack.layout.mask, dtype)

    def run() -> float:
        step.network.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = step.loss(pack)
        loss.backward()
        return loss.item()

    def run_densely() -> float:
        with patch(step.module, dense):
            return run()

    return run if dense is None else run_densely


# ---- timing


def seconds(call: Callable[[], Any]) -> float:
    """Of one call: by the clock on a GPU, the processor's own on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    call()
    # all threads' time; their products are of one size, so they work side by side
    return (time.process_time() - start) / torch.get_num_threads()


def peak(dtype: torch.dtype) -> float:
    """FLOPs a second of a matrix product: the fastest of some."""
    side, device = (8192, "cuda") if torch.cuda.is_available() else (1024, "cpu")
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / min(seconds(lambda: a @ b) for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(STEPS), default="bagel")
    parser.add_argument("--size", choices=["7b", "toy"], default="7b")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--copies", type=int, default=1, help="of the samples: 16 of BAGEL's are 32 thousand rows")
    parser.add_argument("--way", choices=WAYS, help="one alone; both unless given")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16 by autocast")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    step = STEPS[args.family](args.size, args.layers, copies=args.copies)
    ways = [args.way] if args.way else list(WAYS)
    runs = {way: prepare(step, way, dtype) for way in ways}
    losses = {way: run() for way, run in runs.items()}
    spread = max(losses.values()) - min(losses.values())
    if spread > (1e-2 if args.dtype == "bfloat16" else 1e-4) * max(losses.values()):
        raise SystemExit(f"the ways' losses differ: {losses}")
    found: dict[str, list[float]] = {way: [] for way in ways}
    peaks = []
    for _ in range(args.rounds):
        peaks.append(peak(dtype))
        for way in ways:
            found[way].append(seconds(runs[way]))
    lengths = [sum(part.segment.length for part in parts) for parts in step.samples]
    flops = step.flops(pack_sequences(step.samples))
    rows = []
    for way in ways:
        n_rows = sum(lengths) if way == "packed" else len(lengths) * max(lengths)
        mfu = [flops / s / top for s, top in zip(found[way], peaks, strict=True)]
        ratios = [s / first for s, first in zip(found[way], found[ways[0]], strict=True)]
        rows.append({
            "way": way,
            "rows": n_rows,
            "rows of samples": f"{sum(lengths) / n_rows:.0%}",
            "s a step": statistics.median(found[way]),
            "tokens/s": sum(lengths) / statistics.median(found[way]),
            "TFLOP/s": flops / statistics.median(found[way]) / 1e12,
            "MFU": f"{statistics.median(mfu):.0%}",
            "times the first": f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})",
        })  # fmt: skip
    what = f"{args.family} {args.size}, {args.layers} layers, samples of {lengths} rows, {args.rounds} rounds"
    title = (
        f"{what}; {flops / 1e12:.2f} TFLOP; peak {statistics.median(peaks) / 1e12:.3f} TFLOP/s; {Machine.here(dtype)}"
    )
    show(rows, title=title)


if __name__ == "__main__":
    main()
