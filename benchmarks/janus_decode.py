"""Image tokens of Janus: ms each, against transformers' port, in one run.

    python benchmarks/janus_decode.py                                # Janus-Pro-1B's widths, 4 layers, bfloat16, one image
    python benchmarks/janus_decode.py --dtype float32 --tokens 24
    python benchmarks/janus_decode.py --size 7b --layers 30 --images 16 --rivals captured      # on a GPU

Weights are random: only shapes matter. The vocabulary of texts is small, since drawing reads no row of its head. All
rivals have the same weights, through files that we write, and in float32 must choose the same codes greedily before
they are timed (int8 is let off). Guidance is on: two rows an image. Rounds go from rival to rival; a token is timed
from one call of the head to the next, which leaves out what the prompt costs. Its 300 ids put the tokens in the middle
of an image of 576.

The original is no rival: it needs an older transformers than the port. The parity cases (`python -m parity`) compare
its codes with ours.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from timing import Machine, Times, show
from torch import Tensor, nn

from unimm.generation.image_tokens import ImageTokenSampling
from unimm.models.common.deepseek_processor import JanusSpecialTokens
from unimm.models.janus.config import JanusConfig
from unimm.models.janus.model import Janus
from unimm.models.janus.processor import padded_unconditional
from unimm.sequence.parts import Part, text_part

MARKERS = JanusSpecialTokens(bos=1, eos=2, pad=3, boi=4, eoi=5)
VOCAB = 1024
GUIDANCE = 5.0
# of the released config files: width, feed-forward, heads, layers; and one for the tests
SIZES = {"1b": (2048, 5632, 16, 24), "7b": (4096, 11008, 32, 30), "toy": (512, 576, 4, 2)}
RIVALS = ("plain", "packed", "int8", "transformers", "captured")
Generate = Callable[
    [list[int], int, int], Tensor
]  # (ids of a prompt, images, tokens) -> image token ids [P, n], greedily


def build(size: str, layers: int, dtype: torch.dtype, device: str) -> Janus:
    """A random model; the encoders, which drawing does not run, are small."""
    d, mlp, heads, _ = SIZES[size]
    projector = {"projector_type": "mlp_gelu", "depth": 2, "n_embed": d}
    vision = {"image_size": 384, "model_name": "siglip", "patch_size": 16}
    vision |= {"width": 64, "layers": 1, "heads": 2, "mlp_ratio": 2.0}
    codes = {"image_token_size": 16384, "n_embed": 8, "ch": 32, "num_res_blocks": 1, "z_channels": 32}
    llm = {"hidden_size": d, "intermediate_size": mlp, "num_attention_heads": heads, "num_hidden_layers": layers}
    files = {
        "vision_config": {"params": vision},
        "aligner_config": {"params": projector | {"input_dim": 64}},
        "gen_vision_config": {"cls": "VQ-16", "params": codes},
        "gen_aligner_config": {"params": projector | {"input_dim": 8}},
        "gen_head_config": {"params": {"image_token_embed": d, "image_token_size": 16384, "n_embed": d}},
        "language_config": llm | {"vocab_size": VOCAB, "max_position_embeddings": 16384},
    }
    torch.manual_seed(0)
    with torch.device(device):
        model = Janus(JanusConfig.from_json(files, {})).to(dtype).eval()
    model.fallback_special_tokens = MARKERS
    for part in (*model.decoder.modules(), *model.gen_head.modules(), *model.gen_aligner.modules()):
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=part.in_features**-0.5)
    nn.init.normal_(
        model.gen_embed.weight, std=4.0
    )  # so that the codes differ from one another, and greedy ones do, too
    return model


# ---- the rivals


def ours(model: Janus) -> Generate:
    """The library, by its own loop."""

    def generate(ids: list[int], images: int, tokens: int) -> Tensor:
        generators = [torch.Generator()] * images
        greedy, prompts = ImageTokenSampling(temperature=0.0), [[text_part(ids)]] * images
        return model.generate_image_tokens(
            prompts, generators, guidance=[GUIDANCE] * images, image_sampling=greedy, grid=(1, tokens)
        )

    return generate


def transformers(folder: Path, dtype: torch.dtype, device: str) -> tuple[Generate, nn.Module]:
    """Its generate, which always draws as many codes as the config says; and its head."""
    from transformers import JanusForConditionalGeneration

    model = JanusForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()

    def generate(ids: list[int], images: int, tokens: int) -> Tensor:
        model.model.vision_model.config.num_image_tokens = tokens
        model.generation_config.max_length = None
        prompt_ids = torch.tensor([ids] * images, device=device)
        seen = torch.ones_like(prompt_ids)
        more: dict[str, Any] = {"do_sample": False, "guidance_scale": GUIDANCE}
        return model.generate(input_ids=prompt_ids, attention_mask=seen, generation_mode="image", **more)

    return generate, model.model.generation_head


class Captured:
    """One step as a CUDA graph over a static cache [layers, 2, B, M, G, K]; run as it is where there is no GPU."""

    def __init__(self, model: Janus, ids: list[int], images: int, tokens: int):
        prompts: list[list[Part]] = [[text_part(ids)]] * images
        prompts += [padded_unconditional([text_part(ids)], MARKERS.pad)] * images
        self.model, self.images, self.device = model, images, model.device
        contexts, _ = model.prefill_prompts([list(prompt) for prompt in prompts])
        room = contexts[0].length + tokens
        self.buffer = torch.stack([torch.cat(c.chunks, 2) for c in contexts], 2)
        self.buffer = nn.functional.pad(self.buffer, (0, 0, 0, 0, 0, tokens)).contiguous()
        self.at = torch.tensor([contexts[0].length], device=self.device)
        self.columns = torch.arange(room, device=self.device)
        self.rows = {"all": torch.arange(2 * images, device=self.device)}
        self.x = model.decoder.embed(torch.tensor([ids[-1]] * 2 * images, device=self.device))
        self.code = torch.zeros(images, dtype=torch.long, device=self.device)
        self.replay = self.step if self.device.type == "cpu" else self.capture()

    def step(self) -> None:
        """Feed x, choose the code, embed it; everything in place."""
        seen = (self.columns <= self.at)[None, None, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.buffer[layer]
            keys.index_copy_(1, self.at, k[:, None])
            values.index_copy_(1, self.at, v[:, None])
            grouped = q.shape[1] != k.shape[1]
            q, keys, values = q[:, :, None], keys.transpose(1, 2), values.transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(q, keys, values, seen, enable_gqa=grouped)[:, :, 0]

        model = self.model
        (hidden,) = model.decoder(self.x, self.at.expand(len(self.x)), self.rows, attend).values()
        logits, free = model.image_logits(hidden).float().split(self.images)
        self.code.copy_((free + GUIDANCE * (logits - free)).argmax(-1))
        self.x.copy_(model.embed_image_tokens(self.code).repeat(2, 1))
        self.at += 1

    def capture(self) -> Callable[[], None]:
        """The step as a graph: warmed up on a stream of its own, and set back to where it began."""
        kept = self.at.clone(), self.x.clone()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        self.at.copy_(kept[0])
        self.x.copy_(kept[1])
        return graph.replay


def captured(model: Janus) -> tuple[Generate, list[float]]:
    """The captured step; and the list to which it adds the times of its steps."""
    stamps: list[float] = []

    @torch.inference_mode()
    def generate(ids: list[int], images: int, tokens: int) -> Tensor:
        loop, codes = Captured(model, ids, images, tokens), []
        for _ in range(tokens):
            stamps.append(now())
            loop.replay()
            codes.append(loop.code.clone())
        stamps.append(now())
        return torch.stack(codes, 1)

    return generate, stamps


# ---- the clock


def now() -> float:
    """Seconds, when the GPU has done what it was asked."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def stamped(head: nn.Module) -> list[float]:
    """The list to which every call of a head adds its time."""
    stamps: list[float] = []
    head.register_forward_hook(lambda *_: stamps.append(now()))
    return stamps


