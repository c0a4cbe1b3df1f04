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

from unimm.data.batching import ROW_MULTIPLE, encode_latent_tokens, sample_tasks
from unimm.data.shapes import Example, example
from unimm.data.shapes.novel_attributes import augment_novel_attributes
from unimm.generation.flow import shift_timesteps
from unimm.models.bagel.config import BagelConfig
from unimm.models.bagel.model import Bagel
from unimm.models.bagel.processor import BagelProcessor, BagelSpecialTokens
from unimm.sequence.packing import PackedBatch, pack_sequences
from unimm.sequence.parts import ImagePart, Part
from unimm.tokenizers.text import SentencePieceTokenizer
from unimm.training.config import TrainConfig, strict
from unimm.training.freezing import freeze
from unimm.training.init import compile_experts, init_decoder, train_tokenizer, trained_file
from unimm.training.samples import sample_grid
from unimm.training.tasks.bagel_plans import (
    ConditionDropout,
    ImageForms,
    PlannedPart,
    drop_conditions,
    plan_answer,
    plan_edit,
    plan_text_to_image,
)

# a loss for each kind of sample; reasoning has two, its text and its picture
IMAGE_KINDS = ("draw", "edit", "reason")
TEXT_KINDS = ("caption", "answer", "think", "fact")
BAGEL_TOKENS = ("<|endoftext|>", *BagelSpecialTokens.TOKENS.values())


@dataclass(frozen=True, kw_only=True)
class BagelTrainingConfig:
    """What the recipe's `options` may say."""

    # samples of each task in a batch, or their weights (training/tasks.py)
    tasks: Mapping[str, int]
    # noised copies of a picture to draw, each at its own time: cheaper than as many samples
    timesteps_per_image: int
    # the part of reasoning samples that write their reasoning
    think_prob: float
    dropout: Mapping[str, float]
    # how often a pair of shape and colour in a drawing or an edit has a colour, or a shape, that no prompt names
    novel_colours: float
    novel_shapes: float
    # pieces of the text model
    vocab_size: int
    # the folders of a trained VAE and a trained ViT
    vae: str
    vit: str
    # parts that are not trained, by the beginning of their parameters' names
    frozen: tuple[str, ...]
    # whether torch.compile fuses what a token meets before and after attention
    compile: bool


@dataclass(frozen=True, kw_only=True)
class BagelBatch:
    """A pack whose latent tokens only name their picture and their place in it, until the VAE has seen the pictures."""

    pack: PackedBatch
    images: Tensor  # [P, 3, h, w]
    posterior: Tensor  # [P, z, h / 8, w / 8]
    noise: Tensor  # [draw tokens, C]
    text_kinds: Tensor  # [labels with loss], index into TEXTS
    image_kinds: Tensor  # [noised tokens], index into FLOWS


