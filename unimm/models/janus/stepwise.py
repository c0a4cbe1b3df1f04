"""Janus's images step by step: a step is a token, decoded in rows that come and go.

Axes: P images, B branches (with guidance two for an image), n tokens of an image, D model.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image

from unimm.generation.decode_batch import DecodeBatch, DecodeRow
from unimm.generation.image_tokens import sample_image_tokens
from unimm.generation.kv_cache import EMPTY_CACHE, KVCache, check_fits
from unimm.generation.noise import seeded_generators
from unimm.generation.stepwise import (
    ImageBatch,
    ImageInProgress,
    ModelRequest,
    Prefill,
    WorkGenerator,
    forward_bytes,
)
from unimm.models.common.cfg_branches import CFGBranches
from unimm.models.common.separate_outputs import ImageAnswer
from unimm.models.janus.processor import padded_unconditional, with_image_start
from unimm.processing.images.io import tensor_to_pil
from unimm.processing.requests import parse_requests, parse_scales
from unimm.vlms.chat import split_last_ids

if TYPE_CHECKING:
    from unimm.models.janus.model import Janus

GREY = 127


class JanusImage(ImageInProgress):
    """An image on its way: its tokens so far, and the embedded rows [branches, D] that its next token comes after."""

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
        self.caches = caches
        self.scale = scale
        self.generator = generator
        self.tokens: list[int] = []
        self.next_rows = model.decoder.embed(torch.tensor(first_ids, device=model.device))
        height, width = model.config.token_grid
        self.n_steps = height * width

    @torch.inference_mode()
    def decode(self) -> Image.Image:
        """The image through the VQ decoder; before the end grey below the last whole row of tokens."""
        tokens = [*self.tokens, *[0] * (self.n_steps - self.step)]
        image = tensor_to_pil(self.model.decode_image_tokens(torch.tensor([tokens], device=self.model.device))[0])
        if not self.is_done:
            height, width = self.model.config.token_grid
            top = self.step // width * (image.height // height)
            image.paste((GREY, GREY, GREY), (0, top, image.width, image.height))
        return image


class JanusImageBatch(ImageBatch):
    """Images whose tokens are decoded together, each at its own."""

    def __init__(self, model: "Janus"):
        self.model = model
        self.batch = DecodeBatch(model.decoder)
        self._rows: dict[JanusImage, list[DecodeRow]] = {}

    @torch.inference_mode()
    def advance(self, images: Sequence[ImageInProgress]) -> None:
        """One token of each image in one forward."""
        mine = [one for one in images if isinstance(one, JanusImage)]
        for gone in [one for one in self._rows if one not in mine]:
            for row in self._rows.pop(gone):
                self.batch.leave(row)
        for new in [one for one in mine if one not in self._rows]:
            self._rows[new] = [self.batch.join(cache, new.n_steps) for cache in new.caches]
        model = self.model
        branches = CFGBranches.plan([one.scale for one in mine], model.device)
        second = [mine[i] for i in branches.guided]
        rows = [self._rows[one][0] for one in mine] + [self._rows[one][1] for one in second]
        x = torch.stack([one.next_rows[0] for one in mine] + [one.next_rows[1] for one in second])
        # guided in float32: the scales are not rounded to the model's dtype
        logits = branches.combine(model.image_logits(self.batch.append(rows, x)).float())
        tokens = sample_image_tokens(logits, model.config.image_sampling, [one.generator for one in mine])
        embedded = model.embed_image_tokens(tokens)
        for image, token, row in zip(mine, tokens.tolist(), embedded, strict=True):
            image.tokens.append(token)
            image.next_rows = row.expand(len(image.caches), -1)
            image.step += 1


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
