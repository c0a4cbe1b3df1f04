"""Batches for training UniWorld: prompts with images, targets with noised copies, and a cache's records of them.

Timesteps t = sigmoid(n), n ~ N(0, 1), shifted as the sampler's. Lin et al. 2025, arXiv 2506.03147, section 3;
docs/originals/uniworld.md, "Training".
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from PIL import Image
from torch import Tensor

from unimm.data.batching import kind_indices, pad_rows, sample_tasks, stack_images
from unimm.data.shapes import Example, example
from unimm.data.shapes.novel_attributes import augment_novel_attributes
from unimm.denoisers.mmdit import PATCH_SIZE
from unimm.generation.flow import dynamic_shift, shift_timesteps
from unimm.models.uniworld.processor import UniWorldProcessor
from unimm.processing.images.siglip import SiglipImageProcessor
from unimm.sequence.parts import Part, text_part
from unimm.training.cache import SHARD_SIZE, FeatureCache, Record
from unimm.training.config import RecipeSection
from unimm.training.fields import IMAGE_TASKS, AtLeastOne, Dtype, Fraction, NotNegative, TaskWeights, known_tasks
from unimm.training.tasks.deepseek_chat import IMAGE_KINDS
from unimm.training.tasks.edit_weights import EditWeights, SmallEditError


@dataclass(frozen=True, kw_only=True)
class UniWorldTrainingConfig(RecipeSection):
    """The recipe's `options`."""

    # samples of each task in a batch, or their weights (unimm.data.batching.sample_tasks)
    tasks: Annotated[TaskWeights, known_tasks(IMAGE_TASKS)]
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
    # the part of things in generation and editing with a novel colour, and with a novel shape
    novel_colours: Fraction
    novel_shapes: Fraction
    # folders or hub ids: of a Qwen2.5-VL; of a VAE; of CLIP and its tokenizer in a FLUX, or "" where `captioned` is
    # false; of a FLUX transformer, or "" for one of the recipe's numbers; of a SigLIP2, or "" for one of the recipe's
    # numbers that begins from the trained ViT in the folder `vit`
    mllm: str
    vae: str
    text_encoders: str
    denoiser: str
    siglip: str
    vit: str
    # of the MLLM's weights, which are not trained
    mllm_dtype: Dtype
    # whether torch.compile fuses the denoiser's blocks
    compile: bool


@dataclass(frozen=True, kw_only=True)
class UniWorldInputs:
    """Prompts with their images, and a target for each."""

    prompts: list[Sequence[Part]]
    conditioned: Tensor  # [P] bool: whether a sample has a condition
    siglip_images: Tensor  # [k, 3, S, S], the prompts' images for SigLIP2, in order
    reference_images: Tensor  # [k, 3, h, w], the same for the VAE, the first of each sample that has one
    reference_indices: Tensor  # [P], index into them, -1 for none
    images: Tensor  # [P, 3, h, w], the targets
    posterior: Tensor  # [P, C, h / 8, w / 8], the noise of the targets' latents
    weights: Tensor  # [P, 1, h / 8, w / 8], of the loss
    image_kinds: Tensor  # [P], index into IMAGE_KINDS