@dataclass(frozen=True, kw_only=True)
class BagelDataset:
    """Batches by step: the same for a seed on every machine, and made without the model."""

    options: BagelTrainingConfig
    config: BagelConfig
    items: BagelProcessor
    tokenizer: SentencePieceTokenizer
    batch_size: int
    seed: int

    def __call__(self, step: int) -> BagelBatch:
        rng = random.Random(f"{self.seed}/{step}")
        tasks = sample_tasks(self.options.tasks, self.batch_size, rng)
        examples = [example(task, step * self.batch_size + i, seed=self.seed) for i, task in enumerate(tasks)]
        return self.batch([self.augment(one, rng) for one in examples], rng)

    def augment(self, one: Example, rng: random.Random) -> Example:
        """The example, if it draws or edits with some things that have no name; facts stay as they are."""
        return augment_novel_attributes(one, rng, colours=self.options.novel_colours, shapes=self.options.novel_shapes)

    def batch(self, examples: Sequence[Example], rng: random.Random) -> BagelBatch:
        """Examples as one pack, with the dice's times, noises and dropped conditions."""
        config = self.config
        pictures = BagelBatchImages(config, self.items, self.options.timesteps_per_image, rng)
        dropout = ConditionDropout(**self.options.dropout)
        samples = [drop_conditions(self.plan(one, pictures, rng), dropout, rng.random) for one in examples]
        groups = [one.task.split(".")[0] for one in examples]
        packed = pack_sequences([*samples, self.filler(samples, pictures)])
        text_groups = [
            TEXT_KINDS.index(g) if (g := "think" if group == "reason" else group) in TEXT_KINDS else -1
            for group in groups
        ]
        flow_groups = [IMAGE_KINDS.index(group) if group in IMAGE_KINDS else -1 for group in groups]
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        # a small batch may draw nothing
        images = torch.from_numpy(np.stack(pictures.arrays) if pictures.arrays else np.zeros((0, 0, 0, 3), np.uint8))
        side = images.shape[1] // config.vae.stride
        return BagelBatch(
            pack=packed,
            images=rearrange(images, "n h w c -> n c h w").contiguous().float() / 127.5 - 1,
            posterior=torch.randn(len(images), config.vae.latent_channels, side, side, generator=generator),
            noise=torch.randn(len(packed.timesteps), config.latent_dim, generator=generator),
            text_kinds=_repeat(text_groups, [sum(int((i.labels >= 0).sum()) for i in items) for items in samples]),
            image_kinds=_repeat(flow_groups, [sum(i.n_tokens for i in items if i.noised) for items in samples]),
        )

    def filler(self, samples: Sequence[Sequence[Part]], pictures: BagelBatchImages) -> list[Part]:
        """A sample without loss that rounds up the rows of each expert: new shapes cost a CPU more than these rows."""
        drawn = sum(i.n_tokens for items in samples for i in items if i.kind == "gen_image")
        blanks: list[Part] = []
        if drawn:
            blank = pictures.filler_part()
            blanks = [blank] * (-drawn % ROW_MULTIPLE // blank.n_tokens)
        others = sum(i.segment.length for items in samples for i in items) - drawn + 2 * len(blanks)
        return (
            [*blanks, self.items.text_part([0] * (-others % ROW_MULTIPLE - 2))]
            if -others % ROW_MULTIPLE > 2
            else blanks
        )

    def plan(self, one: Example, pictures: BagelBatchImages, rng: random.Random) -> list[PlannedPart]:
        """The released plan of an example: text to image, edit or answer; reasoning writes before it draws."""
        group = one.task.split(".")[0]
        if one.answer is not None:
            return plan_answer(
                [pictures.vit_part(image) for image in one.images],
                [self.text_part(one.prompt), self.answer_part(one.answer)],
            )
        assert one.target is not None, f"{one.task} has neither an answer nor a picture"
        targets = pictures.noised_parts(one.target)
        if group == "edit":
            (before,) = one.images
            shown = ImageForms(vae=pictures.vae_part(before), vit=pictures.vit_part(before), noised=targets[0])
            parts = plan_edit(shown, [(self.text_part(one.prompt), shown)])
        elif one.think is not None and rng.random() < self.options.think_prob:
            # guidance compares with the system prompt alone, so prompt and reasoning are dropped together
            told = [self.text_part(one.prompt), self.answer_part(f"<think>{one.think}</think>")]
            told = [] if rng.random() < self.options.dropout["text"] else told
            parts = [
                PlannedPart(item)
                for item in (self.text_part(self.config.defaults.think_generate_prompt), *told, targets[0])
            ]
        else:
            parts = plan_text_to_image(self.text_part(one.prompt), targets[0])
        return [*parts, *map(PlannedPart, targets[1:])]

    def text_part(self, text: str) -> Part:
        return self.items.text_part(self.tokenizer.encode(text))

    def answer_part(self, text: str) -> Part:
        return self.items.answer_part(self.tokenizer.encode(text))


class BagelBatchImages:
    """The pictures of one batch, each once, and the items that show them."""

    def __init__(self, config: BagelConfig, items: BagelProcessor, targets: int, rng: random.Random):
        self.config, self.items, self.timesteps_per_image, self.dice = config, items, targets, rng
        self.arrays: list[np.ndarray] = []

    def vit_part(self, image: np.ndarray) -> ImagePart:
        return self.items.vit_part(torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1)

    def vae_part(self, image: np.ndarray) -> ImagePart:
        return self._add(image, time=0.0, noised=False)

    def noised_parts(self, image: np.ndarray) -> list[ImagePart]:
        """Noised copies, each at t = sigmoid(n), n ~ N(0, 1), shifted (docs/originals/bagel.md, "Losses")."""
        normals = torch.tensor([self.dice.gauss(0, 1) for _ in range(self.timesteps_per_image)])
        times = shift_timesteps(normals.sigmoid(), self.config.train_timestep_shift)
        first = self._add(image, time=float(times[0]), noised=True)
        return [first, *(replace(first, timestep=float(t)) for t in times[1:])]

    def filler_part(self) -> ImagePart:
        """The first picture again, clean."""
        return self._latent_part(self.arrays[0].shape, 0, time=0.0, noised=False)

    def _add(self, image: np.ndarray, *, time: float, noised: bool) -> ImagePart:
        self.arrays.append(image)
        return self._latent_part(image.shape, len(self.arrays) - 1, time=time, noised=noised)

    def _latent_part(self, shape: tuple[int, ...], picture: int, *, time: float, noised: bool) -> ImagePart:
        h, w = shape[0] // self.config.latent_downsample, shape[1] // self.config.latent_downsample
        names = torch.stack((torch.full((h * w,), picture), torch.arange(h * w)), -1)
        return self.items.latent_token_part(names, h, w, timestep=time, noised=noised)


class BagelTask:
    """BAGEL on the little world."""

    name = "bagel-nano"
    loss_names = IMAGE_KINDS + TEXT_KINDS

    def __init__(self, model: Bagel, batch: BagelDataset, vae: Path):
        self.model, self.batch, self.vae = model, batch, vae

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> BagelTask:
        """A fresh model of the recipe's config around a trained VAE, with a text model of the world's own text."""
        options = strict(BagelTrainingConfig, recipe.options, where="options")
        files = {name: dict(part) for name, part in recipe.model.items()}
        vae = trained_file(options.vae, "ae.safetensors", "bagel-nano-vae")
        vit = trained_file(options.vit, "vision.safetensors", "bagel-nano-vit")
        files["config"]["vae_config"] = json.loads((vae.parent / "vae_config.json").read_text())
        prompts = [files["config"]["generation"][key] for key in ("think_draw", "think_answer")]
        tokenizer = train_tokenizer(options.vocab_size, extra=prompts, special_tokens=BAGEL_TOKENS)
        files["llm"]["vocab_size"] = tokenizer.backend.vocab_size()
        torch.manual_seed(recipe.seed)
        model = Bagel(BagelConfig.from_json(files["llm"], files["vit"], files["config"]))
        init_bagel(model)
        model.vae.load_state_dict({k: v.float() for k, v in load_file(vae).items()})
        model.vision.load_state_dict(load_file(vit))
        model.tokenizer = tokenizer
        if options.compile:
            compile_experts(model.decoder)
        freeze(model, options.frozen)
        worlds = BagelDataset(
            options=options,
            config=model.config,
            items=model.processor,
            tokenizer=tokenizer,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
        )
        return cls(model, worlds, vae)

    def losses(self, batch: BagelBatch) -> dict[str, Tensor]:
        """Mean loss of every kind of sample in the batch: flow losses of pictures, cross entropy of texts."""
        device = self.model.device
        filled = self.encode_latents(batch).to(device)
        losses = self.model(filled, batch.noise.to(device))
        flows = {
            name: losses.mse[at].mean() for i, name in enumerate(IMAGE_KINDS) if (at := batch.image_kinds == i).any()
        }
        texts = {name: losses.ce[at].mean() for i, name in enumerate(TEXT_KINDS) if (at := batch.text_kinds == i).any()}
        return flows | texts

    def encode_latents(self, batch: BagelBatch) -> PackedBatch:
        """The pack with real latent tokens; every picture meets the VAE once, apart from its neighbours' sizes."""
        return encode_latent_tokens(
            batch.pack, self.model.vae, batch.images, batch.posterior, patch=self.model.config.latent_patch_size
        )

    def sample_image(self) -> Image.Image:
        """A sheet of test prompts drawn."""
        return sample_grid(self.model)

    def save(self, folder: Path) -> None:
        """The released layout, in bfloat16; the VAE's file as it was trained."""
        self.model.save_pretrained(folder, dtype="bfloat16")
        shutil.copyfile(self.vae, folder / "ae.safetensors")


def init_bagel(model: Bagel) -> None:
    """What training from scratch starts from: embeddings of half the size of positions, residual branches scaled down
    with depth, velocity 0."""
    init_decoder(model.decoder)
    # what is seen must not be drowned by where it is: the connector's output begins about as large as the positions
    nn.init.normal_(model.connector.fc2.weight, std=2 * model.connector.fc2.in_features**-0.5)
    for table in (model.llm2vae.weight, model.llm2vae.bias):
        nn.init.zeros_(table)


def _repeat(values: list[int], times: list[int]) -> Tensor:
    return torch.tensor(values).repeat_interleave(torch.tensor(times))