def rivals(args: argparse.Namespace, dtype: torch.dtype, folder: Path) -> dict[str, tuple[Generate, list[float]]]:
    """Each rival's loop, and the times of its steps; the files that the others read are written to the folder."""
    model = build(args.size, args.layers, dtype, args.device)
    found: dict[str, tuple[Generate, list[float]]] = {}
    if "plain" in args.rivals:
        found["plain"] = ours(model), stamped(model.gen_head)
    for name in [name for name in ("packed", "int8") if name in args.rivals]:
        began = time.perf_counter()
        ready = model.optimize_for_cpu(int8=name == "int8")
        print(f"{name}: made in {time.perf_counter() - began:.1f} s")
        ready.gen_head._forward_hooks.clear()  # the copy has the plain one's clock
        found[name] = ours(ready), stamped(ready.gen_head)
    if "captured" in args.rivals:
        found["captured"] = captured(model)
    if "transformers" in args.rivals:
        model.save_pretrained(folder / "transformers", layout="transformers")
        generate, head = transformers(folder / "transformers", dtype, args.device)
        found["transformers"] = generate, stamped(head)
    return found


def megabytes(size: str, layers: int, dtype: torch.dtype) -> float:
    """Weights that a step reads, MB: the blocks, the head of codes, their aligner."""
    d, mlp, _, _ = SIZES[size]
    return (layers * (4 * d * d + 3 * d * mlp) + d * d + 16384 * d + d * d) * dtype.itemsize / 1e6


