"""MetaQuery's images step by step.

Axes: P images, C latent channels, h w latent grid.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from unimm.denoisers.sana import SanaCondition
from unimm.generation.flow import DPMSolverPP, dpm_timesteps, parse_steps
from unimm.generation.stepwise import (
    BatchedCall,
    DenoisingBatch,
    DenoisingImage,
    ModelRequest,
    WorkGenerator,
    forward_bytes,
)
from unimm.models.common.separate_outputs import ImageAnswer
from unimm.models.metaquery.latent_denoiser import MetaQueryLatentDenoiser
from unimm.models.metaquery.processor import ConditionBatch
from unimm.processing.images.io import tensor_to_pil
from unimm.processing.requests import parse_negative_prompts, parse_requests, parse_scales

if TYPE_CHECKING:
    from unimm.models.metaquery.model import MetaQuery


@dataclass(frozen=True)
class WeightedCondition:
    """A branch of an image's guidance: a condition of one row, and the weight of the velocity under it."""

    condition: SanaCondition
    weight: float


class MetaQueryImage(DenoisingImage):
    """An image on its way: a latent x [C, h, w] under its branches, and the solver's memory of its last step."""

    def __init__(self, model: "MetaQuery", branches: Sequence[WeightedCondition], noise: Tensor, schedule: Tensor):
        super().__init__(noise.to(model.device), schedule)
        self.model = model
        self.branches = branches
        self.last_h = inf  # before the first step nothing is known
        self.last_data = self.x

    @property
    def shape_key(self) -> Hashable:
        """The latent's shape."""
        return tuple(self.x.shape)

    def move(self, x: Tensor) -> None:
        """Take the x of the next timestep; the data is what the solver predicted."""
        super().move(x)
        self.data = self.last_data

    @torch.inference_mode()
    def decode(self) -> Image.Image:
        """The image through the DC-AE."""
        return tensor_to_pil(self.model.decode_latents(self.shown[None])[0])


class MetaQueryImageBatch(DenoisingBatch):
    """Images of one size in one forward."""

    def __init__(self, model: "MetaQuery"):
        super().__init__()
        self.model = model

    def join(self, images: Sequence[MetaQueryImage]) -> MetaQueryLatentDenoiser:
        """The branches of all images."""
        condition = SanaCondition.cat([branch.condition for one in images for branch in one.branches])
        rows = iter(range(len(condition.tokens)))
        branches = [[(next(rows), branch.weight) for branch in one.branches] for one in images]
        return self.model.latent_denoiser(condition, branches)

    def denoise(
        self,
        denoiser: MetaQueryLatentDenoiser,
        images: Sequence[MetaQueryImage],
        timesteps: Tensor,
        next_timesteps: Tensor,
    ) -> list[Tensor]:
        """One step of the solver, which takes each image's memory and gives it back."""
        solver: DPMSolverPP = denoiser.solver
        solver.last_data = torch.stack([one.last_data for one in images])
        solver.last_h = [one.last_h for one in images]
        x = torch.stack([one.x for one in images])
        moved = self.model.denoise_step(denoiser, x, timesteps, next_timesteps)
        assert solver.last_data is not None
        for image, data, last_h in zip(images, solver.last_data, solver.last_h, strict=True):
            image.last_data = data
            image.last_h = last_h
        return list(moved)


class MetaQueryImageAnswer(ImageAnswer):
    """An image after a prompt, or from input images, read and checked."""

    def __init__(self, model: "MetaQuery", request: ModelRequest, prompt: str, images: Sequence[Image.Image]):
        config = model.config
        self.model = model
        self.size = request.size
        parse_requests(prompt, list(images), allow_empty=True)
        if not (prompt.strip() or images):
            raise ValueError("got an empty prompt: expected at least a word, or an image to generate from")
        self.steps = parse_steps(config.steps if request.steps is None else request.steps)
        (scale,) = parse_scales(config.guidance if request.guidance is None else request.guidance, 1, "guidances")
        (negative,) = parse_negative_prompts(request.negative_prompt, 1)
        batch = ConditionBatch(model.processor)
        self.branches = batch.guidance_branches(
            prompt, images, negative_prompt=negative, guidance=scale, image_guidance=config.image_guidance
        )
        self.samples = batch.samples
        noise = model._initial_noise(self.size, [0])
        self.n_prompt_rows = sum(part.segment.length for part in self.samples[-1])
        n_rows = sum(part.segment.length for sample in self.samples for part in sample)
        n_latents = noise[0, 0].numel() // config.denoiser.patch_size**2
        # of a block, at once: about 16 widths of every latent token
        activations = len(self.branches) * n_latents * 16 * config.denoiser.n_heads * config.denoiser.head_dim * 4
        self.n_bytes = forward_bytes(model.decoder, cached_rows=n_rows, step_rows=n_rows) + activations

    def work(self, seed: int) -> WorkGenerator:
        """The conditions, and the image."""
        model = self.model
        conditions = yield BatchedCall(model.encode_conditions, self.samples)
        branches = [WeightedCondition(conditions[row], weight) for row, weight in self.branches]
        scheduler = model.config.scheduler
        schedule = dpm_timesteps(self.steps, shift=scheduler.timestep_shift, train_steps=scheduler.n_train_timesteps)
        yield MetaQueryImage(model, branches, model._initial_noise(self.size, [seed])[0], schedule)

    def image_batch(self) -> MetaQueryImageBatch:
        """A new batch."""
        return MetaQueryImageBatch(self.model)
