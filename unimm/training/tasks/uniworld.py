"""Training UniWorld: what leads from a frozen reader to the painter, and the painter, learn to draw and to edit.

Rectified flow at times t = sigmoid(n), n ~ N(0, 1), shifted as the sampler's; where an edit changed the picture its
loss counts more. Lin et al. 2025, arXiv 2506.03147, section 3; docs/originals/uniworld.md, "Training".
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from unimm.checkpoint import hub
from unimm.checkpoint.load import parse_dtype
from unimm.data.batching import ROUND_ROWS, by_group, dealt, groups, to_images
from unimm.data.shapes import Example, example
from unimm.data.shapes.novel_attributes import unnamed
from unimm.denoisers.flux import Flux, load_flux
from unimm.denoisers.mmdit import SIDE, SingleBlock, Stream
from unimm.encoders.siglip import load_siglip
from unimm.generation.flow import dynamic_shift, shift_time
from unimm.models.uniworld.config import HIDDEN, UniWorldConfig
from unimm.models.uniworld.model import UniWorld
from unimm.models.uniworld.processor import UniWorldPrompts
from unimm.processing.images.siglip import Stretch
from unimm.sequence.parts import Item, text_item
from unimm.tokenizers.kl_layouts import load_vae
from unimm.training.config import Recipe, strict
from unimm.training.freezing import freeze
from unimm.training.init import fresh_tower
from unimm.training.samples import sheet
from unimm.training.tasks.deepseek_chat import DRAWINGS
from unimm.training.tasks.edit_weights import EditWeights, SmallEditError
from unimm.vlms.qwen2_5_vl.model import QwenVL

# never trained, in any stage: the released data shows no references, whose latents are projected
READ = ("reader.", "decide.", "from_latents.", "parts.vae.", "parts.clip.", "parts.t5.")
# of a double block's picture stream, and of a single block, what stage 2 trains: attention and modulation, no feed-forward
ATTENDS = ("qkv.", "q_norm.", "k_norm.", "out.", "modulation.")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the recipe's `options` may say."""

    # samples of each task in a batch, or their weights (training/tasks.py)
    tasks: Mapping[str, int]
    # the published stages: what leads from the reader, without features; that, what leads from SigLIP2, and the painter's
    # attention to and modulation of the picture. "all": everything but the reader and the autoencoder, for a painter that
    # begins with noise
    trained: Literal["stage 1", "stage 2", "all"]
    # noised copies of a picture, each at its own time: cheaper than as many samples
    targets: int
    # the part of samples of which nothing is told
    dropout: float
    # whether a prompt ends with the marker that pictures stand behind, as in the original's training and not in its sampling
    begun: bool
    # how much more an edit's loss counts where it changed the picture: log, linear, exp, quadratic; "" for evenly
    weights: str
    # the guidance that the painter is told, where it embeds one
    guidance: float
    # the part of things in drawings and edits whose colour, or whose shape, has no name
    nameless_colours: float
    nameless_shapes: float
    # folders or hub ids: of a Qwen2.5-VL; of a VAE; of CLIP and its tokenizer below FLUX's, or "" where `captioned` is false;
    # of a FLUX transformer, or "" for one of the recipe's numbers; of a SigLIP2, or "" for one of the recipe's numbers that
    # begins from the trained ViT in the folder `vit`
    reader: str
    vae: str
    captions: str
    painter: str
    siglip: str
    vit: str
    # of the reader's weights, which never change
    reader_dtype: str
    # whether torch.compile fuses the painter's blocks
    compiled: bool


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples to be read, pictures to be looked at, and noised copies of the pictures to be drawn, a picture a sample."""

    samples: list[list[Item]]
    told: Tensor  # [P] bool: whether anything is told of a sample
    looks: Tensor  # [k, 3, S, S], the tower's pictures, sample by sample
    below: Tensor  # [k, 3, h, w], the same for the VAE, one a sample that has one
    shown: Tensor  # [P], index into them, -1 for none
    images: Tensor  # [P, 3, h, w], what is drawn
    posterior: Tensor  # [P, C, h / 8, w / 8]
    weights: Tensor  # [P, 1, h / 8, w / 8]
    noise: Tensor  # [B, C, h / 8, w / 8]
    times: Tensor  # [B]
    owners: Tensor  # [B], index into the samples
    draw_groups: Tensor  # [B], index into DRAWINGS


@dataclass(frozen=True, kw_only=True)
class Worlds:
    """Batches by step: the same for a seed on every machine, and made without the model."""

    options: Options
    prompts: UniWorldPrompts
    look: Stretch
    latent: tuple[int, int, int]  # (channels, height, width)
    size: int
    seed: int

    def __call__(self, step: int) -> Batch:
        dice = random.Random(f"{self.seed}/{step}")
        tasks = dealt(self.options.tasks, self.size, dice)
        return self.batch([self.taken(task, step * self.size + i, dice) for i, task in enumerate(tasks)], dice)

    def taken(self, task: str, index: int, dice: random.Random) -> Example:
        """A training example; some of its things have no name, if it draws or edits. Raises ValueError for a text task."""
        one = example(task, index, seed=self.seed)
        if one.target is None:
            raise ValueError(
                f"got the task {task}, which draws nothing: the reader is frozen; expected drawings and edits"
            )
        return unnamed(one, dice, colours=self.options.nameless_colours, shapes=self.options.nameless_shapes)

    def batch(self, examples: Sequence[Example], dice: random.Random) -> Batch:
        """Examples with the dice's times, noises and dropped conditions."""
        options, n, many = self.options, self.options.targets, len(examples)
        generator = torch.Generator().manual_seed(dice.getrandbits(62))
        shown = [[Image.fromarray(image) for image in one.images] for one in examples]
        samples = [self.asked(one.prompt, some) for one, some in zip(examples, shown, strict=True)]
        looks = [self.look.pixels(picture) for some in shown for picture in some]
        firsts = [some[0] for some in (one.images for one in examples) if some]
        shown_at = torch.tensor([bool(one.images) for one in examples])
        shift = dynamic_shift(self.latent[1] * self.latent[2] // SIDE**2)
        return Batch(
            samples=self.rounded(samples),
            told=torch.tensor([dice.random() >= options.dropout for _ in examples]),
            looks=torch.stack(looks) if looks else torch.zeros(0, 3, self.look.size, self.look.size),
            below=to_images(firsts),
            shown=torch.where(shown_at, shown_at.cumsum(0) - 1, -1),
            images=to_images([one.target for one in examples if one.target is not None]),
            posterior=torch.randn(many, *self.latent, generator=generator),
            weights=torch.stack([self.weights(one) for one in examples]),
            noise=torch.randn(n * many, *self.latent, generator=generator),
            times=shift_time(torch.randn(n * many, generator=generator).sigmoid(), shift),
            owners=torch.arange(many).repeat_interleave(n),
            draw_groups=groups(DRAWINGS, examples, [n] * many),
        )

    def asked(self, prompt: str, pictures: Sequence[Image.Image]) -> list[Item]:
        """A prompt as it is read in training."""
        *before, last = self.prompts.drawing(prompt, pictures)
        ids = last.ids.tolist()
        return [*before, text_item([*ids, self.prompts.reader.markers.look] if self.options.begun else ids)]

    def rounded(self, samples: list[list[Item]]) -> list[list[Item]]:
        """With one more, so that all rows fill a round number: new shapes cost a CPU more than these rows."""
        rows = sum(item.segment.length for items in samples for item in items)
        end = self.prompts.reader.markers.end
        return [*samples, [text_item([end] * (-rows % ROUND_ROWS))]] if rows % ROUND_ROWS else samples

    def weights(self, one: Example) -> Tensor:
        """How much each place of a sample's loss counts [1, h / 8, w / 8]; evenly where too little was edited to tell."""
        assert one.target is not None, "every sample draws"
        even = torch.ones(1, *self.latent[1:])
        if not self.options.weights or not one.images:
            return even
        weigh = EditWeights(function=self.options.weights, factor=one.target.shape[0] // self.latent[1])
        try:
            return weigh(one.images, one.target)
        except SmallEditError:
            return even


class UniWorldObjective:
    """UniWorld on the little world."""

    name = "uniworld"
    loss_names = DRAWINGS

    def __init__(self, model: UniWorld, batch: Worlds, vae: Path):
        self.model, self.batch, self.vae = model, batch, vae

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> UniWorldObjective:
        """What leads to the painter, and the painter, fresh or trained, around a trained reader, tower and autoencoder."""
        options = strict(Options, recipe.options, where="options")
        torch.manual_seed(recipe.seed)
        vae = below(options.vae, "vae")
        model = built(options, recipe.model, vae)
        train_parts(model, options.trained)
        if options.compiled:
            for block in (*model.painter.trunk.doubles, *model.painter.trunk.singles):
                block.forward = torch.compile(block.forward, dynamic=True)
        height, width = model.size_of([])
        stride = model.parts.autoencoder.config.stride
        assert model.parts.tower is not None, "built with one"
        worlds = Worlds(
            options=options,
            prompts=model.prompts,
            look=model.parts.tower.pixels,
            latent=(model.cfg.latent_channels, height // stride, width // stride),
            size=recipe.batch,
            seed=recipe.seed,
        )
        return cls(model, worlds, vae)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Mean flow loss of every kind of sample in the batch."""
        model, device = self.model, self.model.device
        latents = self.encoded(batch)
        with torch.no_grad():
            states = model.reader.read(batch.samples)[: len(batch.told)]
        seen = len(batch.looks) and self.batch.options.trained != "stage 1"
        looks = model.parts.tower(batch.looks.to(device)) if seen and model.parts.tower is not None else None
        whole = model.told(
            batch.samples[: len(states)], [x.to(model.from_reader.fc1.weight.dtype) for x in states], looks
        )
        told = [one if some else one[:0] for one, some in zip(whole, batch.told.tolist(), strict=True)]
        # those that are shown pictures are drawn apart: half of the others' text would be padding
        shown = batch.shown[batch.owners] >= 0
        parts = [rows for some in (~shown, shown) if len(rows := some.nonzero().squeeze(1))]
        errors = [self.errors(batch, rows, told, latents) for rows in parts]
        return by_group(DRAWINGS, batch.draw_groups[torch.cat(parts)], torch.cat(errors))

    def errors(self, batch: Batch, rows: Tensor, told: Sequence[Tensor], latents: Tensor) -> Tensor:
        """The loss of some of the noised copies [n]."""
        device, owners = self.model.device, batch.owners[rows]
        return self.model(
            [told[i] for i in owners.tolist()],
            latents[owners.to(device)],
            batch.noise[rows].to(device),
            batch.times[rows].to(device),
            pooled=self.model.pooled([""]).expand(len(rows), -1),
            weights=batch.weights[owners].to(device),
            guidance=self.batch.options.guidance,
            references=self.references(batch, owners),
        )

    @torch.no_grad()
    def references(self, batch: Batch, owners: Tensor) -> Tensor | None:
        """The latents of each sample's picture [n, C, h, w], where the model is shown them."""
        if self.model.cfg.references != "tokens" or int(batch.shown[owners[0]]) < 0:
            return None
        vae, device = self.model.parts.autoencoder, self.model.device
        return vae.encode(batch.below.to(device))[batch.shown[owners].to(device)]

    @torch.no_grad()
    def encoded(self, batch: Batch) -> Tensor:
        """The pictures' latents [P, C, h, w], a sample of the posterior."""
        vae = self.model.parts.autoencoder
        device = self.model.device
        return vae.encode(batch.images.to(device), noise=batch.posterior.to(device)).float()

    def picture(self) -> Image.Image:
        """A sheet of test prompts drawn."""
        return sheet(self.model)

    def save(self, folder: Path) -> None:
        """The released layout, in bfloat16; the VAE's file as it was trained."""
        self.model.save_pretrained(folder, dtype="bfloat16")
        if (self.vae / "ae.safetensors").exists():
            shutil.copyfile(self.vae / "ae.safetensors", folder / "vae" / "ae.safetensors")


def built(options: Options, numbers: Mapping[str, Any], vae: Path) -> UniWorld:
    """A model of the recipe's numbers around what is trained already: generation, hidden, painter, vision."""
    reader = QwenVL.from_pretrained(options.reader, dtype=parse_dtype(options.reader_dtype))
    painter = load_flux(below(options.painter, "transformer")) if options.painter else None
    tower = load_siglip(hub.resolve(options.siglip)) if options.siglip else fresh_tower(numbers["vision"], options.vit)
    described = painter.config.to_files() if painter is not None else dict(numbers["painter"])
    hidden = dict.fromkeys(HIDDEN, 3 * described["joint_attention_dim"]) | dict(numbers.get("hidden", {}))
    files = reader.cfg.to_files()
    top = files["config.json"] | {"model_type": "univa_qwen2p5vl", "denoise_tower": {"denoiser_config": described}}
    top["generation"] = dict(numbers["generation"]) | {"hidden": hidden | {"siglip": tower.cfg.dim}}
    model = UniWorld(UniWorldConfig.from_files(top, files["preprocessor_config.json"]))
    model.reader, model.parts.tower, model.parts.vae = reader, tower, load_vae(vae)
    if painter is not None:
        model.painter = painter
    else:
        init_painter(model.painter)
    if options.captions:
        homes = {part: below(options.captions, part) for part in ("text_encoder", "tokenizer")}
        model.parts.take(homes, dtype=torch.float32, device="cpu")
    model.parts.check(model.cfg)
    return model


def below(name: str, part: str) -> Path:
    """The folder of a part of a release: its own, or the one around it."""
    folder = hub.resolve(name, parts=(part,)) if name.count("/") == 1 and not Path(name).exists() else hub.resolve(name)
    return folder / part if (folder / part).is_dir() else folder


def train_parts(model: UniWorld, which: str) -> None:
    """Leave out of training what a stage does not train."""
    freeze(model, (), always=READ)
    if which == "all":
        return
    for name, parameter in model.named_parameters():
        tail = name.partition(".image.")[2] if ".doubles." in name else ""
        attends = which == "stage 2" and ".trunk." in name
        chosen = name.startswith("from_reader.") or (which == "stage 2" and name.startswith("from_look."))
        chosen |= attends and tail.startswith(ATTENDS)
        chosen |= attends and ".singles." in name and ".out." not in name
        parameter.requires_grad_(chosen)
    for block in (module for module in model.painter.modules() if isinstance(module, SingleBlock)):
        for table in (block.into.weight, block.into.bias):
            if table.requires_grad:
                table.register_hook(_first(block.split[0]))


def _first(rows: int) -> Any:
    """A gradient of which only the first rows stay: queries, keys and values, which lie above a feed-forward."""

    def kept(gradient: Tensor) -> Tensor:
        return torch.cat((gradient[:rows], torch.zeros_like(gradient[rows:])))

    return kept


def init_painter(painter: Flux) -> None:
    """A painter from scratch: residual branches are gated shut, and the velocity is 0."""
    for module in painter.modules():
        if isinstance(module, Stream | SingleBlock):
            nn.init.zeros_(module.modulation.weight)
            nn.init.zeros_(module.modulation.bias)
    last = painter.trunk.last
    for table in (last.modulation.weight, last.modulation.bias, last.out.weight, last.out.bias):
        nn.init.zeros_(table)
