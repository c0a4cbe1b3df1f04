"""Show-o's images step by step: a step draws all masked tokens of an image and masks the least sure ones again.

Axes: P images, B branches (with guidance two for an image), n tokens of an image.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image

from unimm.generation.flow import parse_steps
from unimm.generation.kv_cache import EMPTY_CACHE, KVCache, check_fits
from unimm.generation.masked import draw_masked_noise, masked_step
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
from unimm.models.show_o.masked_session import MaskedImageSession
from unimm.processing.images.io import tensor_to_pil
from unimm.processing.requests import parse_requests, parse_scales
from unimm.sequence.parts import text_part

if TYPE_CHECKING:
    from unimm.models.show_o.model import ShowO


class MaskedImage(ImageInProgress):
    """An image on its way: its tokens [n], some of them masked, and those that were drawn last."""

    def __init__(
        self,
        model: "ShowO",
        caches: Sequence[KVCache],
        *,
        grid: tuple[int, int],
        steps: int,
        scale: float,
        generator: torch.Generator,
    ):
        self.model = model
        self.caches = caches
        self.grid = grid
        self.n_steps = steps
        self.scale = scale
        self.generator = generator
        self.tokens = torch.full((grid[0] * grid[1],), model.config.n_codes, device=model.device)
        self.drawn = torch.zeros_like(self.tokens)

    @torch.inference_mode()
    def decode(self) -> Image.Image:
        """The image through the image tokenizer, of what was drawn at the last step."""
        return tensor_to_pil(self.model.decode_image_tokens(self.drawn[None], self.grid)[0])


class MaskedImageBatch(ImageBatch):
    """Images whose tokens are decoded together; those of one number of tokens in one forward."""

    def __init__(self, model: "ShowO"):
        self.model = model
        # by the number of tokens: the images, and what their prompts' caches were joined to
        self._sessions: dict[int, tuple[list[MaskedImage], MaskedImageSession]] = {}

    @torch.inference_mode()
    def advance(self, images: Sequence[ImageInProgress]) -> None:
        """One step of each image, each at its own."""
        groups: dict[int, list[MaskedImage]] = {}
        for image in images:
            assert isinstance(image, MaskedImage)
            groups.setdefault(len(image.tokens), []).append(image)
        before = self._sessions
        self._sessions = {}
        for n, group in groups.items():
            branches = CFGBranches.plan([one.scale for one in group], self.model.device)
            joined, session = before.get(n, ([], None))
            if (
                session is None
                or len(joined) != len(group)
                or any(a is not b for a, b in zip(joined, group, strict=True))
            ):
                caches = [one.caches[0] for one in group] + [group[i].caches[1] for i in branches.guided]
                session = MaskedImageSession(self.model.decoder, self.model.config, caches, n)
            self._sessions[n] = group, session
            logits = self.model.masked_logits(session, branches, torch.stack([one.tokens for one in group]))
            for one, some in zip(group, logits, strict=True):
                self._move(one, some[None])

    def _move(self, image: MaskedImage, logits: torch.Tensor) -> None:
        """Take the tokens of the next step, by an image's logits [1, n, V]."""
        config = self.model.config
        sampling = config.masked_sampling
        noise = draw_masked_noise([image.generator], len(image.tokens), config.n_codes, sampling)
        tokens, drawn, _ = masked_step(
            logits,
            image.tokens[None],
            mask_token=config.n_codes,
            step=image.step,
            steps=image.n_steps,
            sampling=sampling,
            noise=noise,
        )
        image.tokens = tokens[0]
        image.drawn = drawn[0]
        image.step += 1


class ShowOImageAnswer(ImageAnswer):
    """An image after a prompt, read and checked."""

    def __init__(self, model: "ShowO", request: ModelRequest, prompt: str, images: Sequence[Image.Image]):
        config = model.config
        self.model = model
        if request.negative_prompt:
            raise NotImplementedError("ShowO has no negative_prompt: leave it out, or take another family")
        parse_requests(prompt, list(images))
        self.grid = model.parse_grid(request.size, with_masks=False)
        self.steps = parse_steps(config.steps if request.steps is None else request.steps)
        (self.scale,) = parse_scales(config.guidance if request.guidance is None else request.guidance, 1, "guidances")
        self.inputs = [model.processor.generation_parts(prompt, images)]
        if self.scale != 1:
            self.inputs.append([text_part(model.processor.prompt_ids(""))])
        n_rows = self.grid[0] * self.grid[1] + 2
        check_fits(model.decoder.config, self.inputs, n_more=n_rows)
        self.n_prompt_rows = sum(part.segment.length for part in self.inputs[0])
        # the caches, and the buffer that they are joined in
        cached_rows = 2 * self.n_prompt_rows + n_rows
        one = forward_bytes(model.decoder, cached_rows=cached_rows, step_rows=max(n_rows, self.n_prompt_rows))
        self.n_bytes = len(self.inputs) * one

    def work(self, seed: int) -> WorkGenerator:
        """The prefill of both branches, and the image."""
        caches = yield Prefill(self.model, [EMPTY_CACHE] * len(self.inputs), self.inputs)
        (generator,) = seeded_generators([seed])
        yield MaskedImage(self.model, caches, grid=self.grid, steps=self.steps, scale=self.scale, generator=generator)

    def image_batch(self) -> MaskedImageBatch:
        """A new batch."""
        return MaskedImageBatch(self.model)
