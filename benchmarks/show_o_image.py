"""The time of an image of Show-o, beside the straightforward loop that reads the text again at every step.

    python benchmarks/show_o_image.py --tokens 256 --layers 4 --steps 8

Random weights at the released widths and few layers, float32, guidance on. The loop runs text and image of both branches
through all layers at each step, the text as long as the original pads it, and computes the logits of all rows and of the
whole vocabulary, of which it takes those of the image and of the codes. With few layers the logits weigh more than in a
whole model: --layers 24 is the released depth.
"""

import argparse
import time
from pathlib import Path
from typing import ClassVar

import torch

from unimm import MaskedSampling, ShowO, ShowOConfig
from unimm.generation.masked import draw_masked_noise, masked_step
from unimm.generation.noise import seeded_generators
from unimm.kernels import attention
from unimm.models.common.cfg_branches import CFGBranches
from unimm.sequence.packing import pack_sequences
from unimm.sequence.parts import text_part
from unimm.vlms.llama_layout import EXPERT

CONFIG = {
    "_class_name": "Showo",
    "vocab_size": 58498,
    "llm_vocab_size": 50295,
    "llm_model_path": "microsoft/phi-1_5",
    "codebook_size": 8192,
    "w_clip_vit": False,
}
PADDED = 129  # ids of a text, as the original pads it
TEXT = 24  # ids of a prompt of usual length


class EndOfTextOnly:
    """In place of a tokenizer: all that an empty prompt asks of one."""

    special_ids: ClassVar[dict[str, int]] = {}

    def token_id(self, token: str) -> int:
        """The end of a text."""
        return 50256

    def encode(self, text: str) -> list[int]:
        """No ids."""
        return []

    def decode(self, ids: list[int]) -> str:
        """No text."""
        return ""

    def save(self, folder: Path) -> None:
        """Nothing."""


def build(tokens: int, layers: int) -> ShowO:
    """A model of the released widths with random weights."""
    torch.manual_seed(0)
    phi = {"num_hidden_layers": layers}
    return ShowO(ShowOConfig.from_json(CONFIG | {"num_vq_tokens": tokens}, phi)).eval()


@torch.inference_mode()
def straightforward(model: ShowO, text: int, *, guidance: float, steps: int, sampling: MaskedSampling) -> torch.Tensor:
    """The loop of the original: everything again at every step."""
    n = model.config.image_tokens
    n_codes = model.config.n_codes
    first = model.config.first_code_id
    branches = CFGBranches.plan([guidance], model.device)
    generators = seeded_generators([0])
    tokens = torch.full((1, n), n_codes)
    drawn = tokens
    for step in range(steps):
        rows = [[text_part([1] * length), model.processor.gen_image_part(tokens[0])] for length in (text, text)]
        batch = pack_sequences(rows)
        hidden = model.backbone(batch, lambda layer, q, k, v, mask=batch.layout.mask: attention(q, k, v, mask))[EXPERT]
        logits = model.decoder.logits(hidden)[batch.gen_images.rows][:, first : first + n_codes]
        tokens, drawn, _ = masked_step(
            branches.combine(logits.float().unflatten(0, (2, n))),
            tokens,
            mask_token=n_codes,
            step=step,
            steps=steps,
            sampling=sampling,
            noise=draw_masked_noise(generators, n, n_codes, sampling),
        )
    return drawn


@torch.inference_mode()
def ours(model: ShowO, *, guidance: float, steps: int, sampling: MaskedSampling) -> torch.Tensor:
    """The library's decoding behind a prompt and an empty one."""
    session_tokens = torch.full((1, model.config.image_tokens), model.config.n_codes)
    return model.complete_image_tokens(
        [[text_part([1] * TEXT)]],
        session_tokens,
        seeded_generators([0]),
        guidance=[guidance],
        steps=steps,
        masked_sampling=sampling,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256, help="of the image: 256, or 1024 for 512 pixels")
    parser.add_argument("--layers", type=int, default=4, help="of 24")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model = build(options.tokens, options.layers)
    model.tokenizer = EndOfTextOnly()
    sampling = MaskedSampling()
    calls = {
        "text read at every step, padded": lambda: straightforward(
            model, PADDED, guidance=6.0, steps=options.steps, sampling=sampling
        ),
        "text read once": lambda: ours(model, guidance=6.0, steps=options.steps, sampling=sampling),
    }
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(options.repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.tokens} tokens, {options.layers} layers"
    )
    for name, seconds in best.items():
        print(f"{name:36} {seconds / options.steps:7.3f} s a step")
    slow, fast = best.values()
    print(f"{slow / fast:.2f} times as fast")


if __name__ == "__main__":
    main()
