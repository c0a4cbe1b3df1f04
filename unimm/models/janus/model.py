"""Janus and Janus-Pro: decoupled vision encoders on one autoregressive transformer.

Wu et al. 2024, arXiv 2410.13848; Chen et al. 2025, arXiv 2501.17811. Released code: github.com/deepseek-ai/Janus at
1daa72f.

Axes: P images, B branches (with guidance two for an image), n tokens of an image, D model, V vocabulary of image
tokens.
"""

from collections.abc import Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from tqdm import tqdm

from unimm.checkpoint.json_files import read_json, write_json
from unimm.checkpoint.keymap import KeyMap
from unimm.checkpoint.valueless import needed_steps
from unimm.generation.decode import DecodeSession
from unimm.generation.image_tokens import ImageTokenSampling, resolve_image_sampling, sample_image_tokens
from unimm.generation.kv_cache import check_fits
from unimm.generation.noise import seeded_generators
from unimm.generation.numbers import parse_flag
from unimm.generation.stepwise import ModelRequest, RequestRun
from unimm.models.base import Generation
from unimm.models.common.cfg_branches import CFGBranches
from unimm.models.common.deepseek_chat import DeepseekChatModel
from unimm.models.common.deepseek_processor import IMAGE_PLACEHOLDER, SPECIAL_TOKENS
from unimm.models.common.separate_outputs import separate_run
from unimm.models.janus import FILES, RELEASES
from unimm.models.janus.config import WEIGHT_FILES, JanusConfig
from unimm.models.janus.network import JanusNetwork
from unimm.models.janus.parallel import LORA_TARGETS, PARALLEL_PLAN, TENSOR_PARALLEL_PLAN
from unimm.models.janus.processor import padded_unconditional, with_image_start
from unimm.models.janus.stepwise import JanusImageAnswer
from unimm.models.janus.transformers_layout import CheckpointLayout, transformers_from_original, transformers_key_map
from unimm.models.janus.weights import KEY_MAP
from unimm.processing.images.io import tensor_to_pil
from unimm.processing.requests import ImageInput, expand_seeds, parse_n_images, parse_requests, parse_scales
from unimm.sequence.parts import Part
from unimm.tokenizers.text import load_tokenizer
from unimm.vlms.chat import split_last_ids


