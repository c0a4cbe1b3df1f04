"""Training MetaQuery: queries, connector and denoiser learn to generate images from what a frozen MLLM computes.

Rectified flow at integer thousandths of time, unshifted; pre-training on captions, then instruction tuning on images
with instructions, by one task: docs/originals/metaquery.md, "Training".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from unimm.checkpoint import hub
from unimm.checkpoint.load import parse_dtype
from unimm.data.image_text_pairs import ShapesPairs
from unimm.denoisers.sana import SanaBlock, SanaTransformer
from unimm.models.metaquery.config import MetaQueryConfig, read_required_json
from unimm.models.metaquery.flops import metaquery_flops
from unimm.models.metaquery.mllms import mllm_spec_for
from unimm.models.metaquery.model import MetaQuery
from unimm.nn.compiled import compile_blocks, compile_experts
from unimm.nn.flops import StepFlops
from unimm.tokenizers.dc_ae import DCAE
from unimm.training.alignment import (
    HEAD,
    add_alignment_head,
    alignment_losses,
    recorded_outputs,
    resize_features,
    with_alignment,
    without_head,
)
from unimm.training.alignment import LOSS as ALIGN
from unimm.training.cache import FeatureCache, Record
from unimm.training.config import TrainConfig, from_mapping, require
from unimm.training.fields import held_out_seed
from unimm.training.freezing import freeze
from unimm.training.init import resolve_part
from unimm.training.losses import LossSum, count_by_kind, sum_by_kind
from unimm.training.samples import sample_grid
from unimm.training.tasks.deepseek_chat import IMAGE_KINDS
from unimm.training.tasks.metaquery_data import (
    MetaQueryBatch,
    MetaQueryCommonConfig,
    MetaQueryDataset,
    MetaQueryEncoded,
    MetaQueryInputs,
    MetaQuerySampleBuilder,
    MetaQueryTrainingConfig,
)
from unimm.training.throughput import StepCounts


class MetaQueryLossTask:
    """The half of both of MetaQuery's tasks: the losses of a batch, and the release."""

    model: MetaQuery
    # what makes the batches
    builder: MetaQuerySampleBuilder

    @property
    def alignment_block(self) -> int | None:
        """The denoiser's block behind which hidden states are aligned, counted from 1."""
        return self.builder.alignment_block

    def losses(self, batch: MetaQueryBatch) -> dict[str, LossSum]:
        """The flow loss of every kind of sample in the batch, and the alignment of the noised images' tokens."""
        device = self.model.device
        samples = batch.samples
        encoded = samples if isinstance(samples, MetaQueryEncoded) else self.encode(samples)
        indices = batch.sample_indices.to(device)
        condition = self.model.condition(encoded.query_states.to(device)).select_rows(indices)
        latents = encoded.latents.to(device)[indices]
        block = self.model.denoiser.blocks[self.alignment_block - 1] if self.alignment_block else None
        with recorded_outputs(block) as outputs:
            losses = self.model.flow_matching_loss(condition, latents, batch.noise.to(device), batch.times.to(device))
        found = sum_by_kind(self.builder.kinds, encoded.image_kinds[batch.sample_indices], losses)
        if block is not None:
            assert encoded.target_features is not None, "the builder makes the targets for the vision encoder"
            features = resize_features(encoded.target_features.to(device), self.token_grid(batch))[indices]
            predicted = self.model.get_submodule(HEAD)(outputs[0])
            found[ALIGN] = LossSum.over(alignment_losses(predicted, features))
        return found

    def loss_counts(self, batch: MetaQueryBatch) -> dict[str, int]:
        """How many noised copies of the batch have each flow loss, and how many of their tokens are aligned."""
        counts = count_by_kind(self.builder.kinds, batch.samples.image_kinds[batch.sample_indices])
        height, width = self.token_grid(batch)
        return counts | ({ALIGN: len(batch.noise) * height * width} if self.alignment_block else {})

    def token_grid(self, batch: MetaQueryBatch) -> tuple[int, int]:
        """(rows, columns) of the tokens of a batch's noised images."""
        height, width = batch.noise.shape[2:]
        patch_size = self.model.config.denoiser.patch_size
        return height // patch_size, width // patch_size

    def encode(self, samples: MetaQueryInputs) -> MetaQueryEncoded:
        """What the MLLM, with gradients to the queries, and the autoencoder compute."""
        device = self.model.device
        with torch.no_grad():
            latents = self.model.vae.encode(samples.images.to(device)).float()
            tokens = samples.image_tokens
            features = None if tokens is None else self.model.mllm.whole_image_features(tokens.to(device)).float()
        return MetaQueryEncoded(
            query_states=self.model.query_states_with_grad(samples.queries.to(device)),
            latents=latents,
            image_kinds=samples.image_kinds,
            target_features=features,
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
        if self.alignment_block:
            self.add_alignment_flops(flops, batch)
        config = self.model.config
        n_tokens = height * width // config.denoiser.patch_size**2 + config.n_queries
        return StepCounts(tokens=n_images * n_tokens, images=n_images, flops=flops.total)

    def add_alignment_flops(self, flops: StepFlops, batch: MetaQueryBatch) -> None:
        """Add the features of the targets, where no cache holds them, and the network that aligns with them."""
        tokens = batch.samples.image_tokens if isinstance(batch.samples, MetaQueryInputs) else None
        if tokens is not None:
            features = StepFlops()
            self.model.mllm.count_image_flops(features, tokens)
            flops.add_forward(features)
        flops.chain(self.loss_counts(batch)[ALIGN], True, self.model.get_submodule(HEAD))

    def save(self, folder: Path) -> None:
        """Write the released layout, in bfloat16."""
        with without_head(self.model):
            self.model.save_pretrained(folder, dtype="bfloat16")


class MetaQueryTask(MetaQueryLossTask):
    """MetaQuery on the shapes world."""

    name = "metaquery"

    def __init__(self, model: MetaQuery, batch: MetaQueryDataset):
        self.model = model
        self.batch = batch
        self.builder = batch.builder
        self.loss_names = with_alignment(IMAGE_KINDS, self.alignment_block)

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> MetaQueryTask:
        """Build queries, a connector and a denoiser, untrained or trained, around a trained MLLM and autoencoder."""
        if "data" in recipe.options:
            raise ValueError(
                "got data in the options: it is a section of the recipe now, data: {groups: {pairs: {paths: [FILE]}}}, and "
                "the tasks are left out with it"
            )
        options = from_mapping(MetaQueryTrainingConfig, recipe.options, where="options")
        torch.manual_seed(recipe.seed)
        model = init_metaquery(options, recipe.model)
        prepare_metaquery(model, options, seed=recipe.seed)
        pairs = ShapesPairs(
            tasks=options.tasks,
            novel_colours=options.novel_colours,
            novel_shapes=options.novel_shapes,
            seed=recipe.seed,
        )
        builder = replace(metaquery_builder(model, options), kinds=IMAGE_KINDS)
        dataset = MetaQueryDataset(pairs=pairs, builder=builder, batch_size=recipe.batch_size, seed=recipe.seed)
        return cls(model, dataset)

    @property
    def cache_inputs(self) -> Callable[[int], MetaQueryInputs]:
        """The samples of one shard of a cache."""
        return self.batch.cache_inputs

    def cache_records(self, inputs: MetaQueryInputs) -> list[Record]:
        """Latents of the targets, hidden states at the queries, and features of the targets where these are aligned
        with."""
        encoded = self.encode(inputs)
        tensors = {"query_states": encoded.query_states, "latents": encoded.latents}
        if encoded.target_features is not None:
            tensors["target_features"] = encoded.target_features
        kinds = encoded.image_kinds.split(1)
        return [
            {"image_kind": kind, **{name: x[i].cpu() for name, x in tensors.items()}} for i, kind in enumerate(kinds)
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
        """Batches of scenes that no run trains on."""
        seed = held_out_seed(self.batch.seed)
        return replace(self.batch, seed=seed, pairs=replace(self.batch.pairs, seed=seed), cache=None)

    def sample_image(self) -> Image.Image:
        """Images of test prompts."""
        return sample_grid(self.model)


def prepare_metaquery(model: MetaQuery, options: MetaQueryCommonConfig, *, seed: int) -> None:
    """Add what the options' alignment needs, freeze what is not trained, the MLLM and the autoencoder always, and compile
    layers where the options say so.

    seed: where the network that aligns begins from. Raises ValueError for an aligned block that the denoiser has not.
    """
    if options.alignment_block:
        add_alignment_head(
            model,
            block=options.alignment_block,
            n_blocks=len(model.denoiser.blocks),
            dim=model.config.denoiser.dim,
            feature_dim=model.config.mllm.decoder.dim,
            device=model.device,
            seed=seed,
        )
    if options.compile:
        compile_experts(model.decoder)
        compile_blocks([module for module in model.denoiser.modules() if isinstance(module, SanaBlock)])
    freeze(model, options.frozen, always=("mllm.", "vae."))


def metaquery_builder(model: MetaQuery, options: MetaQueryCommonConfig) -> MetaQuerySampleBuilder:
    """Samples of a model's prompts and latents."""
    config = model.config
    return MetaQuerySampleBuilder(
        processor=model.processor,
        dropout=options.dropout,
        timesteps_per_image=options.timesteps_per_image,
        timestep_shift=options.timestep_shift,
        image_size=config.image_size,
        latent_shape=(config.denoiser.in_channels, config.latent_size, config.latent_size),
        max_positions=config.mllm.decoder.max_positions,
        alignment_block=options.alignment_block,
    )


def init_metaquery(options: MetaQueryCommonConfig, sections: Mapping[str, Any]) -> MetaQuery:
    """The model of a recipe's `model`: `config` is a config.json, `denoiser` and `scheduler` are a Sana's."""
    require(options.parts, "mllm", "dcae", where="options")
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
