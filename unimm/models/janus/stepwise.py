"""Janus's images step by step: a step is a token, decoded in rows that come and go.

Axes: P images, B branches (with guidance two for an image), n tokens of an image, D model.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from unimm.generation.image_tokens import sample_image_tokens
from unimm.generation.kv_cache import EMPTY_CACHE, KVCache, check_fits
from unimm.generation.noise import seeded_generators
from unimm.generation.stepwise import ModelRequest, Prefill, WorkGenerator, forward_bytes
from unimm.models.common.cfg_branches import CFGBranches
from unimm.models.common.separate_outputs import ImageAnswer
from unimm.models.common.token_images import TokenImage, TokenImageBatch
from unimm.models.janus.processor import padded_unconditional, with_image_start
from unimm.processing.images.io import tensor_to_pil
from unimm.processing.requests import parse_requests, parse_scales
from unimm.vlms.chat import split_last_ids

if TYPE_CHECKING:
    from unimm.models.janus.model import Janus


class JanusImage(TokenImage):
    """An image on its way, with its tokens so far."""

    def __init__(
        self,
        model: "Janus",
        caches: Sequence[KVCache],
        first_ids: Sequence[int],
        *,
        scale: float,
        generator: torch.Generator,
    ):
        self.model = model
        self.tokens: list[int] = []
        height, width = model.config.token_grid
        first = model.decoder.embed(torch.tensor(first_ids, device=model.device))
        super().__init__(caches, first, scale=scale, generator=generator, n_steps=height * width)

    @torch.inference_mode()
    def decode(self) -> Image.Image:
        """The image through the VQ decoder; before the end grey below the last whole row of tokens."""
        tokens = [*self.tokens, *[0] * (self.n_steps - self.step)]
        image = tensor_to_pil(self.model.decode_image_tokens(torch.tensor([tokens], device=self.model.device))[0])
        height, width = self.model.config.token_grid
        return self.grey_below(image, self.step // width, height)


class JanusImageBatch(TokenImageBatch):
    """Images whose tokens are decoded together, each at its own."""

    def __init__(self, model: "Janus"):
        super().__init__(model.decoder)
        self.model = model

    def choose(self, images: Sequence[JanusImage], branches: CFGBranches, hidden: Tensor) -> Tensor:
        """Choose the next token of each image, and note it; hidden [B, D] -> the embedded tokens [P, D]."""
        model = self.model
        # guided in float32: the scales are not rounded to the model's dtype
        logits = branches.combine(model.image_logits(hidden).float())
        tokens = sample_image_tokens(logits, model.config.image_sampling, [one.generator for one in images])
        for image, token in zip(images, tokens.tolist(), strict=True):
            image.tokens.append(token)
        return model.embed_image_tokens(tokens)


class JanusImageAnswer(ImageAnswer):
    """An image after a prompt, read and checked."""

    def __init__(self, model: "Janus", request: ModelRequest, prompt: str, images: Sequence[Image.Image]):
        config = model.config
        self.model = model
        model.check_image_size(request.size, config.image_size)
        if request.negative_prompt:
            raise NotImplementedError("Janus has no negative_prompt: leave it out, or take another family")
        parse_requests(prompt, list(images))
        (self.scale,) = parse_scales(config.guidance if request.guidance is None else request.guidance, 1, "guidances")
        parts = with_image_start(model.processor.generation_parts(prompt, images), model.special_tokens.boi)
        pad = model.special_tokens.pad if self.scale != 1 else 0
        self.inputs = [parts, *([padded_unconditional(parts, pad)] if self.scale != 1 else [])]
        height, width = config.token_grid
        check_fits(model.decoder.config, self.inputs, n_more=height * width - 1)
        self.n_prompt_rows = sum(part.segment.length for part in parts)
        self.n_bytes = len(self.inputs) * forward_bytes(
            model.decoder, cached_rows=2 * self.n_prompt_rows + height * width, step_rows=self.n_prompt_rows
        )

    def work(self, seed: int) -> WorkGenerator:
        """The prefill of both branches, and the image."""
        before, first_ids = split_last_ids(self.inputs)
        caches = yield Prefill(self.model, [EMPTY_CACHE] * len(before), before)
        (generator,) = seeded_generators([seed])
        yield JanusImage(self.model, caches, first_ids, scale=self.scale, generator=generator)

    def image_batch(self) -> JanusImageBatch:
        """A new batch."""
        return JanusImageBatch(self.model)
