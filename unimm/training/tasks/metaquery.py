"""Training MetaQuery: queries, connector and denoiser learn to generate images from what a frozen MLLM computes.

Rectified flow at integer thousandths of time, unshifted; pre-training on captions, then instruction tuning on images
with instructions, by one task: docs/originals/metaquery.md, "Training".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image
from torch import Tensor, nn

from unimm.checkpoint import hub
from unimm.checkpoint.load import parse_dtype
from unimm.data.batching import ROW_MULTIPLE
from unimm.data.image_text_pairs import RECONSTRUCTION, FilePairs, ImageTextPair, PairSource, ShapesPairs
from unimm.denoisers.sana import SanaBlock, SanaTransformer
from unimm.generation.flow import integer_timesteps, shift_timesteps
from unimm.models.metaquery.config import MetaQueryConfig, read_required_json
from unimm.models.metaquery.flops import metaquery_flops
from unimm.models.metaquery.mllms import mllm_spec_for
from unimm.models.metaquery.model import MetaQuery
from unimm.models.metaquery.processor import MetaQueryProcessor, QueryBatch, black_image
from unimm.processing.images.io import pil_to_tensor
from unimm.sequence.parts import Part
from unimm.tokenizers.dc_ae import DCAE
from unimm.training.cache import SHARD_SIZE, FeatureCache, Record
from unimm.training.config import RecipeSection, TrainConfig, from_mapping, require
from unimm.training.fields import (
    IMAGE_TASKS,
    AtLeastOne,
    Dtype,
    Fraction,
    OptionalTaskWeights,
    Positive,
    held_out_seed,
    known_tasks,
)
from unimm.training.freezing import freeze
from unimm.training.init import compile_blocks, compile_experts, resolve_part
from unimm.training.losses import LossSum, count_by_kind, sum_by_kind
from unimm.training.samples import sample_grid
from unimm.training.tasks.deepseek_chat import IMAGE_KINDS
from unimm.training.throughput import StepCounts


@dataclass(frozen=True, kw_only=True)
class MetaQueryTrainingConfig(RecipeSection):
    """The recipe's `options`."""

    # samples of each task in a batch, or their weights (unimm.data.batching.sample_tasks)
    tasks: Annotated[OptionalTaskWeights, known_tasks((*IMAGE_TASKS, RECONSTRUCTION))]
    # noised copies of a target, each at its own timestep: cheaper than as many samples
    timesteps_per_image: AtLeastOne
    # the part of samples without images whose text is dropped; of those with images, the part of which the text is
    # dropped, the part of which both are, and the part of which the images are
    dropout: Fraction
    # the part of things in generation and editing with a novel colour, and with a novel shape
    novel_colours: Fraction
    novel_shapes: Fraction
    # folders or hub ids: of an MLLM, of an AutoencoderDC, and of a Sana, or "" for an untrained one of the recipe's
    # numbers
    mllm: str
    dcae: str
    denoiser: str
    # of the MLLM's weights, which are not trained
    mllm_dtype: Dtype
    # prefixes of the names of parameters that are not trained; the MLLM and the autoencoder never are
    frozen: tuple[str, ...]
    # whether torch.compile fuses layers
    compile: bool
    # of the timesteps towards noise; the released code trains unshifted, though it samples at 3
    timestep_shift: Positive = 1.0
    # a list of image files (see FilePairs), in place of the tasks
    data: str = ""

    def __post_init__(self) -> None:
        if not (self.tasks or self.data):
            raise ValueError(
                "got no tasks and no data in options, expected tasks of the shapes world, or a list of files"
            )


@dataclass(frozen=True, kw_only=True)
class MetaQueryInputs:
    """Samples for the MLLM, and a target for each."""

    queries: QueryBatch
    images: Tensor  # [P, 3, h, w], the targets
    image_kinds: Tensor  # [P], index into IMAGE_KINDS


@dataclass(frozen=True, kw_only=True)
class MetaQueryEncoded:
    """What the frozen parts compute of samples and targets."""

    query_states: Tensor  # [P, N, D], the MLLM's hidden states at the queries
    latents: Tensor  # [P, C, h', w']
    image_kinds: Tensor  # [P]


@dataclass(frozen=True, kw_only=True)
class MetaQueryBatch:
    """Samples, and noised copies of their targets."""

    samples: MetaQueryInputs | MetaQueryEncoded
    noise: Tensor  # [B, C, h', w']
    times: Tensor  # [B]
    sample_indices: Tensor  # [B], index into the samples


