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
from unimm.data.batching import ROUND_ROWS, by_group
from unimm.data.image_text_pairs import FilePairs, Pair, Pairs, WorldPairs
from unimm.denoisers.sana import Sana, SanaBlock, load_sana
from unimm.generation.flow import shift_time, whole_times
from unimm.models.metaquery.config import MetaQueryConfig, read_config
from unimm.models.metaquery.mllms import kind_in
from unimm.models.metaquery.model import MetaQuery
from unimm.models.metaquery.processor import Asking, QueryPrompts, black
from unimm.processing.images.io import to_tensor
from unimm.sequence.parts import Item
from unimm.tokenizers.dc_ae import load_dc_ae
from unimm.training.config import Recipe, strict
from unimm.training.freezing import freeze
from unimm.training.init import compile_streams
from unimm.training.samples import sheet
from unimm.training.tasks.deepseek_chat import DRAWINGS


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the recipe's `options` may say."""

    # samples of each task in a batch, or their weights (training/tasks.py)
    tasks: Mapping[str, int]
    # noised copies of a picture, each at its own time: cheaper than as many samples
    targets: int
    # the part of samples whose text is dropped, without pictures; with them, the part of each of: text, both, pictures
    dropout: float
    # the part of things in drawings and edits whose colour, or whose shape, has no name
    nameless_colours: float
    nameless_shapes: float
    # folders or hub ids: of a reader, an AutoencoderDC, and a Sana, or "" for a fresh one of the recipe's numbers
    reader: str
    dcae: str
    painter: str
    # of the reader's weights, which never change
    reader_dtype: str
    # parts that are not trained, by the beginning of their parameters' names; the reader and the autoencoder never are
    frozen: tuple[str, ...]
    # whether torch.compile fuses what a token meets between products
    compiled: bool
    # of the times towards noise; the released code trains unshifted, though it samples at 3
    shift: float = 1.0
    # a list of pictures of one's own (see FilePairs), in place of the tasks
    data: str = ""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples to be read, and noised copies of the pictures to be drawn after them, a picture a sample."""

    asking: Asking
    images: Tensor  # [P, 3, h, w], what is drawn
    noise: Tensor  # [B, C, h, w]
    times: Tensor  # [B]
    samples: Tensor  # [B], index into the samples asked and into images
    draw_groups: Tensor  # [B], index into DRAWINGS


@dataclass(frozen=True, kw_only=True)
class Worlds:
    """Batches by step: the same for a seed on every machine, and made without the model."""

    options: Options
    pairs: Pairs
    prompts: QueryPrompts
    latent: tuple[int, int, int]  # (channels, height, width)
    size: int
    seed: int

    def __call__(self, step: int) -> Batch:
        dice = random.Random(f"{self.seed}/{step}")
        return self.batch(self.pairs(step, self.size, dice), dice)

    def batch(self, pairs: Sequence[Pair], dice: random.Random) -> Batch:
        """Pairs with the dice's times, noises and dropped conditions."""
        samples = [self.sample(one, dice) for one in pairs]
        generator = torch.Generator().manual_seed(dice.getrandbits(62))
        n = self.options.targets
        return Batch(
            asking=self.prompts.asking(samples, multiple=ROUND_ROWS),
            images=torch.stack([to_tensor(one.target) for one in pairs]),
            noise=torch.randn(n * len(samples), *self.latent, generator=generator),
            times=shift_time(whole_times(torch.rand(n * len(samples), generator=generator)), self.options.shift),
            samples=torch.arange(len(samples)).repeat_interleave(n),
            draw_groups=torch.tensor([DRAWINGS.index(one.kind) for one in pairs]).repeat_interleave(n),
        )

    def sample(self, one: Pair, dice: random.Random) -> list[Item]:
        """What a picture is drawn from, some of it dropped."""
        draw, p = dice.random(), self.options.dropout
        text, look = draw < (2 * p if one.shown else p), p <= draw < 3 * p
        shown = [black(picture) for picture in one.shown] if look else one.shown
        return self.prompts.drawing("" if text else one.words, shown)


