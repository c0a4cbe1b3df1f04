"""Training BAGEL on the little world: packs of drawing, editing, answering and reasoning, by the released plans."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from unimm.data.batching import ROUND_ROWS, dealt, encoded
from unimm.data.shapes import Example, example
from unimm.data.shapes.novel_attributes import unnamed
from unimm.generation.flow import shift_time
from unimm.models.bagel.config import BagelConfig
from unimm.models.bagel.model import Bagel
from unimm.models.bagel.processor import Items, Markers
from unimm.sequence.packing import Pack, pack
from unimm.sequence.parts import Item
from unimm.tokenizers.text import SentencePieceTokenizer
from unimm.training.config import Recipe, strict
from unimm.training.freezing import freeze
from unimm.training.init import compile_streams, init_decoder, text_model, trained
from unimm.training.samples import sheet
from unimm.training.tasks.bagel_plans import Dropout, Part, Shown, answer, drop, edit, text_to_image

# a loss for each kind of sample; reasoning has two, its text and its picture
FLOWS = ("draw", "edit", "reason")
TEXTS = ("caption", "answer", "think", "fact")
BAGEL_MARKERS = ("<|endoftext|>", *Markers.STRINGS.values())


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the recipe's `options` may say."""

    # samples of each task in a batch, or their weights (training/tasks.py)
    tasks: Mapping[str, int]
    # noised copies of a picture to draw, each at its own time: cheaper than as many samples
    targets: int
    # the part of reasoning samples that write their reasoning
    thinks: float
    dropout: Mapping[str, float]
    # how often a pair of shape and colour in a drawing or an edit has a colour, or a shape, that no prompt names
    nameless_colours: float
    nameless_shapes: float
    # pieces of the text model
    vocabulary: int
    # the folders of a trained VAE and a trained ViT
    vae: str
    vit: str
    # parts that are not trained, by the beginning of their parameters' names
    frozen: tuple[str, ...]
    # whether torch.compile fuses what a token meets before and after attention
    compiled: bool


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A pack whose latent tokens only name their picture and their place in it, until the VAE has seen the pictures."""

    pack: Pack
    images: Tensor  # [P, 3, h, w]
    posterior: Tensor  # [P, z, h / 8, w / 8]
    noise: Tensor  # [draw tokens, C]
    text_groups: Tensor  # [labels with loss], index into TEXTS
    flow_groups: Tensor  # [noised tokens], index into FLOWS


@dataclass(frozen=True, kw_only=True)
class Worlds:
    """Batches by step: the same for a seed on every machine, and made without the model."""

    options: Options
    config: BagelConfig
    items: Items
    tokenizer: SentencePieceTokenizer
    size: int
    seed: int

    def __call__(self, step: int) -> Batch:
        dice = random.Random(f"{self.seed}/{step}")
        tasks = dealt(self.options.tasks, self.size, dice)
        examples = [example(task, step * self.size + i, seed=self.seed) for i, task in enumerate(tasks)]
        return self.batch([self.unnamed(one, dice) for one in examples], dice)

    def unnamed(self, one: Example, dice: random.Random) -> Example:
        """The example, if it draws or edits with some things that have no name; facts stay as they are."""
        return unnamed(one, dice, colours=self.options.nameless_colours, shapes=self.options.nameless_shapes)

    def batch(self, examples: Sequence[Example], dice: random.Random) -> Batch:
        """Examples as one pack, with the dice's times, noises and dropped conditions."""
        config = self.config
        pictures = Pictures(config, self.items, self.options.targets, dice)
        dropout = Dropout(**self.options.dropout)
        samples = [drop(self.plan(one, pictures, dice), dropout, dice.random) for one in examples]
        groups = [one.task.split(".")[0] for one in examples]
        packed = pack([*samples, self.filler(samples, pictures)])
        text_groups = [
            TEXTS.index(g) if (g := "think" if group == "reason" else group) in TEXTS else -1 for group in groups
        ]
        flow_groups = [FLOWS.index(group) if group in FLOWS else -1 for group in groups]
        generator = torch.Generator().manual_seed(dice.getrandbits(62))
        # a small batch may draw nothing
        images = torch.from_numpy(np.stack(pictures.seen) if pictures.seen else np.zeros((0, 0, 0, 3), np.uint8))
        side = images.shape[1] // config.vae.stride
        return Batch(
            pack=packed,
            images=rearrange(images, "n h w c -> n c h w").contiguous().float() / 127.5 - 1,
            posterior=torch.randn(len(images), config.vae.latent_channels, side, side, generator=generator),
            noise=torch.randn(len(packed.times), config.latent_dim, generator=generator),
            text_groups=_repeat(text_groups, [sum(int((i.labels >= 0).sum()) for i in items) for items in samples]),
            flow_groups=_repeat(flow_groups, [sum(i.n_tokens for i in items if i.noised) for items in samples]),
        )

    def filler(self, samples: Sequence[Sequence[Item]], pictures: Pictures) -> list[Item]:
        """A sample without loss that rounds up the rows of each expert: new shapes cost a CPU more than these rows."""
        drawn = sum(i.n_tokens for items in samples for i in items if i.kind == "draw")
        blanks: list[Item] = []
        if drawn:
            blank = pictures.repeated()
            blanks = [blank] * (-drawn % ROUND_ROWS // blank.n_tokens)
        others = sum(i.segment.length for items in samples for i in items) - drawn + 2 * len(blanks)
        return [*blanks, self.items.text([0] * (-others % ROUND_ROWS - 2))] if -others % ROUND_ROWS > 2 else blanks

    def plan(self, one: Example, pictures: Pictures, dice: random.Random) -> list[Part]:
        """The released plan of an example: text to image, edit or answer; reasoning writes before it draws."""
        group = one.task.split(".")[0]
        if one.answer is not None:
            return answer(
                [pictures.look(image) for image in one.images], [self.said(one.prompt), self.answered(one.answer)]
            )
        assert one.target is not None, f"{one.task} has neither an answer nor a picture"
        targets = pictures.targets(one.target)
        if group == "edit":
            (before,) = one.images
            shown = Shown(clean=pictures.clean(before), look=pictures.look(before), noised=targets[0])
            parts = edit(shown, [(self.said(one.prompt), shown)])
        elif one.think is not None and dice.random() < self.options.thinks:
            # guidance compares with the system prompt alone, so prompt and reasoning are dropped together
            told = [self.said(one.prompt), self.answered(f"<think>{one.think}</think>")]
            told = [] if dice.random() < self.options.dropout["text"] else told
            parts = [Part(item) for item in (self.said(self.config.defaults.think_draw), *told, targets[0])]
        else:
            parts = text_to_image(self.said(one.prompt), targets[0])
        return [*parts, *map(Part, targets[1:])]

    def said(self, text: str) -> Item:
        return self.items.text(self.tokenizer.encode(text))

    def answered(self, text: str) -> Item:
        return self.items.answer(self.tokenizer.encode(text))


class Pictures:
    """The pictures of one batch, each once, and the items that show them."""

    def __init__(self, config: BagelConfig, items: Items, targets: int, dice: random.Random):
        self.config, self.items, self.n_targets, self.dice = config, items, targets, dice
        self.seen: list[np.ndarray] = []

    def look(self, image: np.ndarray) -> Item:
        return self.items.looked_at(torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1)

    def clean(self, image: np.ndarray) -> Item:
        return self._new(image, time=0.0, noised=False)

    def targets(self, image: np.ndarray) -> list[Item]:
        """Noised copies, each at t = sigmoid(n), n ~ N(0, 1), shifted (docs/originals/bagel.md, "Losses")."""
        normals = torch.tensor([self.dice.gauss(0, 1) for _ in range(self.n_targets)])
        times = shift_time(normals.sigmoid(), self.config.train_shift)
        first = self._new(image, time=float(times[0]), noised=True)
        return [first, *(replace(first, time=float(t)) for t in times[1:])]

    def repeated(self) -> Item:
        """The first picture again, clean."""
        return self._named(self.seen[0].shape, 0, time=0.0, noised=False)

    def _new(self, image: np.ndarray, *, time: float, noised: bool) -> Item:
        self.seen.append(image)
        return self._named(image.shape, len(self.seen) - 1, time=time, noised=noised)

    def _named(self, shape: tuple[int, ...], picture: int, *, time: float, noised: bool) -> Item:
        h, w = shape[0] // self.config.stride, shape[1] // self.config.stride
        names = torch.stack((torch.full((h * w,), picture), torch.arange(h * w)), -1)
        return self.items.named(names, h, w, time=time, noised=noised)


class ShapesObjective:
    """BAGEL on the little world."""

    name = "bagel-nano"
    loss_names = FLOWS + TEXTS

    def __init__(self, model: Bagel, batch: Worlds, vae: Path):
        self.model, self.batch, self.vae = model, batch, vae

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> ShapesObjective:
        """A fresh model of the recipe's config around a trained VAE, with a text model of the world's own text."""
        options = strict(Options, recipe.options, where="options")
        files = {name: dict(part) for name, part in recipe.model.items()}
        vae = trained(options.vae, "ae.safetensors", "bagel-nano-vae")
        vit = trained(options.vit, "vision.safetensors", "bagel-nano-vit")
        files["config"]["vae_config"] = json.loads((vae.parent / "vae_config.json").read_text())
        prompts = [files["config"]["generation"][key] for key in ("think_draw", "think_answer")]
        tokenizer = text_model(options.vocabulary, extra=prompts, markers=BAGEL_MARKERS)
        files["llm"]["vocab_size"] = tokenizer.inner.vocab_size()
        torch.manual_seed(recipe.seed)
        model = Bagel(BagelConfig.from_files(files["llm"], files["vit"], files["config"]))
        init_weights(model)
        model.vae.load_state_dict({k: v.float() for k, v in load_file(vae).items()})
        model.vision.load_state_dict(load_file(vit))
        model.tokenizer = tokenizer
        if options.compiled:
            compile_streams(model.decoder)
        freeze(model, options.frozen)
        worlds = Worlds(
            options=options,
            config=model.cfg,
            items=model.items,
            tokenizer=tokenizer,
            size=recipe.batch,
            seed=recipe.seed,
        )
        return cls(model, worlds, vae)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Mean loss of every kind of sample in the batch: flow losses of pictures, cross entropy of texts."""
        device = self.model.device
        filled = self.encoded(batch).to(device)
        losses = self.model(filled, batch.noise.to(device))
        flows = {name: losses.mse[at].mean() for i, name in enumerate(FLOWS) if (at := batch.flow_groups == i).any()}
        texts = {name: losses.ce[at].mean() for i, name in enumerate(TEXTS) if (at := batch.text_groups == i).any()}
        return flows | texts

    def encoded(self, batch: Batch) -> Pack:
        """The pack with real latent tokens; every picture meets the VAE once, apart from its neighbours' sizes."""
        return encoded(batch.pack, self.model.vae, batch.images, batch.posterior, patch=self.model.cfg.latent_patch)

    def picture(self) -> Image.Image:
        """A sheet of test prompts drawn."""
        return sheet(self.model)

    def save(self, folder: Path) -> None:
        """The released layout, in bfloat16; the VAE's file as it was trained."""
        self.model.save_pretrained(folder, dtype="bfloat16")
        shutil.copyfile(self.vae, folder / "ae.safetensors")


def init_weights(model: Bagel) -> None:
    """What training from scratch starts from: embeddings of half the size of positions, residual branches scaled down
    with depth, velocity 0."""
    init_decoder(model.decoder)
    # what is seen must not be drowned by where it is: the connector's output begins about as large as the positions
    nn.init.normal_(model.connector.fc2.weight, std=2 * model.connector.fc2.in_features**-0.5)
    for table in (model.to_velocity.weight, model.to_velocity.bias):
        nn.init.zeros_(table)


def _repeat(values: list[int], times: list[int]) -> Tensor:
    return torch.tensor(values).repeat_interleave(torch.tensor(times))