class Janus(JanusNetwork, DeepseekChatModel):
    """Janus with its tokenizer and its verbs: generate, understand, chat."""

    RELEASES = RELEASES
    LORA_TARGETS = LORA_TARGETS
    PARALLEL_PLAN = PARALLEL_PLAN
    TENSOR_PARALLEL_PLAN = TENSOR_PARALLEL_PLAN
    DECODES_IMAGES = "decode_image_tokens"
    FILES = FILES
    COMPILED = ("vq.decoder",)
    LAYOUTS = get_args(CheckpointLayout)
    supports_steps = False
    UNUSED_PARAMETERS = ("vision.trunk.attn_pool.{*}", "vq.quantize.codebook_used")

    def __init__(self, config: JanusConfig):
        super().__init__(config)
        self.tokenizer = None
        self.image_processor = config.image_processor
        self.chat_config = config.chat

    # ---- files

    @classmethod
    def _build(cls, folder: Path) -> "Janus":
        model = cls(JanusConfig.from_folder(folder))
        model.tokenizer = load_tokenizer(
            folder, special_tokens=SPECIAL_TOKENS, vocab_size=model.config.decoder.vocab_size
        )
        model.checkpoint_layout = "transformers" if "text_config" in read_json(folder / "config.json") else "original"
        return model

    def key_maps(self) -> dict[tuple[str, ...], KeyMap]:
        """The key map of the weights, in `checkpoint_layout`."""
        depths = {"aligner.": self.config.aligner.depth, "gen_aligner.": self.config.gen_aligner.depth}
        if self.checkpoint_layout == "transformers":
            return {WEIGHT_FILES: transformers_key_map(*depths.values())}
        without = tuple(name for name, depth in depths.items() if not depth)
        return {WEIGHT_FILES: KEY_MAP.filtered(lambda entry: not entry.released.startswith(without))}

    def save_config(self, folder: Path) -> None:
        """Write config.json and preprocessor_config.json, in `checkpoint_layout`."""
        files = self.config.to_json()
        if self.checkpoint_layout == "transformers":
            special_tokens = self.special_tokens if self.tokenizer or self.fallback_special_tokens else None
            image_token_id = self.tokenizer.token_id(IMAGE_PLACEHOLDER) if self.tokenizer else None
            files = transformers_from_original(files, special_tokens=special_tokens, image_token_id=image_token_id)
        for name, contents in files.items():
            write_json(folder / name, contents)

    def start_run(self, request: ModelRequest) -> RequestRun:
        """A request as work that a scheduler may batch with that of others: see `UnifiedModel.start_run`."""
        return separate_run(self, self, request, partial(JanusImageAnswer, self, request))

    # ---- generating images

    @torch.inference_mode()
    def decode_image_step(self, session: DecodeSession, x: Tensor) -> Tensor:
        """Append one embedded row to each sequence, x [B, D] -> the logits of the next image tokens [B, V].

        The first row is the embedding of the id that begins an image, the later ones `embed_image_tokens`.
        """
        return self.image_logits(session.append(x))

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
        """The tokens [P, n] of an image after each prompt, which ends with the id that begins an image.

        guidance: l = u + w (c - u) of the logits, c after the prompt, u after one of pads between its first and last
        id; at 1 there is no u. grid: (rows, columns) of an image, the trained one unless given. Prompts that are equal
        texts, or one object, are prefilled once.
        """
        height, width = grid or self.config.token_grid
        check_fits(self.decoder.config, prompts, n_more=height * width - 1)
        branches = CFGBranches.plan(guidance, self.device)
        pad = self.special_tokens.pad if branches.guided else 0
        inputs = [*prompts, *(padded_unconditional(prompts[i], pad) for i in branches.guided)]
        before, first_ids = split_last_ids(inputs)
        session = self.decode_session(self.prefill_unique(before, [_key(prompt) for prompt in inputs]), height * width)
        x = self.decoder.embed(torch.tensor(first_ids, device=self.device))
        tokens: list[Tensor] = []
        for _ in tqdm(range(needed_steps(session.capacity)), "generating", disable=not progress, leave=False):
            # guided in float32: the scales are not rounded to the model's dtype
            logits = branches.combine(self.decode_image_step(session, x).float())
            tokens.append(sample_image_tokens(logits, image_sampling, generators))
            x = self.embed_image_tokens(tokens[-1])[branches.images]
        # without values the first step stands for all
        tokens += tokens[-1:] * (session.capacity - len(tokens))
        return torch.stack(tokens, 1)

    @torch.inference_mode()
    def decode_image_tokens(self, tokens: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
        """Image tokens [P, n] of the trained grid, or of `grid` -> pixels [P, 3, height, width], about [-1, 1]."""
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
        """Generate `n` images for each prompt, in the order of the prompts; a prompt is prefilled once.

        prompt: one text or a batch of them. images: images to condition on, as in `understand`; no release was trained
        for that, so a released model follows them loosely at best. size: (height, width), the trained one or None.
        seed: one, or one a prompt; from one number, that number and the ones after it, image by image. guidance: 1 is
        none; one, or one a prompt. But for rounding, an image does not depend on what else is in the batch. Raises
        ValueError for bad input.
        """
        self.check_image_size(size, self.config.image_size)
        prompts, prompt_images = parse_requests(prompt, images)
        n = parse_n_images(n)
        progress = parse_flag(progress, "progress")
        scales = parse_scales(
            self.config.guidance if guidance is None else guidance, len(prompts), "guidances", n_images=n
        )
        seeds = expand_seeds(seed, len(prompts), n_images=n)
        sampling = resolve_image_sampling(image_sampling, self.config.image_sampling)
        parts = [self.processor.generation_parts(text, some) for text, some in zip(prompts, prompt_images, strict=True)]
        parts = [with_image_start(one, self.special_tokens.boi) for one in parts]
        tokens = self.generate_image_tokens(
            [one for one in parts for _ in range(n)],
            seeded_generators(seeds),
            guidance=scales,
            image_sampling=sampling,
            progress=progress,
        )
        # one by one, so that an image does not depend on the others
        return Generation([tensor_to_pil(self.decode_image_tokens(one[None])[0]) for one in tokens])


def _key(prompt: Sequence[Part]) -> Hashable:
    """Equal for prompts that are equal texts, or one object."""
    return tuple(prompt[0].ids.tolist()) if len(prompt) == 1 else id(prompt)
