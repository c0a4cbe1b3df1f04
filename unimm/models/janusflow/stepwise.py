"""JanusFlow's images step by step.

Axes: P images, C channels, H W sides of a latent.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from unimm.generation.flow import flow_timesteps, parse_steps
from unimm.generation.kv_cache import EMPTY_CACHE, KVCache, check_fits
from unimm.generation.noise import seeded_generators
from unimm.generation.stepwise import (
    DenoisingBatch,
    DenoisingImage,
    ModelRequest,
    Prefill,
    WorkGenerator,
    forward_bytes,
)
from unimm.models.common.cfg_branches import CFGBranches
from unimm.models.common.separate_outputs import ImageAnswer
from unimm.models.janusflow.latent_denoiser import JanusFlowLatentDenoiser
from unimm.models.janusflow.processor import bos_unconditional
from unimm.processing.images.io import tensor_to_pil
from unimm.processing.requests import parse_requests, parse_scales

if TYPE_CHECKING:
    from unimm.models.janusflow.model import JanusFlow


class JanusFlowImage(DenoisingImage):
    """An image on its way: a latent x [C, H, W] after its prompt, and with guidance after the unconditional one."""

    def __init__(self, model: "JanusFlow", caches: Sequence[KVCache], noise: Tensor, *, scale: float, schedule: Tensor):
        super().__init__(noise.to(model.device), schedule)
        self.model = model
        self.caches = caches
        self.scale = scale

    @torch.inference_mode()
    def decode(self) -> Image.Image:
        """The image through the autoencoder."""
        return tensor_to_pil(self.model.decode_latents(self.shown[None])[0])


class JanusFlowImageBatch(DenoisingBatch):
    """Images of the one size that the model was trained for."""

    def __init__(self, model: "JanusFlow"):
        super().__init__()
        self.model = model

    def join(self, images: Sequence[JanusFlowImage]) -> JanusFlowLatentDenoiser:
        """The branches of all images in one buffer."""
        model = self.model
        branches = CFGBranches.plan([one.scale for one in images], model.device)
        caches = [one.caches[0] for one in images] + [images[i].caches[1] for i in branches.guided]
        return JanusFlowLatentDenoiser(model.decoder, caches, branches, n_latent_tokens(model))

    def denoise(
        self,
        denoiser: JanusFlowLatentDenoiser,
        images: Sequence[JanusFlowImage],
        timesteps: Tensor,
        next_timesteps: Tensor,
    ) -> list[Tensor]:
        """One step of all."""
        x = torch.stack([one.x for one in images])
        return list(self.model.denoise_step(denoiser, x, timesteps, next_timesteps))


class JanusFlowImageAnswer(ImageAnswer):
    """An image after a prompt, read and checked."""

    def __init__(self, model: "JanusFlow", request: ModelRequest, prompt: str, images: Sequence[Image.Image]):
        config = model.config
        self.model = model
        model.check_image_size(request.size, config.image_size)
        if request.negative_prompt:
            raise NotImplementedError("JanusFlow has no negative_prompt: leave it out, or take another family")
        parse_requests(prompt, list(images))
        (self.scale,) = parse_scales(config.guidance if request.guidance is None else request.guidance, 1, "guidances")
        self.steps = parse_steps(config.steps if request.steps is None else request.steps)
        self.prompt = model.processor.generation_parts(prompt, images)
        n_rows = 1 + n_latent_tokens(model)
        check_fits(model.decoder.config, [self.prompt], n_more=n_rows)
        self.n_prompt_rows = sum(part.segment.length for part in self.prompt)
        self.n_bytes = forward_bytes(
            model.decoder, cached_rows=2 * (self.n_prompt_rows + 1) + 2 * n_rows, step_rows=2 * n_rows
        )

    def work(self, seed: int) -> WorkGenerator:
        """The prefill of both branches, and the image."""
        inputs = [self.prompt, *([bos_unconditional(self.prompt)] if self.scale != 1 else [])]
        caches = yield Prefill(self.model, [EMPTY_CACHE] * len(inputs), inputs)
        noise = self.model.initial_noise(*seeded_generators([seed]))
        schedule = flow_timesteps(self.steps, 1.0)
        yield JanusFlowImage(self.model, caches, noise, scale=self.scale, schedule=schedule)

    def image_batch(self) -> JanusFlowImageBatch:
        """A new batch."""
        return JanusFlowImageBatch(self.model)


def n_latent_tokens(model: "JanusFlow") -> int:
    """Tokens of an image of the trained size."""
    rows, columns = (model.config.gen_encoder.grid_size(side) for side in model.config.latent_size)
    return rows * columns