@dataclass(frozen=True, kw_only=True)
class UniWorldEncoded:
    """What the MLLM, the vision encoder and the VAE compute of prompts, images and targets."""

    hidden_states: list[Tensor]  # P of [L, D]
    image_ends: list[list[int]]  # P, the rows of each sample that follow its images
    siglip_features: Tensor | None  # [k, patches, C], of all images in order
    conditioned: Tensor  # [P] bool
    latents: Tensor  # [P, C, h / 8, w / 8]
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
class UniWorldDataset:
    """Batches by step: the same for a seed on every machine, and made without the model."""

    options: UniWorldTrainingConfig
    processor: UniWorldProcessor
    siglip_transform: SiglipImageProcessor
    # channels, height, width
    latent_shape: tuple[int, int, int]
    batch_size: int
    seed: int
    # in place of new samples, where there is one
    cache: FeatureCache | None = None

    def __call__(self, step: int) -> UniWorldBatch:
        rng = random.Random(f"{self.seed}/{step}")
        if self.cache is None:
            return self.batch(self.examples(step, self.batch_size, rng), rng)
        records = [self.cache[i] for i in self.cache.batch_indices(step, self.batch_size, self.seed)]
        return self.noised(encoded_from_records(records), rng)

    def examples(self, step: int, size: int, rng: random.Random) -> list[Example]:
        """The examples of a step, or of a shard of a cache."""
        tasks = sample_tasks(self.options.tasks, size, rng)
        return [self.training_example(task, step * size + i, rng) for i, task in enumerate(tasks)]

    def training_example(self, task: str, index: int, rng: random.Random) -> Example:
        """A training example, with some novel attributes. Raises ValueError for a task whose output is text."""
        one = example(task, index, seed=self.seed)
        if one.target is None:
            raise ValueError(
                f"got the task {task}, which generates no image: the MLLM is frozen; expected draw, edit or reason"
            )
        return augment_novel_attributes(one, rng, colours=self.options.novel_colours, shapes=self.options.novel_shapes)

    def batch(self, examples: Sequence[Example], rng: random.Random) -> UniWorldBatch:
        """Examples as a batch, with sampled timesteps and noise, and conditions dropped at random."""
        return self.noised(self.inputs(examples, rng), rng)

    def cache_inputs(self, shard: int) -> UniWorldInputs:
        """The samples of one shard of a cache."""
        rng = random.Random(f"{self.seed}/cache/{shard}")
        return self.inputs(self.examples(shard, SHARD_SIZE, rng), rng)

    def inputs(self, examples: Sequence[Example], rng: random.Random) -> UniWorldInputs:
        """Examples for the model, with conditions dropped at random."""
        n = len(examples)
        images = [[Image.fromarray(image) for image in one.images] for one in examples]
        samples = [self.prompt_parts(one.prompt, some) for one, some in zip(examples, images, strict=True)]
        size = self.siglip_transform.size
        siglip_images = [self.siglip_transform.preprocess(image) for some in images for image in some]
        has_reference = torch.tensor([bool(one.images) for one in examples])
        conditioned = torch.tensor([rng.random() >= self.options.dropout for _ in examples])
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        return UniWorldInputs(
            prompts=pad_rows(samples, self.processor.mllm_processor.special_tokens.im_end),
            conditioned=conditioned,
            siglip_images=torch.stack(siglip_images) if siglip_images else torch.zeros(0, 3, size, size),
            reference_images=stack_images([one.images[0] for one in examples if one.images]),
            reference_indices=torch.where(has_reference, has_reference.cumsum(0) - 1, -1),
            images=stack_images([one.target for one in examples if one.target is not None]),
            posterior=torch.randn(n, *self.latent_shape, generator=generator),
            weights=torch.stack([self.loss_weights(one) for one in examples]),
            image_kinds=kind_indices(IMAGE_KINDS, examples, [1] * n),
        )

    def noised(self, samples: UniWorldInputs | UniWorldEncoded, rng: random.Random) -> UniWorldBatch:
        """The samples with noise and timesteps for every copy."""
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        n_copies = self.options.timesteps_per_image
        n_samples = len(samples.image_kinds)
        noise = torch.randn(n_copies * n_samples, *self.latent_shape, generator=generator)
        times = torch.randn(n_copies * n_samples, generator=generator).sigmoid()
        shift = dynamic_shift(self.latent_shape[1] * self.latent_shape[2] // PATCH_SIZE**2)
        return UniWorldBatch(
            samples=samples,
            noise=noise,
            times=shift_timesteps(times, shift),
            sample_indices=torch.arange(n_samples).repeat_interleave(n_copies),
        )

    def prompt_parts(self, prompt: str, images: Sequence[Image.Image]) -> list[Part]:
        """A prompt as training has it."""
        parts = self.processor.prompt_parts(prompt, images)
        if not self.options.append_vision_start:
            return parts
        *before, last = parts
        vision_start = self.processor.mllm_processor.special_tokens.vision_start
        return [*before, text_part([*last.ids.tolist(), vision_start])]

    def loss_weights(self, one: Example) -> Tensor:
        """The weight of each latent in a sample's loss [1, h / 8, w / 8]; even where too little was edited to tell."""
        assert one.target is not None, "every sample has a target"
        even = torch.ones(1, *self.latent_shape[1:])
        if not self.options.edit_weights or not one.images:
            return even
        factor = one.target.shape[0] // self.latent_shape[1]
        try:
            return EditWeights(function=self.options.edit_weights, factor=factor)(one.images, one.target)
        except SmallEditError:
            return even


def groups_by_reference(batch: UniWorldBatch) -> list[Tensor]:
    """The noised copies without a reference image and those with one, as indices [n] each: half of the others'
    sequences would be padding."""
    has_reference = batch.samples.reference_indices[batch.sample_indices] >= 0
    groups = [(~has_reference).nonzero().squeeze(1), has_reference.nonzero().squeeze(1)]
    return [rows for rows in groups if len(rows)]


@dataclass(frozen=True, kw_only=True)
class ConditionRows:
    """Rows of the MLLM's hidden states of a sample, its images whose features are used, whether it is conditioned."""

    n_states: int
    n_images: int
    conditioned: bool

    def condition_length(self, n_patches: int) -> int:
        """The rows of its condition, with so many features an image."""
        return self.n_states + self.n_images * n_patches if self.conditioned else 0


def condition_rows(samples: UniWorldInputs | UniWorldEncoded, *, has_features: bool) -> list[ConditionRows]:
    """The sizes of each sample's condition. has_features: whether features of images are computed, where no cache holds
    them."""
    conditioned = samples.conditioned.tolist()
    if isinstance(samples, UniWorldEncoded):
        states = [len(one) for one in samples.hidden_states]
        images = [len(ends) for ends in samples.image_ends]
        has_features = samples.siglip_features is not None
    else:
        prompts = samples.prompts[: len(conditioned)]
        states = [sum(part.segment.length for part in parts) for parts in prompts]
        images = [sum(part.kind == "und_image" for part in parts) for parts in prompts]
    return [
        ConditionRows(n_states=n, n_images=k * has_features, conditioned=kept)
        for n, k, kept in zip(states, images, conditioned, strict=True)
    ]


def records_of(samples: UniWorldEncoded) -> list[Record]:
    """A cache's records of the samples; one without images has no rows of features and references."""
    records = []
    n_images = 0
    for i, states in enumerate(samples.hidden_states):
        ends = samples.image_ends[i]
        images = slice(n_images, n_images + len(ends))
        n_images += len(ends)
        reference = int(samples.reference_indices[i])
        record = {
            "hidden_states": states,
            "image_ends": torch.tensor(ends, dtype=torch.long),
            "conditioned": samples.conditioned[i : i + 1],
            "latents": samples.latents[i],
            "references": samples.reference_latents[reference : reference + 1 if reference >= 0 else reference],
            "weights": samples.weights[i],
            "image_kind": samples.image_kinds[i : i + 1],
        }
        if samples.siglip_features is not None:
            record["siglip_features"] = samples.siglip_features[images]
        records.append({name: x.cpu() for name, x in record.items()})
    return records


def encoded_from_records(records: Sequence[Record]) -> UniWorldEncoded:
    """The samples of a batch, which `records_of` made records of."""
    references = torch.tensor([len(one["references"]) for one in records])
    features = [one["siglip_features"] for one in records if "siglip_features" in one]
    return UniWorldEncoded(
        hidden_states=[one["hidden_states"] for one in records],
        image_ends=[one["image_ends"].tolist() for one in records],
        siglip_features=torch.cat(features) if features and sum(map(len, features)) else None,
        conditioned=torch.cat([one["conditioned"] for one in records]),
        latents=torch.stack([one["latents"] for one in records]),
        reference_latents=torch.cat([one["references"] for one in records]),
        reference_indices=torch.where(references > 0, references.cumsum(0) - 1, -1),
        weights=torch.stack([one["weights"] for one in records]),
        image_kinds=torch.cat([one["image_kind"] for one in records]),
    )
