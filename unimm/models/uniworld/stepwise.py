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
    DecodeText,
    DenoisingBatch,
    DenoisingImage,
    ModelRequest,
    RequestRun,
    WorkGenerator,
    forward_bytes,
)
from unimm.models.common.separate_outputs import ImageAnswer, TextAnswer
from unimm.models.uniworld.latent_denoiser import UniWorldLatentDenoiser
from unimm.models.uniworld.network import MLLMOutput
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
        (output,) = yield self.encoding
        yield self.image_after(output, seed)

    @property
    def encoding(self) -> BatchedCall:
        """The MLLM's output for the prompt."""
        return BatchedCall(self.model.encode_prompts, [self.sample])

    @torch.inference_mode()
    def image_after(self, output: MLLMOutput, seed: int) -> UniWorldImage:
        """The image, to be denoised under what the MLLM gave."""
        model = self.model
        inputs = model.image_inputs([output], [self.prompt], [self.images], self.options)
        noise = model.initial_noise(inputs.sizes[0], seed)
        n_references = inputs.references[0].shape[1] // noise.shape[1] if inputs.references else 0
        return UniWorldImage(
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


def routed_run(model: "UniWorld", request: ModelRequest) -> RequestRun:
    """A request that the task head routes by its last message, as `respond` does: an image after it, or a text.

    The text is `respond`'s where there is one message, and `chat`'s after the whole of a longer conversation.
    """
    model.supported_options(think=request.think, steps=request.steps)
    last = request.messages[-1]
    image = UniWorldImageAnswer(model, request, last.text, last.images)
    text = TextAnswer(model.chat_mllm, request)

    def work() -> WorkGenerator:
        (output,) = yield image.encoding
        answer_logit, image_logit = model.route_logits(output).tolist()
        if answer_logit < image_logit:
            yield image.image_after(output, request.seed)
        elif len(request.messages) == 1 and request.system is None:
            sampling = request.text_sampling.with_default_max_tokens(model.config.max_answer_tokens)
            ends = tuple(model.mllm.eos_ids)
            tokenizer = model.mllm.processor.text_tokenizer
            yield DecodeText(model.mllm, output.cache, output.last_id, ends, sampling, request.seed, tokenizer)
        else:
            yield from text.work(request.seed)

    return RequestRun(
        work=work(),
        image_batch=image.image_batch,
        n_bytes=image.n_bytes + text.n_bytes,
        n_prompt_tokens=image.n_prompt_rows,
    )
