"""Janus and Janus-Pro: decoupled encoders on one autoregressive transformer.

Wu et al. 2024, arXiv 2410.13848; Chen et al. 2025, arXiv 2501.17811. Released code: github.com/deepseek-ai/Janus at 1daa72f.
Pictures are understood through a SigLIP tower and an aligner; they are drawn as codes of a VQ tokenizer, next code by
next code, each fed back through an embedding and an aligner of its own. Everything is read causally.

Axes: N packed rows, P pictures to draw, n codes of a picture, D model, E features of a code, V ids or codes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from unimm.checkpoint.config_io import read_json
from unimm.checkpoint.keymap import KeyMap
from unimm.generation.image_tokens import ImageTokenSampling, sample_image_tokens
from unimm.generation.kv_cache import KVCache
from unimm.models.base import Generation
from unimm.models.common.deepseek_chat import DeepseekChatModel
from unimm.models.common.deepseek_processor import IMAGE_PLACEHOLDER, SPECIAL_TOKENS, padded_unconditional
from unimm.models.janus import FILES, RELEASES
from unimm.models.janus.config import WEIGHT_FILES, JanusConfig
from unimm.models.janus.network import JanusNetwork
from unimm.models.janus.transformers_layout import CheckpointLayout, transformers_from_original, transformers_key_map
from unimm.models.janus.weights import KEY_MAP
from unimm.processing.images.io import tensor_to_pil
from unimm.processing.requests import ImageInput, broadcast, expand_seeds, parse_requests, parse_size
from unimm.sequence.parts import Part, text_part
from unimm.tokenizers.text import load_tokenizer


class Janus(JanusNetwork, DeepseekChatModel):
    """A decoder, a tower to look with, a VQ tokenizer to draw with, and an aligner for each."""

    RELEASES = RELEASES
    FILES = FILES
    LAYOUTS = get_args(CheckpointLayout)
    supports_steps = False
    UNUSED_PARAMETERS = ("vision.trunk.attn_pool.{*}", "vq.quantize.codebook_used")

    def __init__(self, config: JanusConfig):
        super().__init__(config)
        self.tokenizer = None
        self.image_processor, self.chat_config = config.image_processor, config.chat

    @classmethod
    def _build(cls, folder: Path) -> "Janus":
        """The model of a folder's config files, with its tokenizer, without weights."""
        model = cls(JanusConfig.from_folder(folder))
        model.tokenizer = load_tokenizer(folder, special_tokens=SPECIAL_TOKENS)
        model.checkpoint_layout = "transformers" if "text_config" in read_json(folder / "config.json") else "original"
        return model

    def key_maps(self) -> dict[tuple[str, ...], KeyMap]:
        """The key table of the layout that this model came in, or is saved in."""
        depths = self.config.aligner.depth, self.config.gen_aligner.depth
        if self.checkpoint_layout == "transformers":
            return {WEIGHT_FILES: transformers_key_map(*depths)}
        without = tuple(name for name, depth in zip(("aligner.", "gen_aligner."), depths, strict=True) if not depth)
        return {WEIGHT_FILES: KEY_MAP.filtered(lambda entry: not entry.released.startswith(without))}

    def save_config(self, folder: Path) -> None:
        """Write config.json and preprocessor_config.json."""
        files = self.config.to_json()
        if self.checkpoint_layout == "transformers":
            known = self.special_tokens if self.tokenizer or self.fallback_special_tokens else None
            image = self.tokenizer.token_id(IMAGE_PLACEHOLDER) if self.tokenizer else None
            files = transformers_from_original(files, special_tokens=known, image_token_id=image)
        for name, contents in files.items():
            (folder / name).write_text(json.dumps(contents, indent=2) + "\n")

    # ---- drawing

    @torch.inference_mode()
    def generate_image_tokens(
        self,
        prompts: Sequence[Sequence[Part]],
        generators: Sequence[torch.Generator],
        *,
        guidance: Sequence[float],
        image_sampling: ImageTokenSampling,
        grid: tuple[int, int] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Codes [P, n] of a picture after each prompt, which ends with the marker before it; of the trained grid, or `grid`.

        Guidance w takes l = u + w (c - u), c the logits after the prompt and u those after a prompt of pads between its
        first and last id; at 1 there is no u. Equal prompts are read once, whatever follows them.
        """
        guided = [i for i, w in enumerate(guidance) if w != 1]
        pad = self.special_tokens.pad if guided else 0
        every = [*prompts, *(padded_unconditional(prompts[i], pad) for i in guided)]
        height, width = grid or self.config.token_grid
        session = self.decode_session(self.prefill_unique(every), height * width)
        first = torch.stack([prompt[-1].ids[-1] for prompt in every]).to(self.device)
        w = torch.tensor([guidance[i] for i in guided], dtype=torch.float32, device=self.device)[:, None]
        at, x, drawn = torch.tensor(guided, device=self.device, dtype=torch.long), self.decoder.embed(first), []
        for _ in tqdm(range(session.capacity), "drawing", disable=not progress, leave=False):
            # scales are not rounded to the model's dtype
            logits, free = self.image_logits(session.append(x)).float().split([len(prompts), len(guided)])
            if guided:
                logits = logits.index_copy(0, at, free + w * (logits[at] - free))
            drawn.append(sample_image_tokens(logits, image_sampling, generators))
            fed = self.embed_image_tokens(drawn[-1])
            x = torch.cat((fed, fed[at]))
        return torch.stack(drawn, 1)

    def prefill_unique(self, prompts: Sequence[Sequence[Part]]) -> list[KVCache]:
        """The context of all but the last id of each prompt; prompts that are one object, or equal texts, once."""

        def key(prompt: Sequence[Part]) -> Any:
            return tuple(prompt[0].ids.tolist()) if len(prompt) == 1 else id(prompt)

        unique = {key(prompt): prompt for prompt in prompts}
        contexts = dict(zip(unique, self.prefill_prompts([list(prompt) for prompt in unique.values()])[0], strict=True))
        return [contexts[key(prompt)] for prompt in prompts]

    @torch.inference_mode()
    def decode_image_tokens(self, tokens: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
        """Codes [P, n] of the trained grid, or of `grid` -> pixels [P, 3, height, width], about [-1, 1]."""
        return self.vq.decode(tokens, grid=grid or self.config.token_grid).float()

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        images: ImageInput | Sequence | None = None,
        n: int = 1,
        size: tuple[int, int] | None = None,
        seed: int | Sequence[int] = 0,
        guidance: float | Sequence[float] | None = None,
        image_sampling: ImageTokenSampling | None = None,
        progress: bool = False,
    ) -> Generation:
        """Draw `n` pictures for each prompt, in the order of the prompts; a prompt is read once.

        prompt: one text or a batch of them. images: pictures to draw from, as in `understand`; no release was trained
        for that, so a released model follows them loosely at best. size: (height, width), the trained one or None.
        seed: one, or one a prompt; from one number, that number and the ones after it, picture by picture. guidance:
        1 is none; one, or one a prompt. A picture does not depend on what else is in the batch. Raises ValueError for
        bad input.
        """
        if size is not None and parse_size(size) != self.config.image_size:
            raise ValueError(
                f"cannot generate (height, width) {tuple(size)}: this model was trained for {self.config.image_size} "
                "alone; leave size out"
            )
        prompts, pictures = parse_requests(prompt, images)
        scales = broadcast(self.config.guidance if guidance is None else guidance, len(prompts), "guidances")
        if n < 1 or not all(w >= 0 for w in scales):
            raise ValueError(f"got n {n}, guidance {guidance}: expected at least 1 picture, and scales of 0 or more")
        told = [self.processor.generation_parts(one, some) for one, some in zip(prompts, pictures, strict=True)]
        items = [[*before, text_part([*last.ids.tolist(), self.special_tokens.boi])] for *before, last in told]
        seeded = expand_seeds(seed, len(prompts), n_images=n)
        codes = self.generate_image_tokens(
            [one for one in items for _ in range(n)],
            [torch.Generator().manual_seed(s) for s in seeded],
            guidance=[float(w) for w in scales for _ in range(n)],
            image_sampling=image_sampling or self.config.image_sampling,
            progress=progress,
        )
        return Generation([tensor_to_pil(self.decode_image_tokens(one[None])[0]) for one in codes])