class MetaQueryObjective:
    """MetaQuery on the little world."""

    name = "metaquery"
    loss_names = DRAWINGS

    def __init__(self, model: MetaQuery, batch: Worlds):
        self.model, self.batch = model, batch

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> MetaQueryObjective:
        """Queries, a connector and a painter, fresh or trained, around a trained reader and autoencoder."""
        options = strict(Options, recipe.options, where="options")
        torch.manual_seed(recipe.seed)
        model = built(options, recipe.model)
        if options.compiled:
            compile_streams(model.decoder)
            for block in (module for module in model.painter.modules() if isinstance(module, SanaBlock)):
                block.forward = torch.compile(block.forward, dynamic=True)  # type: ignore[method-assign]
        freeze(model, options.frozen, always=("reader.", "vae."))
        cfg = model.cfg
        latent = (cfg.painter.in_channels, cfg.side, cfg.side)
        pairs: Pairs = WorldPairs(
            tasks=options.tasks,
            nameless_colours=options.nameless_colours,
            nameless_shapes=options.nameless_shapes,
            seed=recipe.seed,
        )
        if options.data:
            pairs = FilePairs(path=Path(options.data), side=cfg.size[0])
        worlds = Worlds(
            options=options, pairs=pairs, prompts=model.prompts, latent=latent, size=recipe.batch, seed=recipe.seed
        )
        return cls(model, worlds)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Mean flow loss of every kind of sample in the batch."""
        device = self.model.device
        with torch.no_grad():
            latents = self.model.vae.encode(batch.images.to(device)).float()
        samples = batch.samples.to(device)
        noise, times = batch.noise.to(device), batch.times.to(device)
        errors = self.model(batch.asking.to(device), latents[samples], noise, times, samples)
        return by_group(DRAWINGS, batch.draw_groups, errors)

    def picture(self) -> Image.Image:
        """A sheet of test prompts drawn."""
        return sheet(self.model)

    def save(self, folder: Path) -> None:
        """The released layout, in bfloat16."""
        self.model.save_pretrained(folder, dtype="bfloat16")


def built(options: Options, numbers: Mapping[str, Any]) -> MetaQuery:
    """The model of a recipe's numbers: `config` is a config.json, `painter` and `scheduler` are a Sana's."""
    known = kind_in(read_config(hub.resolve(options.reader, weights=False) / "config.json")).home
    reader = known.from_pretrained(options.reader, dtype=parse_dtype(options.reader_dtype))
    vae = load_dc_ae(below(options.dcae, "vae"))
    painter, scheduler = numbers.get("painter", {}), numbers.get("scheduler", {})
    if options.painter:
        painter = read_config(below(options.painter, "transformer") / "config.json")
        scheduler = read_config(below(options.painter, "scheduler") / "scheduler_config.json")
    files = numbers["config"]
    homes = {name: files.get(name, files["diffusion_model_id"]) for name in MetaQueryConfig.HOMES}
    cfg = MetaQueryConfig.from_files(files, reader.cfg, painter, vae.config.to_files(), scheduler, homes=homes)
    model = MetaQuery(cfg)
    model.reader, model.vae = reader, vae
    model.reset_queries()
    model.connector.reset()
    if options.painter:
        model.painter = load_sana(below(options.painter, "transformer"))
    else:
        init_painter(model.painter)
    return model


def below(name: str, part: str) -> Path:
    """The folder of a part of a release: its own, or where a release is that part alone, the whole."""
    folder = hub.resolve(name, parts=(part,))
    return folder / part if (folder / part).is_dir() else hub.resolve(name)


def init_painter(painter: Sana) -> None:
    """A painter from scratch: residual branches that the time gates begin small, the velocity 0."""
    for table in (painter.modulation.weight, painter.modulation.bias, painter.out.weight, painter.out.bias):
        nn.init.zeros_(table)
    for name, table in painter.named_parameters():
        if name.endswith("table"):
            nn.init.normal_(table, std=painter.config.dim**-0.5)
