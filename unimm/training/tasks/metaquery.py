"""Training MetaQuery: queries, connector and painter learn to draw what a frozen reader answers.

Rectified flow at whole, unshifted thousandths of time; pre-training on captions, then instruction tuning on pictures
with instructions, by one objective: docs/originals/metaquery.md, "Training".
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
from unimm.training.config import TrainConfig, strict
from unimm.training.freezing import freeze
from unimm.training.init import compile_experts
from unimm.training.samples import sample_grid
from unimm.training.tasks.deepseek_chat import IMAGE_KINDS


@dataclass(frozen=True, kw_only=True)
class MetaQueryTrainingConfig:
    """What the recipe's `options` may say."""

    # samples of each task in a batch, or their weights (training/tasks.py)
    tasks: Mapping[str, int]
    # noised copies of a picture, each at its own time: cheaper than as many samples
    timesteps_per_image: int
    # the part of samples whose text is dropped, without pictures; with them, the part of each of: text, both, pictures
    dropout: float
    # the part of things in drawings and edits whose colour, or whose shape, has no name
    novel_colours: float
    novel_shapes: float
    # folders or hub ids: of a reader, an AutoencoderDC, and a Sana, or "" for a fresh one of the recipe's numbers
    mllm: str
    dcae: str
    denoiser: str
    # of the reader's weights, which never change
    mllm_dtype: str
    # parts that are not trained, by the beginning of their parameters' names; the reader and the autoencoder never are
    frozen: tuple[str, ...]
    # whether torch.compile fuses what a token meets between products
    compile: bool
    # of the times towards noise; the released code trains unshifted, though it samples at 3
    timestep_shift: float = 1.0
    # a list of pictures of one's own (see FilePairs), in place of the tasks
    data: str = ""


@dataclass(frozen=True, kw_only=True)
class MetaQueryBatch:
    """Samples to be read, and noised copies of the pictures to be drawn after them, a picture a sample."""

    queries: QueryBatch
    images: Tensor  # [P, 3, h, w], what is drawn
    noise: Tensor  # [B, C, h, w]
    times: Tensor  # [B]
    sample_indices: Tensor  # [B], index into the samples asked and into images
    image_kinds: Tensor  # [B], index into DRAWINGS


@dataclass(frozen=True, kw_only=True)
class MetaQueryDataset:
    """Batches by step: the same for a seed on every machine, and made without the model."""

    options: MetaQueryTrainingConfig
    pairs: PairSource
    prompts: MetaQueryProcessor
    latent_shape: tuple[int, int, int]  # (channels, height, width)
    batch_size: int
    seed: int

    def __call__(self, step: int) -> MetaQueryBatch:
        rng = random.Random(f"{self.seed}/{step}")
        return self.batch(self.pairs(step, self.batch_size, rng), rng)

    def batch(self, pairs: Sequence[ImageTextPair], rng: random.Random) -> MetaQueryBatch:
        """Pairs with the dice's times, noises and dropped conditions."""
        samples = [self.sample(one, rng) for one in pairs]
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        n = self.options.timesteps_per_image
        return MetaQueryBatch(
            queries=self.prompts.query_batch(samples, row_multiple=ROW_MULTIPLE),
            images=torch.stack([pil_to_tensor(one.target) for one in pairs]),
            noise=torch.randn(n * len(samples), *self.latent_shape, generator=generator),
            times=shift_timesteps(
                integer_timesteps(torch.rand(n * len(samples), generator=generator)), self.options.timestep_shift
            ),
            sample_indices=torch.arange(len(samples)).repeat_interleave(n),
            image_kinds=torch.tensor([IMAGE_KINDS.index(one.kind) for one in pairs]).repeat_interleave(n),
        )

    def sample(self, one: ImageTextPair, rng: random.Random) -> list[Part]:
        """What a picture is drawn from, some of it dropped."""
        draw, p = rng.random(), self.options.dropout
        text, look = draw < (2 * p if one.images else p), p <= draw < 3 * p
        shown = [black_image(picture) for picture in one.images] if look else one.images
        return self.prompts.prompt_parts("" if text else one.text, shown)