def options() -> argparse.Namespace:
    """The command line."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--images", type=int, default=1, help="two rows each")
    parser.add_argument("--prompt", type=int, default=300, help="ids before the first code")
    parser.add_argument("--tokens", type=int, default=576 if gpu else 16)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=["plain", "packed", "int8", "transformers"])
    return parser.parse_args()


def main() -> None:
    args = options()
    dtype = getattr(torch, args.dtype)
    ids = [MARKERS.bos, *torch.randint(6, VOCAB, (args.prompt - 2,)).tolist(), MARKERS.boi]
    with tempfile.TemporaryDirectory() as folder:
        field = rivals(args, dtype, Path(folder))
    generated = {name: generate(ids, args.images, min(8, args.tokens)).cpu() for name, (generate, _) in field.items()}
    first = next(iter(generated.values()))
    same = {name: float((codes == first).float().mean()) for name, codes in generated.items()}
    if dtype == torch.float32 and any(share < 1 for name, share in same.items() if name != "int8"):
        raise SystemExit(f"the rivals do not choose the same codes: {same}; nothing is timed")
    steps: dict[str, list[float]] = {name: [] for name in field}
    rounds: dict[str, list[float]] = {name: [] for name in field}
    for _ in range(args.rounds):
        for name, (generate, stamps) in field.items():
            stamps.clear()
            generate(ids, args.images, args.tokens)
            found = [1e3 * (b - a) for a, b in pairwise(stamps)]
            steps[name] += found
            rounds[name].append(statistics.median(found))
    floor = megabytes(args.size, args.layers, dtype)
    machine, rows = Machine.here(dtype), []
    for name, ms in steps.items():
        times = Times.of(ms)
        row = {"rival": name, "ms a token": times.median, "a fifth under": times.p20, "a fifth over": times.p80}
        row |= {"GB/s of weights": floor / times.median, "same codes": same[name]}
        if "transformers" in field:
            ratios = [theirs / our for theirs, our in zip(rounds["transformers"], rounds[name], strict=True)]
            row |= {"times transformers": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        rows.append(row)
    what = f"{args.size}, {args.layers} layers, {args.dtype}, {args.images} images with guidance, prompt {args.prompt}"
    show(rows, title=f"{what}, {args.tokens} tokens, {args.rounds} rounds, {floor:.0f} MB a step; {machine}")


if __name__ == "__main__":
    main()
