"""Samples for training UniWorld, of records and of the shapes world, and the batches that they make; without the model.

Timesteps t = sigmoid(n), n ~ N(0, 1), shifted as the sampler's. Lin et al. 2025, arXiv 2506.03147, section 3;
docs/originals/uniworld.md, "Training".
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unimm.data.batching import pad_rows, stack_images
from unimm.data.records import Record
from unimm.denoisers.mmdit import PATCH_SIZE
from unimm.generation.flow import dynamic_shift, shift_timesteps
from unimm.models.uniworld.processor import UniWorldProcessor, nearest_aspect_size
from unimm.processing.images.io import resize
from unimm.processing.images.siglip import SiglipImageProcessor
from unimm.sequence.parts import Part, text_part
from unimm.training.fields import (
    IMAGE_TASKS,
    AtLeastOne,
    Dtype,
    Fraction,
    NotNegative,
    RecipeSection,
    TaskWeights,
    known_tasks,
)
from unimm.training.tasks.edit_weights import EditWeights
from unimm.training.tasks.generation_request import GENERATED_KINDS, GenerationRequest, join_pieces
from unimm.vlms.qwen2_5_vl.processor import IMAGE_PAD

# what stands for a prompt that is dropped (the released code's drop_prompt_rate)
DROPPED_PROMPT = "Generate an image."


@dataclass(frozen=True, kw_only=True)
class UniWorldCommonConfig(RecipeSection):
    """What the recipe's `options` are with `data` and without."""

    # the published stages: the MLLM's projector, without image features; that, SigLIP2's projector, and the attention
    # and modulation of the denoiser's image stream. "all": everything but the MLLM and the autoencoder, for a denoiser
    # that is trained from scratch
    trained: Literal["stage 1", "stage 2", "all"]
    # prefixes of the names of parameters that are not trained besides
    frozen: tuple[str, ...]
    # noised copies of a target, each at its own timestep: cheaper than as many samples
    timesteps_per_image: AtLeastOne
    # the part of samples without a condition
    dropout: Fraction
    # whether a prompt ends with the token that images follow, as in the original's training and not in its sampling
    append_vision_start: bool
    # how much more an edit's loss counts where it changed the image; "" for evenly
    edit_weights: Literal["", "log", "linear", "exp", "quadratic"]
    # the guidance scale that is embedded, where the denoiser embeds one
    guidance: NotNegative
    # folders or hub ids: of a Qwen2.5-VL; of a VAE; of CLIP and its tokenizer in a FLUX, or "" where `captioned` is
    # false; of a FLUX transformer, or "" for one of the recipe's numbers; of a SigLIP2, or "" for one of the recipe's
    # numbers that begins from the trained ViT in the folder `vit`. All "" where `model` names a release
    mllm: str = ""
    vae: str = ""
    text_encoders: str = ""
    denoiser: str = ""
    siglip: str = ""
    vit: str = ""
    # of the MLLM's weights, which are not trained
    mllm_dtype: Dtype = "bfloat16"
    # the denoiser's block, counted from 1, double ones first, behind which hidden states of noised images are aligned with
    # SigLIP2's features of the target; null: none
    alignment_block: AtLeastOne | None = None
    # whether torch.compile fuses the denoiser's blocks
    compile: bool

    @property
    def parts(self) -> dict[str, str | None]:
        """The folders and hub ids of the parts that a model is built around, by their names here; None for none."""
        return {
            name: getattr(self, name) or None for name in ("mllm", "vae", "text_encoders", "denoiser", "siglip", "vit")
        }


@dataclass(frozen=True, kw_only=True)
class UniWorldTrainingConfig(UniWorldCommonConfig):
    """The recipe's `options`, without `data`: on the shapes world."""

    # samples of each task in a batch, or their weights (unimm.data.batching.sample_tasks)
    tasks: Annotated[TaskWeights, known_tasks(IMAGE_TASKS)]
    # the part of things in generation and editing with a novel colour, and with a novel shape
    novel_colours: Fraction
    novel_shapes: Fraction


