"""UniWorld's images step by step.

Axes: P images, L tokens of an image, M of a condition, C channels, h w latent grid, k reference images.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from unimm.denoisers.mmdit import patchify_latents, unpatchify_latents
from unimm.generation.stepwise import (
    BatchedCall,
    DenoisingBatch,
    DenoisingImage,
    ModelRequest,
    WorkGenerator,
    forward_bytes,
)
from unimm.models.common.separate_outputs import ImageAnswer
from unimm.models.uniworld.latent_denoiser import UniWorldLatentDenoiser
from unimm.processing.images.io import tensor_to_pil
from unimm.processing.requests import parse_requests

if TYPE_CHECKING:
    from unimm.models.uniworld.model import UniWorld


@dataclass(frozen=True)
class UniWorldImageInputs:
    """What the images of some prompts are denoised from, one entry a prompt: conditions [M, C], CLIP's embeddings
    [P, C], sizes (height, width) in pixels, and of some prompts latents that stand below the image's [C, k h, w]."""

    conditions: Sequence[Tensor]
    pooled: Tensor
    sizes: Sequence[tuple[int, int]]
    references: Mapping[int, Tensor]


class UniWorldImage(DenoisingImage):
    """An image on its way: patchified latents x [L, C] under its condition."""

    def __init__(
        self,
        model: "UniWorld",
        inputs: UniWorldImageInputs,
        noise: Tensor,
        *,
        guidance: float,
        true_cfg_scale: float,
        schedule: Tensor,
    ):
        """inputs: of one prompt. noise [C, h, w]."""
        super().__init__(patchify_latents(noise[None].to(model.device))[0], schedule)
        self.model = model
        self.condition = inputs.conditions[0]
        self.pooled = inputs.pooled[0]
        self.references = inputs.references.get(0)
        self.latent_size = noise.shape[1], noise.shape[2]
        self.guidance = guidance
        self.true_cfg_scale = true_cfg_scale

    @property
    def shape_key(self) -> Hashable:
        """The sizes of the latent and of what stands below it."""
        return self.latent_size, 0 if self.references is None else self.references.shape[1]

    @torch.inference_mode()
    def decode(self) -> Image.Image:
        """The image through the VAE."""
        height, width = self.latent_size
        latent = unpatchify_latents(self.shown[None], height=height, width=width)
        return tensor_to_pil(self.model.auxiliary.decode(latent)[0])


class UniWorldImageBatch(DenoisingBatch):
    """Images of one size, and of one number of references, in one forward."""

    def __init__(self, model: "UniWorld"):
        super().__init__()
        self.model = model

    def join(self, images: Sequence[UniWorldImage]) -> UniWorldLatentDenoiser:
        """The conditions of all images, padded to the longest."""
        references = [one.references for one in images if one.references is not None]
        return self.model.latent_denoiser(
            [one.condition for one in images],
            images[0].latent_size,
            pooled=torch.stack([one.pooled for one in images]),
            guidance=self._scales([one.guidance for one in images]),
            true_cfg_scale=self._scales([one.true_cfg_scale for one in images]),
            reference_latents=torch.stack(references) if references else None,
        )

    def _scales(self, scales: Sequence[float]) -> Tensor:
        return torch.tensor(scales, dtype=torch.float32, device=self.model.device)

    def denoise(
        self,
        denoiser: UniWorldLatentDenoiser,
        images: Sequence[UniWorldImage],
        timesteps: Tensor,
        next_timesteps: Tensor,
    ) -> list[Tensor]:
        """One Euler step of all."""
        x = torch.stack([one.x for one in images])
        return list(self.model.denoise_step(denoiser, x, timesteps, next_timesteps))


class UniWorldImageAnswer(ImageAnswer):
    """An image after a prompt and its images, read and checked."""

    def __init__(self, model: "UniWorld", request: ModelRequest, prompt: str, images: Sequence[Image.Image]):
        if request.negative_prompt:
            raise NotImplementedError("UniWorld has no negative_prompt: leave it out, or take another family")
        self.model = model
        self.request = request
        self.prompt = prompt
        self.images = list(images)
        parse_requests(prompt, self.images)
        self.options = model._image_options(
            1, size=request.size, seed=request.seed, steps=request.steps, guidance=request.guidance, progress=False
        )
        self.sample = model.processor.prompt_parts(prompt, self.images)
        self.n_prompt_rows = sum(part.segment.length for part in self.sample)
        height, width = self.options.sizes[0] or model.output_size(self.images)
        n_tokens = height * width // model.token_pixels**2 * (1 + len(self.images)) + self.n_prompt_rows
        # of a block, at once: about 24 widths of every token, under both branches of guidance
        denoiser = model.config.denoiser
        activations = 2 * n_tokens * 24 * denoiser.n_heads * denoiser.head_dim * 4
        self.n_bytes = forward_bytes(
            model.mllm.decoder, cached_rows=2 * self.n_prompt_rows, step_rows=self.n_prompt_rows
        )
        self.n_bytes += activations

    def work(self, seed: int) -> WorkGenerator:
        """The MLLM's output, the condition, and the image."""
        model = self.model
        outputs = yield BatchedCall(model.encode_prompts, [self.sample])
        inputs = model.image_inputs(outputs, [self.prompt], [self.images], self.options)
        noise = model.initial_noise(inputs.sizes[0], seed)
        n_references = inputs.references[0].shape[1] // noise.shape[1] if inputs.references else 0
        yield UniWorldImage(
            model,
            inputs,
            noise,
            guidance=self.options.guidance_scales[0],
            true_cfg_scale=self.options.true_cfg_scales[0],
            schedule=model.sampling_timesteps(inputs.sizes[0], self.options.steps, n_references=n_references),
        )

    def image_batch(self) -> UniWorldImageBatch:
        """A new batch."""
        return UniWorldImageBatch(self.model)
