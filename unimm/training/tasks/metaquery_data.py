"""Batches for training MetaQuery: prompts that end with the queries, and noised copies of what they generate.

Rectified flow at integer thousandths of time, unshifted: docs/originals/metaquery.md, "Training".
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from unimm.data.batching import ROW_MULTIPLE
from unimm.data.image_text_pairs import RECONSTRUCTION, ImageTextPair, ShapesPairs
from unimm.data.records import Record
from unimm.generation.flow import integer_timesteps, shift_timesteps
from unimm.models.metaquery.processor import MetaQueryProcessor, QueryBatch, black_image
from unimm.processing.images.io import center_crop, pil_to_tensor
from unimm.sequence.packing import ImageTokens, pack_sequences
from unimm.sequence.parts import Part
from unimm.training.cache import SHARD_SIZE, FeatureCache
from unimm.training.fields import (
    IMAGE_TASKS,
    AtLeastOne,
    Dtype,
    Fraction,
    Positive,
    RecipeSection,
    TaskWeights,
    known_tasks,
)
from unimm.training.tasks.generation_request import GENERATED_KINDS, GenerationRequest


@dataclass(frozen=True, kw_only=True)
class MetaQueryCommonConfig(RecipeSection):
    """The recipe's `options`, with `data`."""

    # noised copies of a target, each at its own timestep: cheaper than as many samples
    timesteps_per_image: AtLeastOne
    # the part of samples without images whose text is dropped; of those with images, the part of which the text is
    # dropped, the part of which both are, and the part of which the images are
    dropout: Fraction
    # folders or hub ids: of an MLLM, of an AutoencoderDC, and of a Sana, or "" for an untrained one of the recipe's
    # numbers; all "" where `model` names a release
    mllm: str = ""
    dcae: str = ""
    denoiser: str = ""
    # of the MLLM's weights, which are not trained
    mllm_dtype: Dtype = "bfloat16"
    # prefixes of the names of parameters that are not trained; the MLLM and the autoencoder never are
    frozen: tuple[str, ...]
    # whether torch.compile fuses layers
    compile: bool
    # of the timesteps towards noise; the released code trains unshifted, though it samples at 3
    timestep_shift: Positive = 1.0
    # the denoiser's block, counted from 1, behind which hidden states of noised images are aligned with what the MLLM's
    # vision encoder sees in the clean ones (unimm.training.alignment); null: none, as published
    alignment_block: AtLeastOne | None = None

    @property
    def parts(self) -> dict[str, str | None]:
        """The folders and hub ids of the parts that a model is built around, by their names here; None for none."""
        return {name: getattr(self, name) or None for name in ("mllm", "dcae", "denoiser")}


@dataclass(frozen=True, kw_only=True)
class MetaQueryTrainingConfig(MetaQueryCommonConfig):
    """The recipe's `options`, without `data`: on the shapes world."""

    # samples of each task in a batch, or their weights (unimm.data.batching.sample_tasks)
    tasks: Annotated[TaskWeights, known_tasks((*IMAGE_TASKS, RECONSTRUCTION))]
    # the part of things in generation and editing with a novel colour, and with a novel shape
    novel_colours: Fraction
    novel_shapes: Fraction