@dataclass(frozen=True, kw_only=True)
class MetaQueryDataset:
    """Batches by step: the same for a seed on every machine, and made without the model."""

    options: MetaQueryTrainingConfig
    pairs: PairSource
    processor: MetaQueryProcessor
    # channels, height, width
    latent_shape: tuple[int, int, int]
    batch_size: int
    seed: int
    # in place of the pairs, where there is one
    cache: FeatureCache | None = None

    def __call__(self, step: int) -> MetaQueryBatch:
        rng = random.Random(f"{self.seed}/{step}")
        if self.cache is None:
            return self.batch(self.pairs(step, self.batch_size, rng), rng)
        records = [self.cache[i] for i in self.cache.batch_indices(step, self.batch_size, self.seed)]
        samples = MetaQueryEncoded(
            query_states=torch.stack([one["query_states"] for one in records]),
            latents=torch.stack([one["latents"] for one in records]),
            image_kinds=torch.cat([one["image_kind"] for one in records]),
        )
        return self.noised(samples, rng)

    def batch(self, pairs: Sequence[ImageTextPair], rng: random.Random) -> MetaQueryBatch:
        """Pairs as a batch, with sampled timesteps and noise, and conditions dropped at random."""
        return self.noised(self.inputs(pairs, rng), rng)

    def cache_inputs(self, shard: int) -> MetaQueryInputs:
        """The samples of one shard of a cache."""
        rng = random.Random(f"{self.seed}/cache/{shard}")
        return self.inputs(self.pairs(shard, SHARD_SIZE, rng), rng)

    def inputs(self, pairs: Sequence[ImageTextPair], rng: random.Random) -> MetaQueryInputs:
        """Pairs for the model, with conditions dropped at random."""
        samples = [self.sample(one, rng) for one in pairs]
        return MetaQueryInputs(
            queries=self.processor.query_batch(samples, row_multiple=ROW_MULTIPLE),
            images=torch.stack([pil_to_tensor(one.target) for one in pairs]),
            image_kinds=torch.tensor([IMAGE_KINDS.index(one.kind) for one in pairs]),
        )

    def noised(self, samples: MetaQueryInputs | MetaQueryEncoded, rng: random.Random) -> MetaQueryBatch:
        """The samples with noise and timesteps for every copy."""
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        n_copies = self.options.timesteps_per_image
        n_samples = len(samples.image_kinds)
        n = n_copies * n_samples
        noise = torch.randn(n, *self.latent_shape, generator=generator)
        times = integer_timesteps(torch.rand(n, generator=generator))
        return MetaQueryBatch(
            samples=samples,
            noise=noise,
            times=shift_timesteps(times, self.options.timestep_shift),
            sample_indices=torch.arange(n_samples).repeat_interleave(n_copies),
        )

    def sample(self, one: ImageTextPair, rng: random.Random) -> list[Part]:
        """The condition of a pair's target, some of it dropped."""
        u = rng.random()
        p = self.options.dropout
        drops_text = u < (2 * p if one.images else p)
        drops_images = p <= u < 3 * p
        images = [black_image(image) for image in one.images] if drops_images else one.images
        return self.processor.prompt_parts("" if drops_text else one.text, images)