@dataclass(frozen=True, kw_only=True)
class UniWorldSample:
    """A prompt with its images, and the image to generate."""

    kind: str  # of its loss
    parts: Sequence[Part]
    conditioned: bool  # whether the prompt conditions the denoiser
    siglip_images: Sequence[Tensor]  # [3, S, S], the prompt's images for SigLIP2
    reference: NDArray[np.uint8] | None  # [h, w, 3], the first of them for the VAE
    target: NDArray[np.uint8]  # [h, w, 3]
    weights: Tensor  # [1, h / 8, w / 8], of the loss

    @property
    def n_tokens(self) -> int:
        """Its rows in the MLLM."""
        return sum(part.segment.length for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class UniWorldInputs:
    """Prompts with their images, and a target for each."""

    prompts: list[Sequence[Part]]
    conditioned: Tensor  # [P] bool: whether a sample has a condition
    siglip_images: Tensor  # [k, 3, S, S], the prompts' images for SigLIP2, in order
    reference_images: Tensor  # [k, 3, h, w], the same for the VAE, the first of each sample that has one
    reference_indices: Tensor  # [P], index into them, -1 for none
    images: Tensor  # [P, 3, h, w], the targets
    siglip_targets: Tensor | None = (
        None  # [P, 3, S, S], the same for SigLIP2, where hidden states are aligned with them
    )
    posterior: Tensor  # [P, C, h / 8, w / 8], the noise of the targets' latents
    weights: Tensor  # [P, 1, h / 8, w / 8], of the loss
    image_kinds: Tensor  # [P], index into the builder's kinds


@dataclass(frozen=True, kw_only=True)
class UniWorldEncoded:
    """What the MLLM, the vision encoder and the VAE compute of prompts, images and targets."""

    hidden_states: list[Tensor]  # P of [L, D]
    image_ends: list[list[int]]  # P, the rows of each sample that follow its images
    siglip_features: Tensor | None  # [k, patches, C], of all images in order
    conditioned: Tensor  # [P] bool
    latents: Tensor  # [P, C, h / 8, w / 8]
    target_features: Tensor | None = None  # [P, patches, F], of the targets, where hidden states are aligned with them
    reference_latents: Tensor  # [k, C, h / 8, w / 8]
    reference_indices: Tensor  # [P], index into them, -1 for none
    weights: Tensor  # [P, 1, h / 8, w / 8]
    image_kinds: Tensor  # [P]


@dataclass(frozen=True, kw_only=True)
class UniWorldBatch:
    """Samples, and noised copies of their targets."""

    samples: UniWorldInputs | UniWorldEncoded
    noise: Tensor  # [B, C, h / 8, w / 8]
    times: Tensor  # [B]
    sample_indices: Tensor  # [B], index into the samples


@dataclass(frozen=True, kw_only=True)
class UniWorldSampleBuilder:
    """Samples of records, and batches of samples.

    kinds: of the losses. prompt_dropout: the part of samples whose text is DROPPED_PROMPT. images_in_place: whether
    images stand where a record has them, a line each, as in the original's training; else where `generate` places them.
    reference_latents: whether the denoiser is shown the first image. image_pixels, n_ratios: of the targets' sizes.
    latent_channels, stride: of the VAE.
    """

    options: UniWorldCommonConfig
    processor: UniWorldProcessor
    siglip_transform: SiglipImageProcessor
    kinds: tuple[str, ...] = GENERATED_KINDS
    prompt_dropout: float = 0.0
    images_in_place: bool = False
    reference_latents: bool
    image_pixels: int
    n_ratios: int
    latent_channels: int
    stride: int

    FAMILY: ClassVar[str] = "UniWorld"

    def prepare(self, record: Record, rng: random.Random) -> UniWorldSample:
        """The sample of a record; its target is resized, not cropped, to the size whose aspect ratio is nearest.

        Raises ValueError for a record that generates no image, for images that are missing or broken, and where edits
        are weighted, for one that changes almost nothing.
        """
        request = GenerationRequest.from_record(record, rng, family=self.FAMILY)
        if request.system:
            raise ValueError("got a system prompt: UniWorld's is that of its config.json for every sample")
        drops_prompt = self.prompt_dropout > 0 and rng.random() < self.prompt_dropout
        target = request.target.load()
        height, width = nearest_aspect_size(
            target.height, target.width, image_pixels=self.image_pixels, n_ratios=self.n_ratios
        )
        weights = torch.ones(1, height // self.stride, width // self.stride)
        if record.edit_weights and self.options.edit_weights and request.images:
            weights = self.edit_weights(request.images, target, size=(weights.shape[1], weights.shape[2]))
        resized = resize(target, (width, height))
        return self.sample(
            request.kind,
            prompt=DROPPED_PROMPT if drops_prompt else self.prompt(request),
            images=request.images,
            target=np.asarray(resized),
            weights=weights,
            rng=rng,
        )

    def prompt(self, request: GenerationRequest) -> str:
        """The text of a request, with placeholders of its images where they are to stand in place."""
        if not self.images_in_place:
            return request.text
        pieces = join_pieces(request.pieces)
        if any(isinstance(piece, str) and IMAGE_PAD in piece for piece in pieces):
            raise ValueError(f"got {IMAGE_PAD} in a text: expected images as parts of the record")
        return "".join(piece if isinstance(piece, str) else IMAGE_PAD for piece in pieces)

    def sample(
        self,
        kind: str,
        *,
        prompt: str,
        images: Sequence[Image.Image],
        target: NDArray[np.uint8],
        weights: Tensor,
        rng: random.Random,
    ) -> UniWorldSample:
        """The sample of a prompt, its images, a target and the weights of its loss, its condition dropped at random."""
        reference = None
        if self.reference_latents and images:
            height, width = target.shape[:2]
            reference = np.asarray(resize(images[0], (width, height)))
        return UniWorldSample(
            kind=kind,
            parts=self.prompt_parts(prompt, images),
            conditioned=rng.random() >= self.options.dropout,
            siglip_images=[self.siglip_transform.preprocess(image) for image in images],
            reference=reference,
            target=target,
            weights=weights,
        )

    def prompt_parts(self, prompt: str, images: Sequence[Image.Image]) -> list[Part]:
        """A prompt as training has it."""
        parts = self.processor.prompt_parts(prompt, images)
        if not self.options.append_vision_start:
            return parts
        *before, last = parts
        vision_start = self.processor.mllm_processor.special_tokens.vision_start
        return [*before, text_part([*last.ids.tolist(), vision_start])]

    def edit_weights(self, images: Sequence[Image.Image], target: Image.Image, *, size: tuple[int, int]) -> Tensor:
        """The weight of each latent in an edit's loss [1, h, w] of this size, by the images as the MLLM is shown them;
        even where they are of several sizes.

        Raises SmallEditError for an edit of almost nothing, ValueError for several images whose edits share no pixel.
        """
        transform = self.processor.mllm_processor.image_processor
        arrays = [np.asarray(transform(image)) for image in (*images, target)]
        if len({array.shape for array in arrays}) > 1:
            return torch.ones(1, *size)
        *references, last = arrays
        weights = EditWeights(function=self.options.edit_weights)(references, last)
        return F.interpolate(weights[None], size, mode="nearest")[0]

    def batch_key(self, sample: UniWorldSample) -> tuple[int, int, bool]:
        """The size of the target, and whether there is a reference: the denoiser takes images of one size."""
        height, width = sample.target.shape[:2]
        return height, width, sample.reference is not None

    def collate(self, samples: Sequence[UniWorldSample], rng: random.Random) -> UniWorldBatch:
        """Samples of one size as a batch, with noise and timesteps."""
        return self.noised(self.inputs(samples, rng), rng)

    def inputs(self, samples: Sequence[UniWorldSample], rng: random.Random) -> UniWorldInputs:
        """Samples of one size for the model, with the noise of the targets' latents."""
        size = self.siglip_transform.size
        siglip_images = [image for one in samples for image in one.siglip_images]
        references = [one.reference for one in samples if one.reference is not None]
        has_reference = torch.tensor([one.reference is not None for one in samples])
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        images = stack_images([one.target for one in samples])
        latent_shape = (self.latent_channels, images.shape[2] // self.stride, images.shape[3] // self.stride)
        return UniWorldInputs(
            prompts=pad_rows([one.parts for one in samples], self.processor.mllm_processor.special_tokens.im_end),
            conditioned=torch.tensor([one.conditioned for one in samples]),
            siglip_images=torch.stack(siglip_images) if siglip_images else torch.zeros(0, 3, size, size),
            reference_images=stack_images(references),
            reference_indices=torch.where(has_reference, has_reference.cumsum(0) - 1, -1),
            images=images,
            siglip_targets=self.siglip_targets(samples) if self.options.alignment_block else None,
            posterior=torch.randn(len(samples), *latent_shape, generator=generator),
            weights=torch.stack([one.weights for one in samples]),
            image_kinds=torch.tensor([self.kinds.index(one.kind) for one in samples]),
        )

    def siglip_targets(self, samples: Sequence[UniWorldSample]) -> Tensor:
        """The targets as SigLIP2 reads them [P, 3, S, S]."""
        return torch.stack([self.siglip_transform.preprocess(Image.fromarray(one.target)) for one in samples])

    def noised(self, samples: UniWorldInputs | UniWorldEncoded, rng: random.Random) -> UniWorldBatch:
        """The samples with noise and timesteps for every copy."""
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        n_copies = self.options.timesteps_per_image
        n_samples = len(samples.image_kinds)
        # of the weights, which both kinds of samples have
        height, width = samples.weights.shape[2:]
        noise = torch.randn(n_copies * n_samples, self.latent_channels, height, width, generator=generator)
        times = torch.randn(n_copies * n_samples, generator=generator).sigmoid()
        return UniWorldBatch(
            samples=samples,
            noise=noise,
            times=shift_timesteps(times, dynamic_shift(height * width // PATCH_SIZE**2)),
            sample_indices=torch.arange(n_samples).repeat_interleave(n_copies),
        )