class MetaQueryTask:
    """MetaQuery on the little world."""

    name = "metaquery"
    loss_names = IMAGE_KINDS

    def __init__(self, model: MetaQuery, batch: MetaQueryDataset):
        self.model, self.batch = model, batch

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> MetaQueryTask:
        """Queries, a connector and a painter, fresh or trained, around a trained reader and autoencoder."""
        options = strict(MetaQueryTrainingConfig, recipe.options, where="options")
        torch.manual_seed(recipe.seed)
        model = init_metaquery(options, recipe.model)
        if options.compile:
            compile_experts(model.decoder)
            for block in (module for module in model.denoiser.modules() if isinstance(module, SanaBlock)):
                block.forward = torch.compile(block.forward, dynamic=True)  # type: ignore[method-assign]
        freeze(model, options.frozen, always=("mllm.", "vae."))
        cfg = model.config
        latent = (cfg.denoiser.in_channels, cfg.latent_size, cfg.latent_size)
        pairs: PairSource = ShapesPairs(
            tasks=options.tasks,
            novel_colours=options.novel_colours,
            novel_shapes=options.novel_shapes,
            seed=recipe.seed,
        )
        if options.data:
            pairs = FilePairs(path=Path(options.data), image_size=cfg.image_size[0])
        worlds = MetaQueryDataset(
            options=options,
            pairs=pairs,
            prompts=model.processor,
            latent_shape=latent,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
        )
        return cls(model, worlds)

    def losses(self, batch: MetaQueryBatch) -> dict[str, Tensor]:
        """Mean flow loss of every kind of sample in the batch."""
        device = self.model.device
        with torch.no_grad():
            latents = self.model.vae.encode(batch.images.to(device)).float()
        samples = batch.sample_indices.to(device)
        noise, times = batch.noise.to(device), batch.times.to(device)
        errors = self.model(batch.queries.to(device), latents[samples], noise, times, samples)
        return mean_by_kind(IMAGE_KINDS, batch.image_kinds, errors)

    def sample_image(self) -> Image.Image:
        """A sheet of test prompts drawn."""
        return sample_grid(self.model)

    def save(self, folder: Path) -> None:
        """The released layout, in bfloat16."""
        self.model.save_pretrained(folder, dtype="bfloat16")


def init_metaquery(options: MetaQueryTrainingConfig, sections: Mapping[str, Any]) -> MetaQuery:
    """The model of a recipe's numbers: `config` is a config.json, `painter` and `scheduler` are a Sana's."""
    known = mllm_spec_for(read_required_json(hub.resolve(options.mllm, weights=False) / "config.json")).model_class
    reader = known.from_pretrained(options.mllm, dtype=parse_dtype(options.mllm_dtype))
    vae = DCAE.from_pretrained(metaquery_part_folder(options.dcae, "vae"))
    painter, scheduler = sections.get("denoiser", {}), sections.get("scheduler", {})
    if options.denoiser:
        painter = read_required_json(metaquery_part_folder(options.denoiser, "transformer") / "config.json")
        scheduler = read_required_json(metaquery_part_folder(options.denoiser, "scheduler") / "scheduler_config.json")
    files = sections["config"]
    homes = {name: files.get(name, files["diffusion_model_id"]) for name in MetaQueryConfig.PART_CONFIGS}
    cfg = MetaQueryConfig.from_json(files, reader.config, painter, vae.config.to_json(), scheduler, part_ids=homes)
    model = MetaQuery(cfg)
    model.mllm, model.vae = reader, vae
    model.init_queries()
    model.connector.init_weights()
    if options.denoiser:
        model.denoiser = SanaTransformer.from_pretrained(metaquery_part_folder(options.denoiser, "transformer"))
    else:
        init_sana(model.denoiser)
    return model


def metaquery_part_folder(name: str, part: str) -> Path:
    """The folder of a part of a release: its own, or where a release is that part alone, the whole."""
    folder = hub.resolve(name, subfolders=(part,))
    return folder / part if (folder / part).is_dir() else hub.resolve(name)


def init_sana(denoiser: SanaTransformer) -> None:
    """A painter from scratch: residual branches that the time gates begin small, the velocity 0."""
    for table in (
        denoiser.modulation.weight,
        denoiser.modulation.bias,
        denoiser.out_proj.weight,
        denoiser.out_proj.bias,
    ):
        nn.init.zeros_(table)
    for name, table in denoiser.named_parameters():
        if name.endswith("table"):
            nn.init.normal_(table, std=denoiser.config.dim**-0.5)