class MetaQueryTask:
    """MetaQuery on the shapes world, or on image files."""

    name = "metaquery"
    loss_names = IMAGE_KINDS

    def __init__(self, model: MetaQuery, batch: MetaQueryDataset):
        self.model = model
        self.batch = batch

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> MetaQueryTask:
        """Build queries, a connector and a denoiser, untrained or trained, around a trained MLLM and autoencoder."""
        options = from_mapping(MetaQueryTrainingConfig, recipe.options, where="options")
        torch.manual_seed(recipe.seed)
        model = init_metaquery(options, recipe.model)
        if options.compile:
            compile_experts(model.decoder)
            compile_blocks([module for module in model.denoiser.modules() if isinstance(module, SanaBlock)])
        freeze(model, options.frozen, always=("mllm.", "vae."))
        config = model.config
        dataset = MetaQueryDataset(
            options=options,
            pairs=_pairs(options, config, recipe.seed),
            processor=model.processor,
            latent_shape=(config.denoiser.in_channels, config.latent_size, config.latent_size),
            batch_size=recipe.batch_size,
            seed=recipe.seed,
        )
        return cls(model, dataset)

    def losses(self, batch: MetaQueryBatch) -> dict[str, LossSum]:
        """The flow loss of every kind of sample in the batch."""
        device = self.model.device
        samples = batch.samples
        encoded = samples if isinstance(samples, MetaQueryEncoded) else self.encode(samples)
        indices = batch.sample_indices.to(device)
        condition = self.model.condition(encoded.query_states.to(device)).select_rows(indices)
        latents = encoded.latents.to(device)[indices]
        losses = self.model.flow_matching_loss(condition, latents, batch.noise.to(device), batch.times.to(device))
        return sum_by_kind(IMAGE_KINDS, encoded.image_kinds[batch.sample_indices], losses)

    def loss_counts(self, batch: MetaQueryBatch) -> dict[str, int]:
        """How many noised copies of the batch have each loss."""
        return count_by_kind(IMAGE_KINDS, batch.samples.image_kinds[batch.sample_indices])

    def encode(self, samples: MetaQueryInputs) -> MetaQueryEncoded:
        """What the MLLM, with gradients to the queries, and the autoencoder compute."""
        device = self.model.device
        with torch.no_grad():
            latents = self.model.vae.encode(samples.images.to(device)).float()
        return MetaQueryEncoded(
            query_states=self.model.query_states_with_grad(samples.queries.to(device)),
            latents=latents,
            image_kinds=samples.image_kinds,
        )

    def step_counts(self, batch: MetaQueryBatch) -> StepCounts:
        """Tokens of noised latents and the queries of each, noised images, FLOPs."""
        encoded = isinstance(batch.samples, MetaQueryEncoded)
        n_images, _, height, width = batch.noise.shape
        flops = metaquery_flops(
            self.model,
            None if isinstance(batch.samples, MetaQueryEncoded) else batch.samples.queries,
            n_samples=len(batch.samples.image_kinds),
            n_images=n_images,
            latent_size=(height, width),
            encodes=not encoded,
        )
        config = self.model.config
        n_tokens = height * width // config.denoiser.patch_size**2 + config.n_queries
        return StepCounts(tokens=n_images * n_tokens, images=n_images, flops=flops.total)

    @property
    def cache_inputs(self) -> Callable[[int], MetaQueryInputs]:
        """The samples of one shard of a cache."""
        return self.batch.cache_inputs

    def cache_records(self, inputs: MetaQueryInputs) -> list[Record]:
        """Latents of the targets and hidden states at the queries."""
        encoded = self.encode(inputs)
        parts = zip(
            encoded.query_states.cpu().split(1),
            encoded.latents.cpu().split(1),
            encoded.image_kinds.split(1),
            strict=True,
        )
        return [
            {"query_states": states[0], "latents": latents[0], "image_kind": kind} for states, latents, kind in parts
        ]

    def use_cache(self, cache: FeatureCache) -> None:
        """Make batches of the cache's records from now on."""
        if self.model.queries.requires_grad:
            raise ValueError(
                "got a cache, and queries that are trained, which change the hidden states it would hold: add `queries` "
                "to frozen, after a run that trained them, or leave `cache` out"
            )
        if any(p.requires_grad for p in self.model.mllm.parameters()):
            raise ValueError("got a cache, and an adapter of the MLLM, which changes what it would hold: leave one out")
        self.batch = replace(self.batch, cache=cache)

    @property
    def held_out_batch(self) -> MetaQueryDataset:
        """Batches of scenes that no run trains on. Raises ValueError for a list of files, of which none is held out."""
        if not isinstance(self.batch.pairs, ShapesPairs):
            raise ValueError("got validation and data in options, a list of files of which none is held out")
        seed = held_out_seed(self.batch.seed)
        return replace(self.batch, seed=seed, pairs=replace(self.batch.pairs, seed=seed), cache=None)

    def sample_image(self) -> Image.Image:
        """Images of test prompts."""
        return sample_grid(self.model)

    def save(self, folder: Path) -> None:
        """Write the released layout, in bfloat16."""
        self.model.save_pretrained(folder, dtype="bfloat16")


def _pairs(options: MetaQueryTrainingConfig, config: MetaQueryConfig, seed: int) -> PairSource:
    """The files that the options name, or else the shapes world's tasks."""
    if options.data:
        return FilePairs(path=Path(options.data), image_size=config.image_size[0])
    return ShapesPairs(
        tasks=options.tasks, novel_colours=options.novel_colours, novel_shapes=options.novel_shapes, seed=seed
    )


def init_metaquery(options: MetaQueryTrainingConfig, sections: Mapping[str, Any]) -> MetaQuery:
    """The model of a recipe's `model`: `config` is a config.json, `denoiser` and `scheduler` are a Sana's."""
    require(sections, "config.diffusion_model_id", *([] if options.denoiser else ["denoiser.", "scheduler."]))
    spec = mllm_spec_for(read_required_json(hub.resolve(options.mllm, weights=False) / "config.json"))
    mllm = spec.model_class.from_pretrained(options.mllm, dtype=parse_dtype(options.mllm_dtype))
    vae = DCAE.from_pretrained(resolve_part(options.dcae, "vae"))
    if not options.denoiser:
        denoiser = sections["denoiser"]
        scheduler = sections["scheduler"]
    else:
        denoiser = read_required_json(resolve_part(options.denoiser, "transformer") / "config.json")
        scheduler = read_required_json(resolve_part(options.denoiser, "scheduler") / "scheduler_config.json")
    files = sections["config"]
    part_ids = {name: files.get(name, files["diffusion_model_id"]) for name in MetaQueryConfig.PART_CONFIGS}
    config = MetaQueryConfig.from_json(files, mllm.config, denoiser, vae.config.to_json(), scheduler, part_ids=part_ids)
    model = MetaQuery(config)
    model.mllm = mllm
    model.vae = vae
    model.init_queries()
    model.connector.init_weights()
    if options.denoiser:
        model.denoiser = SanaTransformer.from_pretrained(resolve_part(options.denoiser, "transformer"))
    else:
        init_sana(model.denoiser)
    return model


def init_sana(denoiser: SanaTransformer) -> None:
    """Set the weights that training from scratch starts from: small gates of residual branches, and the velocity 0."""
    for linear in (denoiser.modulation, denoiser.out_proj):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    for name, table in denoiser.named_parameters():
        if name.endswith("table"):
            nn.init.normal_(table, std=denoiser.config.dim**-0.5)
