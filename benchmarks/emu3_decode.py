"""Image tokens of Emu3: ms each, with guidance, against transformers' port, in one run.

    python benchmarks/emu3_decode.py                             # the released widths and vocabulary, 2 layers, bfloat16
    python benchmarks/emu3_decode.py --layers 6 --prompt 16 --tokens 6 --rounds 3    # 14 GB, four minutes
    python benchmarks/emu3_decode.py --size toy --dtype float32                      # that all choose the same codes

Weights are random and shared: transformers' model is built around our tensors, and only its head is a copy. In float32
both must choose the same codes greedily before they are timed. Rounds go from rival to rival; a token is timed from one
call of the head to the next, which leaves out the prompt. transformers runs the negative prompt in a second forward, and
computes the head for the whole vocabulary; the constraint on codes is a mask there, as in the original.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from timing import Machine, Times, show
from torch import Tensor, nn

from unimm.checkpoint.save import released_state_dict
from unimm.generation.image_tokens import ImageTokenSampling
from unimm.models.emu3.config import Emu3Config
from unimm.models.emu3.model import Emu3
from unimm.models.emu3.weights import language_key_map
from unimm.nn.packed_linear import optimize_for_cpu
from unimm.sequence.parts import text_part

GUIDANCE = 3.0
TEXT_HEAD = ("decoder.head.text",)
SIZES = {
    "8b": {},
    "toy": {"hidden_size": 512, "intermediate_size": 576, "num_attention_heads": 4, "num_key_value_heads": 2},
}
Generate = Callable[[int], Tensor]  # tokens -> codes [n], greedily


def build(size: str, layers: int, dtype: torch.dtype) -> Emu3:
    """A random model without vision tokenizer. Its matrices repeat a block of random numbers: making more takes long."""
    with torch.device("meta"):
        model = Emu3(Emu3Config.from_json({**SIZES[size], "num_hidden_layers": layers}, {})).to(dtype)
    model = model.to_empty(device="cpu").eval()
    block = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        for i, x in enumerate(model.parameters()):
            if x.ndim == 1:
                x.fill_(1.0)
                continue
            flat = x.view(-1)
            for start in range(0, len(flat), len(block)):
                part = flat[start : start + len(block)]
                part.copy_(block.roll(7919 * (i + start // len(block)))[: len(part)] * x.shape[1] ** -0.5)
        model.decoder.embed.weight.mul_(4.0 * model.config.decoder.dim**0.5)
    return model


def ours(model: Emu3, prompt: list[int], negative: list[int]) -> Generate:
    """The library, by its own loop."""

    def generate(tokens: int) -> Tensor:
        (codes,) = model.generate_image_tokens(
            [[text_part(prompt)]],
            [torch.Generator()],
            guidance=[GUIDANCE],
            negative_prompts=[[text_part(negative)]],
            grids=[(1, tokens)],
            image_sampling=ImageTokenSampling(temperature=0.0),
        )
        return codes[0]

    return generate


def transformers(model: Emu3, prompt: list[int], negative: list[int]) -> tuple[Generate, nn.Module]:
    """Its text model's generate over the same tensors, and its head."""
    from transformers import Emu3ForCausalLM, Emu3TextConfig, LogitsProcessor, LogitsProcessorList

    decoder = model.config.decoder
    config = Emu3TextConfig(
        vocab_size=decoder.vocab_size, hidden_size=decoder.dim, intermediate_size=decoder.mlp_dim,
        num_hidden_layers=decoder.n_layers, num_attention_heads=decoder.n_heads, num_key_value_heads=decoder.n_kv_heads,
        rms_norm_eps=decoder.norm_eps, rope_parameters={"rope_type": "default", "rope_theta": decoder.rope_theta},
    )  # fmt: skip
    with torch.device("meta"):
        port = Emu3ForCausalLM(config)
    port.load_state_dict(released_state_dict(model, language_key_map("model.", "lm_head")), assign=True)
    # a buffer that no file holds, and that stayed on meta
    port.model.rotary_emb = type(port.model.rotary_emb)(config)
    code0 = model.config.special_tokens.code0

    class CodesAlone(LogitsProcessor):
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            scores[:, :code0] = float("-inf")
            return scores

    def generate(tokens: int) -> Tensor:
        ids, unconditional = (torch.tensor([one]) for one in (prompt, negative))
        found = port.eval().generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, guidance_scale=GUIDANCE,
            negative_prompt_ids=unconditional, negative_prompt_attention_mask=torch.ones_like(unconditional),
            logits_processor=LogitsProcessorList([CodesAlone()]), eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return found[0, ids.shape[1] :] - code0

    return generate, port.lm_head


def stamped(head: nn.Module) -> list[float]:
    """The list to which every call of a head adds its time."""
    stamps: list[float] = []
    head.register_forward_hook(lambda *_: stamps.append(time.perf_counter()))
    return stamps


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=60, help="ids before the first code")
    parser.add_argument("--tokens", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rivals", nargs="+", choices=("plain", "packed"), default=["plain", "packed"])
    return parser.parse_args()


def main() -> None:
    args = options()
    dtype = getattr(torch, args.dtype)
    model = build(args.size, args.layers, dtype)
    generator = torch.Generator().manual_seed(1)
    prompt, negative = (
        torch.randint(0, 1000, (n,), generator=generator).tolist() for n in (args.prompt, args.prompt // 2)
    )
    field: dict[str, tuple[Generate, list[float], int]] = {}  # with calls of the head a token
    for name in args.rivals:
        began = time.perf_counter()
        # `optimize_for_cpu` packs the text half of the head, too, which images do not read: minutes for nothing here
        ready = optimize_for_cpu(model, skip=TEXT_HEAD) if name == "packed" else model
        print(f"{name}: made in {time.perf_counter() - began:.1f} s")
        ready.decoder.head.visual._forward_hooks.clear()  # the copy has the plain one's clock
        field[name] = ours(ready, prompt, negative), stamped(ready.decoder.head.visual), 1
    generate, head = transformers(model, prompt, negative)
    field["transformers"] = generate, stamped(head), 2
    with torch.inference_mode():
        codes = {name: generate(4) for name, (generate, *_) in field.items()}
        same = {name: float((one == codes["transformers"]).float().mean()) for name, one in codes.items()}
        if dtype == torch.float32 and min(same.values()) < 1:
            raise SystemExit(f"the rivals do not choose the same codes: {same}; nothing is timed")
        steps: dict[str, list[float]] = {name: [] for name in field}
        rounds: dict[str, list[float]] = {name: [] for name in field}
        for _ in range(args.rounds):
            for name, (generate, stamps, calls) in field.items():
                stamps.clear()
                generate(args.tokens)
                found = [1e3 * (b - a) for a, b in pairwise(stamps[::calls])]
                steps[name] += found
                rounds[name].append(statistics.median(found))
    rows = []
    for name, ms in steps.items():
        times = Times.of(ms)
        ratios = [theirs / our for theirs, our in zip(rounds["transformers"], rounds[name], strict=True)]
        row = {"rival": name, "ms a token": times.median, "a fifth under": times.p20, "a fifth over": times.p80}
        row |= {"same codes": same[name], "times transformers": statistics.median(ratios)}
        rows.append(row | {"least": min(ratios), "most": max(ratios)})
    what = f"Emu3 {args.size}, {args.layers} layers, {args.dtype}, one image with guidance, prompt {args.prompt}"
    show(rows, title=f"{what}, {args.tokens} tokens, {args.rounds} rounds; {Machine.here(dtype)}")


if __name__ == "__main__":
    main()