@dataclass(frozen=True, kw_only=True)
class MetaQuerySample:
    """A prompt that ends with the queries, and the image to generate, [3, h, w] in [-1, 1]. kind: of its loss.

    image_part: the image for the MLLM's vision encoder, where hidden states are aligned with it.
    """

    kind: str
    parts: Sequence[Part]
    image: Tensor
    image_part: Part | None = None

    @property
    def n_tokens(self) -> int:
        """Its rows in the MLLM."""
        return sum(part.segment.length for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class MetaQueryInputs:
    """Samples for the MLLM, and a target for each."""

    queries: QueryBatch
    images: Tensor  # [P, 3, h, w], the targets
    image_kinds: Tensor  # [P], index into the kinds of losses
    # the targets for the MLLM's vision encoder, where hidden states are aligned with them
    image_tokens: ImageTokens | None = None


@dataclass(frozen=True, kw_only=True)
class MetaQueryEncoded:
    """What the frozen parts compute of samples and targets."""

    query_states: Tensor  # [P, N, D], the MLLM's hidden states at the queries
    latents: Tensor  # [P, C, h', w']
    image_kinds: Tensor  # [P]
    target_features: Tensor | None = None  # [P, patches, D], of the targets, where hidden states are aligned with them


@dataclass(frozen=True, kw_only=True)
class MetaQueryBatch:
    """Samples, and noised copies of their targets."""

    samples: MetaQueryInputs | MetaQueryEncoded
    noise: Tensor  # [B, C, h', w']
    times: Tensor  # [B]
    sample_indices: Tensor  # [B], index into the samples


@dataclass(frozen=True, kw_only=True)
class MetaQuerySampleBuilder:
    """Samples of records and of pairs, and batches of samples.

    kinds: of the losses. dropout, timesteps_per_image, timestep_shift: see MetaQueryCommonConfig. image_size: (height,
    width) of the targets. latent_shape: channels, height, width. max_positions: of the MLLM's decoder. alignment_block:
    see MetaQueryCommonConfig.
    """

    processor: MetaQueryProcessor
    kinds: tuple[str, ...] = GENERATED_KINDS
    dropout: float
    timesteps_per_image: int
    timestep_shift: float
    image_size: tuple[int, int]
    latent_shape: tuple[int, int, int]
    max_positions: int
    alignment_block: int | None = None

    FAMILY: ClassVar[str] = "MetaQuery"

    def prepare(self, record: Record, rng: random.Random) -> MetaQuerySample:
        """The sample of a record; its images stand before its text, as the processor places them.

        Raises ValueError for a record that generates no image, for images that are missing or broken, and for more rows
        than the MLLM has positions.
        """
        request = GenerationRequest.from_record(record, rng, family=self.FAMILY)
        if request.system:
            raise ValueError("got a system prompt: MetaQuery's is that of its config.json for every sample")
        target = center_crop(request.target.load(), self.image_size)
        pair = ImageTextPair(kind=request.kind, text=request.text, images=tuple(request.images), target=target)
        sample = self.sample(pair, rng)
        n = sum(part.segment.advance for part in sample.parts)
        if n > self.max_positions:
            raise ValueError(f"got a sample of {n} positions: expected at most {self.max_positions}, the MLLM's")
        return sample

    def sample(self, pair: ImageTextPair, rng: random.Random) -> MetaQuerySample:
        """The sample of a pair, some of its condition dropped."""
        u = rng.random()
        p = self.dropout
        drops_text = u < (2 * p if pair.images else p)
        drops_images = p <= u < 3 * p
        images = [black_image(image) for image in pair.images] if drops_images else pair.images
        parts = self.processor.prompt_parts("" if drops_text else pair.text, images)
        image_part = self.processor.composer.whole_image_part(pair.target) if self.alignment_block else None
        return MetaQuerySample(kind=pair.kind, parts=parts, image=pil_to_tensor(pair.target), image_part=image_part)

    def collate(self, samples: Sequence[MetaQuerySample], rng: random.Random) -> MetaQueryBatch:
        """Samples as a batch, with noise and timesteps."""
        return self.noised(self.inputs(samples), rng)

    def inputs(self, samples: Sequence[MetaQuerySample]) -> MetaQueryInputs:
        """Samples for the model."""
        image_parts = [[one.image_part] for one in samples if one.image_part is not None]
        return MetaQueryInputs(
            queries=self.processor.query_batch([one.parts for one in samples], row_multiple=ROW_MULTIPLE),
            images=torch.stack([one.image for one in samples]),
            image_kinds=torch.tensor([self.kinds.index(one.kind) for one in samples]),
            image_tokens=pack_sequences(image_parts).und_images if image_parts else None,
        )

    def noised(self, samples: MetaQueryInputs | MetaQueryEncoded, rng: random.Random) -> MetaQueryBatch:
        """The samples with noise and timesteps for every copy."""
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        n_samples = len(samples.image_kinds)
        n = self.timesteps_per_image * n_samples
        noise = torch.randn(n, *self.latent_shape, generator=generator)
        times = integer_timesteps(torch.rand(n, generator=generator))
        return MetaQueryBatch(
            samples=samples,
            noise=noise,
            times=shift_timesteps(times, self.timestep_shift),
            sample_indices=torch.arange(n_samples).repeat_interleave(self.timesteps_per_image),
        )


@dataclass(frozen=True, kw_only=True)
class MetaQueryDataset:
    """Batches by number: the same for a seed on every machine, and made without the model."""

    pairs: ShapesPairs
    builder: MetaQuerySampleBuilder
    batch_size: int
    seed: int
    # in place of the pairs, where there is one
    cache: FeatureCache | None = None

    def __call__(self, number: int) -> MetaQueryBatch:
        rng = random.Random(f"{self.seed}/{number}")
        if self.cache is None:
            samples = [self.builder.sample(one, rng) for one in self.pairs(number, self.batch_size, rng)]
            return self.builder.collate(samples, rng)
        records = [self.cache[i] for i in self.cache.batch_indices(number, self.batch_size, self.seed)]
        features = [one["target_features"] for one in records if "target_features" in one]
        encoded = MetaQueryEncoded(
            query_states=torch.stack([one["query_states"] for one in records]),
            latents=torch.stack([one["latents"] for one in records]),
            image_kinds=torch.cat([one["image_kind"] for one in records]),
            target_features=torch.stack(features) if features else None,
        )
        return self.builder.noised(encoded, rng)

    def cache_inputs(self, shard: int) -> MetaQueryInputs:
        """The samples of one shard of a cache."""
        rng = random.Random(f"{self.seed}/cache/{shard}")
        return self.builder.inputs([self.builder.sample(one, rng) for one in self.pairs(shard, SHARD_SIZE, rng)])
