"""Training MetaQuery: queries, connector and denoiser learn to generate images from what a frozen MLLM computes.

Rectified flow at integer thousandths of time, unshifted; pre-training on captions, then instruction tuning on images
with instructions, by one task: docs/originals/metaquery.md, "Training".
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from unimm.checkpoint import hub
from unimm.checkpoint.load import parse_dtype
from unimm.data.batching import ROW_MULTIPLE, mean_by_kind
from unimm.data.image_text_pairs import FilePairs, ImageTextPair, PairSource, ShapesPairs
from unimm.denoisers.sana import SanaBlock, SanaTransformer
from unimm.generation.flow import integer_timesteps, shift_timesteps
from unimm.models.metaquery.config import MetaQueryConfig, read_required_json
from unimm.models.metaquery.mllms import mllm_spec_for
from unimm.models.metaquery.model import MetaQuery
from unimm.models.metaquery.processor import MetaQueryProcessor, QueryBatch, black_image
from unimm.processing.images.io import pil_to_tensor
from unimm.sequence.parts import Part
from unimm.tokenizers.dc_ae import DCAE
from unimm.training.config import Fraction, RecipeSection, TrainConfig, from_mapping
from unimm.training.freezing import freeze
from unimm.training.init import compile_blocks, compile_experts, resolve_part
from unimm.training.samples import sample_grid
from unimm.training.tasks.deepseek_chat import IMAGE_KINDS


@dataclass(frozen=True, kw_only=True)
class MetaQueryTrainingConfig(RecipeSection):
    """The recipe's `options`."""

    # samples of each task in a batch, or their weights (unimm.data.batching.sample_tasks)
    tasks: Mapping[str, int]
    # noised copies of a target, each at its own timestep: cheaper than as many samples
    timesteps_per_image: int
    # the part of samples without images whose text is dropped; of those with images, the part of which the text is
    # dropped, the part of which both are, and the part of which the images are
    dropout: Fraction
    # the part of things in generation and editing with a novel colour, and with a novel shape
    novel_colours: float
    novel_shapes: float
    # folders or hub ids: of an MLLM, of an AutoencoderDC, and of a Sana, or "" for an untrained one of the recipe's
    # numbers
    mllm: str
    dcae: str
    denoiser: str
    # of the MLLM's weights, which are not trained
    mllm_dtype: str
    # prefixes of the names of parameters that are not trained; the MLLM and the autoencoder never are
    frozen: tuple[str, ...]
    # whether torch.compile fuses layers
    compile: bool
    # of the timesteps towards noise; the released code trains unshifted, though it samples at 3
    timestep_shift: float = 1.0
    # a list of image files (see FilePairs), in place of the tasks
    data: str = ""


@dataclass(frozen=True, kw_only=True)
class MetaQueryBatch:
    """Samples for the MLLM, a target for each, and noised copies of the targets."""

    queries: QueryBatch
    images: Tensor  # [P, 3, h, w], the targets
    noise: Tensor  # [B, C, h', w']
    times: Tensor  # [B]
    sample_indices: Tensor  # [B], index into the samples and into images
    image_kinds: Tensor  # [B], index into IMAGE_KINDS


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

    def __call__(self, step: int) -> MetaQueryBatch:
        rng = random.Random(f"{self.seed}/{step}")
        return self.batch(self.pairs(step, self.batch_size, rng), rng)

    def batch(self, pairs: Sequence[ImageTextPair], rng: random.Random) -> MetaQueryBatch:
        """Pairs as a batch, with sampled timesteps and noise, and conditions dropped at random."""
        samples = [self.sample(one, rng) for one in pairs]
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        n_copies = self.options.timesteps_per_image
        n = n_copies * len(samples)
        noise = torch.randn(n, *self.latent_shape, generator=generator)
        times = integer_timesteps(torch.rand(n, generator=generator))
        kinds = torch.tensor([IMAGE_KINDS.index(one.kind) for one in pairs])
        return MetaQueryBatch(
            queries=self.processor.query_batch(samples, row_multiple=ROW_MULTIPLE),
            images=torch.stack([pil_to_tensor(one.target) for one in pairs]),
            noise=noise,
            times=shift_timesteps(times, self.options.timestep_shift),
            sample_indices=torch.arange(len(samples)).repeat_interleave(n_copies),
            image_kinds=kinds.repeat_interleave(n_copies),
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

    def losses(self, batch: MetaQueryBatch) -> dict[str, Tensor]:
        """Mean flow loss of every kind of sample in the batch."""
        device = self.model.device
        with torch.no_grad():
            latents = self.model.vae.encode(batch.images.to(device)).float()
        indices = batch.sample_indices.to(device)
        noise = batch.noise.to(device)
        losses = self.model(batch.queries.to(device), latents[indices], noise, batch.times.to(device), indices)
        return mean_by_kind(IMAGE_KINDS, batch.image_kinds, losses)

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
    spec = mllm_spec_for(read_required_json(hub.resolve(options.mllm, weights=False) / "config.json"))
    mllm = spec.model_class.from_pretrained(options.mllm, dtype=parse_dtype(options.mllm_dtype))
    vae = DCAE.from_pretrained(resolve_part(options.dcae, "vae"))
    denoiser = sections.get("denoiser", {})
    scheduler = sections.get("scheduler", {})
    if options.denoiser:
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
