"""Batches for training UniWorld on the shapes world, groups of a batch's samples, and a cache's records of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from unimm.data.batching import sample_tasks
from unimm.data.shapes import Example, example
from unimm.data.shapes.novel_attributes import augment_novel_attributes
from unimm.distributed.ranks import world_size
from unimm.training.cache import SHARD_SIZE, FeatureCache, Record
from unimm.training.tasks.edit_weights import EditWeights, SmallEditError
from unimm.training.tasks.uniworld_samples import (
    UniWorldBatch,
    UniWorldEncoded,
    UniWorldInputs,
    UniWorldSample,
    UniWorldSampleBuilder,
    UniWorldTrainingConfig,
)


@dataclass(frozen=True, kw_only=True)
class UniWorldDataset:
    """Batches by number: the same for a seed on every machine, and made without the model."""

    options: UniWorldTrainingConfig
    builder: UniWorldSampleBuilder
    batch_size: int
    seed: int
    # in place of new samples, where there is one
    cache: FeatureCache | None = None

    def __call__(self, number: int) -> UniWorldBatch:
        rng = random.Random(f"{self.seed}/{number}")
        if self.cache is None:
            return self.batch(self.examples(number, self.batch_size, rng), rng)
        records = [self.cache[i] for i in self.cache.batch_indices(number, self.batch_size, self.seed)]
        return self.builder.noised(encoded_from_records(records), rng)

    def examples(self, number: int, size: int, rng: random.Random) -> list[Example]:
        """The examples of a batch, or of a shard of a cache."""
        tasks = sample_tasks(self.options.tasks, size, rng)
        return [self.training_example(task, number * size + i, rng) for i, task in enumerate(tasks)]

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
        return self.builder.collate([self.sample(one, rng) for one in examples], rng)

    def cache_inputs(self, shard: int) -> UniWorldInputs:
        """The samples of one shard of a cache."""
        rng = random.Random(f"{self.seed}/cache/{shard}")
        return self.builder.inputs([self.sample(one, rng) for one in self.examples(shard, SHARD_SIZE, rng)], rng)

    def sample(self, one: Example, rng: random.Random) -> UniWorldSample:
        """The sample of an example."""
        assert one.target is not None, "every example has a target"
        images = [Image.fromarray(image) for image in one.images]
        kind = one.task.split(".")[0]
        weights = self.loss_weights(one)
        return self.builder.sample(kind, prompt=one.prompt, images=images, target=one.target, weights=weights, rng=rng)

    def loss_weights(self, one: Example) -> Tensor:
        """The weight of each latent in a sample's loss [1, h / 8, w / 8]; even where too little was edited to tell."""
        assert one.target is not None, "every sample has a target"
        stride = self.builder.stride
        even = torch.ones(1, one.target.shape[0] // stride, one.target.shape[1] // stride)
        if not self.options.edit_weights or not one.images:
            return even
        try:
            return EditWeights(function=self.options.edit_weights, factor=stride)(one.images, one.target)
        except SmallEditError:
            return even


def groups_by_reference(batch: UniWorldBatch) -> list[Tensor]:
    """The noised copies without a reference image and those with one, as indices [n] each: half of the others'
    sequences would be padding. On several devices there are always two groups."""
    has_reference = batch.samples.reference_indices[batch.sample_indices] >= 0
    groups = [(~has_reference).nonzero().squeeze(1), has_reference.nonzero().squeeze(1)]
    groups = [rows for rows in groups if len(rows)]
    if len(groups) == 1 and world_size() > 1:
        # another rank's batch may have both, and all must run the denoiser as often
        if len(has_reference) < 2:
            raise ValueError("got a batch of one noised copy on several devices, expected two: raise batch_size")
        return list(groups[0].chunk(2))
    return groups


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
        if samples.target_features is not None:
            record["target_features"] = samples.target_features[i]
        records.append({name: x.cpu() for name, x in record.items()})
    return records


def encoded_from_records(records: Sequence[Record]) -> UniWorldEncoded:
    """The samples of a batch, which `records_of` made records of."""
    references = torch.tensor([len(one["references"]) for one in records])
    features = [one["siglip_features"] for one in records if "siglip_features" in one]
    targets = [one["target_features"] for one in records if "target_features" in one]
    return UniWorldEncoded(
        hidden_states=[one["hidden_states"] for one in records],
        image_ends=[one["image_ends"].tolist() for one in records],
        siglip_features=torch.cat(features) if features and sum(map(len, features)) else None,
        conditioned=torch.cat([one["conditioned"] for one in records]),
        latents=torch.stack([one["latents"] for one in records]),
        target_features=torch.stack(targets) if targets else None,
        reference_latents=torch.cat([one["references"] for one in records]),
        reference_indices=torch.where(references > 0, references.cumsum(0) - 1, -1),
        weights=torch.stack([one["weights"] for one in records]),
        image_kinds=torch.cat([one["image_kind"] for one in records]),
    )
