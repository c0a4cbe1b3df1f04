"""Emu3's images step by step: a step is a token, a code or the end of a row, decoded in rows that come and go.

Axes: P images, B branches (with guidance two for an image), D model.
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
from unimm.models.emu3.rows import ImageRows, parse_grids
from unimm.processing.images.io import tensor_to_pil
from unimm.processing.requests import parse_negative_prompts, parse_requests, parse_scales
from unimm.vlms.chat import split_last_ids

if TYPE_CHECKING:
    from unimm.models.emu3.model import Emu3


class Emu3Image(TokenImage):
    """An image on its way, with its rows so far."""

    def __init__(
        self,
        model: "Emu3",
        caches: Sequence[KVCache],
        first_ids: Sequence[int],
        *,
        grid: tuple[int, int],
        scale: float,
        generator: torch.Generator,
    ):
        self.model = model
        self.grid = grid
        self.rows = ImageRows([grid], model.config.special_tokens)
        first = model.decoder.embed(torch.tensor(first_ids, device=model.device))
        super().__init__(caches, first, scale=scale, generator=generator, n_steps=self.rows.n_steps)

    @torch.inference_mode()
    def decode(self) -> Image.Image:
        """The image through the vision tokenizer; before the end grey below the last whole row of codes."""
        height, width = self.grid
        code0 = self.model.config.special_tokens.code0
        (codes,) = self.rows.codes(missing=code0)
        image = tensor_to_pil(self.model.decode_image_tokens(codes[None])[0])
        return self.grey_below(image, self.step // (width + 1), height)


class Emu3ImageBatch(TokenImageBatch):
    """Images whose tokens are decoded together, each at its own, in a grid of its own."""

    def __init__(self, model: "Emu3"):
        super().__init__(model.decoder)
        self.model = model

    def choose(self, images: Sequence[Emu3Image], branches: CFGBranches, hidden: Tensor) -> Tensor:
        """Choose the next token of each image, and note it; hidden [B, D] -> the embedded tokens [P, D]."""
        model = self.model
        wanted = [i for i, one in enumerate(images) if one.rows.wanted]
        codes = torch.zeros(len(images), dtype=torch.long, device=model.device)
        if wanted:
            logits = branches.combine(model.image_logits(hidden).float())[wanted]
            sampling = model.config.image_generation.sampling
            codes[wanted] = sample_image_tokens(logits, sampling, [images[i].generator for i in wanted])
        ids = [one.rows.append(codes[i : i + 1]) for i, one in enumerate(images)]
        return model.decoder.embed(torch.cat(ids))


class Emu3ImageAnswer(ImageAnswer):
    """An image after a prompt, read and checked."""

    def __init__(self, model: "Emu3", request: ModelRequest, prompt: str, images: Sequence[Image.Image]):
        self.model = model
        parse_requests(prompt, list(images))
        defaults = model.config.image_generation
        stride = model.vision_tokenizer.config.stride
        (self.grid,) = parse_grids(request.size, 1, stride=stride, default=model.config.size_of_ratio("1:1"))
        (self.scale,) = parse_scales(
            defaults.guidance if request.guidance is None else request.guidance, 1, "guidances"
        )
        negative = defaults.negative_prompt if request.negative_prompt is None else request.negative_prompt
        (negative,) = parse_negative_prompts(negative, 1)
        processor = model.processor
        self.inputs = [processor.generation_parts(prompt, self.grid, images)]
        if self.scale != 1:
            self.inputs.append(processor.negative_parts(negative, self.grid))
        n_steps = ImageRows([self.grid], model.config.special_tokens).n_steps
        check_fits(model.decoder.config, self.inputs, n_more=n_steps - 1)
        self.n_prompt_rows = sum(part.segment.length for part in self.inputs[0])
        self.n_bytes = len(self.inputs) * forward_bytes(
            model.decoder, cached_rows=2 * self.n_prompt_rows + n_steps, step_rows=self.n_prompt_rows
        )

    def work(self, seed: int) -> WorkGenerator:
        """The prefill of both branches, and the image."""
        before, first_ids = split_last_ids(self.inputs)
        caches = yield Prefill(self.model, [EMPTY_CACHE] * len(before), before)
        (generator,) = seeded_generators([seed])
        yield Emu3Image(self.model, caches, first_ids, grid=self.grid, scale=self.scale, generator=generator)

    def image_batch(self) -> Emu3ImageBatch:
        """A new batch."""
        return Emu3ImageBatch(self.model)
