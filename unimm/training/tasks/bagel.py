"""Training BAGEL on the shapes world: packs of generation, editing, answers and reasoning, by the released plans."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from unimm.checkpoint.atomic import copy_file
from unimm.checkpoint.json_files import read_json
from unimm.data.batching import (
    ROW_MULTIPLE,
    encode_latents,
    gen_token_counts,
    kind_indices,
    label_counts,
    place_latent_tokens,
    sample_tasks,
    stack_images,
)
from unimm.data.shapes import TASKS, Example, example
from unimm.data.shapes.novel_attributes import augment_novel_attributes
from unimm.generation.flow import shift_timesteps
from unimm.models.bagel.config import BagelConfig
from unimm.models.bagel.flops import bagel_flops
from unimm.models.bagel.model import Bagel
from unimm.models.bagel.processor import BagelProcessor, BagelSpecialTokens
from unimm.nn.compiled import compile_experts
from unimm.sequence.packing import PackedBatch, pack_sequences
from unimm.sequence.parts import ImagePart, Part
from unimm.tokenizers.text import SentencePieceTokenizer
from unimm.training.config import RecipeSection, TrainConfig, from_mapping, require
from unimm.training.fields import AtLeastOne, Fraction, TaskWeights, held_out_seed, known_tasks
from unimm.training.freezing import freeze
from unimm.training.init import init_decoder, load_trained, train_tokenizer, trained_file
from unimm.training.losses import LossSum, count_by_kind, sum_by_kind
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
from unimm.training.throughput import StepCounts

# a loss for each kind of sample; reasoning has two, its text ("think") and its image ("reason")
IMAGE_KINDS = ("draw", "edit", "reason")
TEXT_KINDS = ("caption", "answer", "think", "fact")
BAGEL_TOKENS = ("<|endoftext|>", *BagelSpecialTokens.TOKENS.values())


@dataclass(frozen=True, kw_only=True)
class BagelTrainingConfig(RecipeSection):
    """The recipe's `options`."""

    # samples of each task in a batch, or their weights (unimm.data.batching.sample_tasks)
    tasks: Annotated[TaskWeights, known_tasks(TASKS)]
    # noised copies of a target, each at its own timestep: cheaper than as many samples
    timesteps_per_image: AtLeastOne
    # the part of reasoning samples whose reasoning is written out
    think_prob: Fraction
    # rates of `bagel_plans.ConditionDropout`
    dropout: Mapping[str, Fraction]
    # the part of (shape, colour) pairs in generation and editing with a novel colour, and with a novel shape
    novel_colours: Fraction
    novel_shapes: Fraction
    vocab_size: AtLeastOne
    # the folders of a trained VAE and a trained ViT
    vae: str
    vit: str
    # prefixes of the names of parameters that are not trained
    frozen: tuple[str, ...]
    # whether torch.compile fuses the experts' layers around attention
    compile: bool

    def __post_init__(self) -> None:
        self.condition_dropout()

    def condition_dropout(self) -> ConditionDropout:
        """The rates of `dropout`."""
        return from_mapping(ConditionDropout, self.dropout, where="dropout of the options")


@dataclass(frozen=True, kw_only=True)
class BagelBatch:
    """A pack whose image tokens are indices (image, token of it), until the VAE has encoded the images."""

    pack: PackedBatch
    images: Tensor  # [P, 3, h, w]
    posterior: Tensor  # [P, C, h / 8, w / 8]
    noise: Tensor  # [image tokens, p * p * C]
    text_kinds: Tensor  # [labels with loss], index into TEXT_KINDS
    image_kinds: Tensor  # [noised tokens], index into IMAGE_KINDS


@dataclass(frozen=True, kw_only=True)
class BagelDataset:
    """Batches by step: the same for a seed on every machine, and made without the model."""

    options: BagelTrainingConfig
    config: BagelConfig
    processor: BagelProcessor
    tokenizer: SentencePieceTokenizer
    batch_size: int
    seed: int

    def __call__(self, step: int) -> BagelBatch:
        rng = random.Random(f"{self.seed}/{step}")
        tasks = sample_tasks(self.options.tasks, self.batch_size, rng)
        examples = [example(task, step * self.batch_size + i, seed=self.seed) for i, task in enumerate(tasks)]
        return self.batch([self.augment(one, rng) for one in examples], rng)

    def augment(self, one: Example, rng: random.Random) -> Example:
        """The example, with some novel attributes if it generates or edits; facts stay as they are."""
        return augment_novel_attributes(one, rng, colours=self.options.novel_colours, shapes=self.options.novel_shapes)

    def batch(self, examples: Sequence[Example], rng: random.Random) -> BagelBatch:
        """Examples as one pack, with sampled timesteps and noise, and conditions dropped at random."""
        config = self.config
        images = BagelBatchImages(config, self.processor, self.options.timesteps_per_image, rng)
        dropout = self.options.condition_dropout()
        samples = [drop_conditions(self.plan(one, images, rng), dropout, rng.random) for one in examples]
        pack = pack_sequences([*samples, self.filler(samples, images)])
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        pixels = stack_images(images.arrays)
        side = pixels.shape[-1] // config.vae.stride
        # the text of a reasoning sample is its reasoning
        texts = [replace(one, task=one.task.replace("reason.", "think.")) for one in examples]
        n_noised = [sum(part.n_tokens for part in parts if part.noised) for parts in samples]
        return BagelBatch(
            pack=pack,
            images=pixels,
            posterior=torch.randn(len(pixels), config.vae.latent_channels, side, side, generator=generator),
            noise=torch.randn(len(pack.timesteps), config.latent_dim, generator=generator),
            text_kinds=kind_indices(TEXT_KINDS, texts, label_counts(samples)),
            image_kinds=kind_indices(IMAGE_KINDS, examples, n_noised),
        )

    def filler(self, samples: Sequence[Sequence[Part]], images: BagelBatchImages) -> list[Part]:
        """A sample without loss that rounds up the rows of each expert: new shapes cost a CPU more than these rows."""
        n_gen = sum(gen_token_counts(samples))
        image_parts: list[Part] = []
        if n_gen:
            filler = images.filler_part()
            image_parts = [filler] * (-n_gen % ROW_MULTIPLE // filler.n_tokens)
        # the special tokens at both ends of an image are text rows
        n_und = sum(part.segment.length for parts in samples for part in parts) - n_gen + 2 * len(image_parts)
        # as many as a text of no ids has: its two special tokens
        n_ids = -n_und % ROW_MULTIPLE - 2
        return [*image_parts, self.processor.text_part([0] * n_ids)] if n_ids > 0 else image_parts

    def plan(self, one: Example, images: BagelBatchImages, rng: random.Random) -> list[PlannedPart]:
        """The released plan of an example: text to image, edit or answer; reasoning is written before its image."""
        prompt = self.text_part(one.prompt)
        if one.answer is not None:
            return plan_answer([images.vit_part(image) for image in one.images], [prompt, self.answer_part(one.answer)])
        assert one.target is not None, f"{one.task} has neither an answer nor an image"
        first, *others = images.noised_parts(one.target)
        if one.task.startswith("edit."):
            (before,) = one.images
            forms = ImageForms(vae=images.vae_part(before), vit=images.vit_part(before), noised=first)
            parts = plan_edit(forms, [(prompt, forms)])
        elif one.think is not None and rng.random() < self.options.think_prob:
            # guidance compares with the system prompt alone, so prompt and reasoning are dropped together
            is_dropped = rng.random() < self.options.dropout["text"]
            texts = [] if is_dropped else [prompt, self.answer_part(f"<think>{one.think}</think>")]
            system = self.text_part(self.config.defaults.think_generate_prompt)
            parts = [PlannedPart(part) for part in (system, *texts, first)]
        else:
            parts = plan_text_to_image(prompt, first)
        return [*parts, *map(PlannedPart, others)]

    def text_part(self, text: str) -> Part:
        """A text between its special tokens, without labels."""
        return self.processor.text_part(self.tokenizer.encode(text))

    def answer_part(self, text: str) -> Part:
        """A text between its special tokens, with labels."""
        return self.processor.answer_part(self.tokenizer.encode(text))


class BagelBatchImages:
    """The images of one batch, each once, and their parts."""

    def __init__(self, config: BagelConfig, processor: BagelProcessor, timesteps_per_image: int, rng: random.Random):
        self.config = config
        self.processor = processor
        self.timesteps_per_image = timesteps_per_image
        self.rng = rng
        self.arrays: list[NDArray[np.uint8]] = []

    def vit_part(self, image: NDArray[np.uint8]) -> ImagePart:
        """The image as ViT patches."""
        return self.processor.vit_part(stack_images([image])[0])

    def vae_part(self, image: NDArray[np.uint8]) -> ImagePart:
        """The image as clean latents."""
        return self._add(image, timestep=0.0, noised=False)

    def noised_parts(self, image: NDArray[np.uint8]) -> list[ImagePart]:
        """Noised copies, each at t = sigmoid(n), n ~ N(0, 1), shifted (docs/originals/bagel.md, "Losses")."""
        normals = torch.tensor([self.rng.gauss(0, 1) for _ in range(self.timesteps_per_image)])
        timesteps = shift_timesteps(normals.sigmoid(), self.config.train_timestep_shift).tolist()
        first = self._add(image, timestep=timesteps[0], noised=True)
        return [first, *(replace(first, timestep=t) for t in timesteps[1:])]

    def filler_part(self) -> ImagePart:
        """The first image again, clean."""
        return self._latent_part(self.arrays[0], 0, timestep=0.0, noised=False)

    def _add(self, image: NDArray[np.uint8], *, timestep: float, noised: bool) -> ImagePart:
        self.arrays.append(image)
        return self._latent_part(image, len(self.arrays) - 1, timestep=timestep, noised=noised)

    def _latent_part(self, image: NDArray[np.uint8], index: int, *, timestep: float, noised: bool) -> ImagePart:
        """A part whose tokens are (index, index of the token), in the place of the image's latents."""
        h, w = (side // self.config.latent_downsample for side in image.shape[:2])
        tokens = torch.stack((torch.full((h * w,), index), torch.arange(h * w)), -1)
        return self.processor.latent_token_part(tokens, h, w, timestep=timestep, noised=noised)


class BagelTask:
    """BAGEL on the shapes world."""

    name = "bagel-nano"
    loss_names = IMAGE_KINDS + TEXT_KINDS

    def __init__(self, model: Bagel, batch: BagelDataset, vae: Path):
        self.model = model
        self.batch = batch
        # the file of the VAE's weights, which are not trained
        self.vae = vae

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> BagelTask:
        """Build a model of the recipe's numbers around a trained VAE and ViT, with a tokenizer of the shapes world."""
        options = from_mapping(BagelTrainingConfig, recipe.options, where="options")
        prompts = ("think_draw", "think_answer")
        require(recipe.model, "llm.", "vit.", *(f"config.generation.{key}" for key in prompts))
        files = {name: dict(recipe.model[name]) for name in ("llm", "vit", "config")}
        vae = trained_file(options.vae, "ae.safetensors", "bagel-nano-vae")
        vit = trained_file(options.vit, "vision.safetensors", "bagel-nano-vit")
        files["config"]["vae_config"] = read_json(vae.parent / "vae_config.json", required=True)
        extra = [files["config"]["generation"][key] for key in prompts]
        tokenizer = train_tokenizer(options.vocab_size, extra=extra, special_tokens=BAGEL_TOKENS)
        files["llm"]["vocab_size"] = tokenizer.backend.vocab_size()
        torch.manual_seed(recipe.seed)
        model = Bagel(BagelConfig.from_json(files["llm"], files["vit"], files["config"]))
        init_bagel(model)
        load_trained(model.vae, vae)
        load_trained(model.vision, vit)
        model.tokenizer = tokenizer
        if options.compile:
            compile_experts(model.decoder)
        freeze(model, options.frozen)
        dataset = BagelDataset(
            options=options,
            config=model.config,
            processor=model.processor,
            tokenizer=tokenizer,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
        )
        return cls(model, dataset, vae)

    def losses(self, batch: BagelBatch) -> dict[str, LossSum]:
        """The loss of every kind of sample in the batch: flow losses of images, cross entropy of texts."""
        device = self.model.device
        losses = self.model(self.encode_latents(batch).to(device), batch.noise.to(device))
        image_losses = sum_by_kind(IMAGE_KINDS, batch.image_kinds, losses.mse)
        return image_losses | sum_by_kind(TEXT_KINDS, batch.text_kinds, losses.ce)

    def loss_counts(self, batch: BagelBatch) -> dict[str, int]:
        """How many rows of the batch have each loss."""
        images = count_by_kind(IMAGE_KINDS, batch.image_kinds)
        return images | count_by_kind(TEXT_KINDS, batch.text_kinds)

    def encode_latents(self, batch: BagelBatch) -> PackedBatch:
        """The pack with its latents in place; every image is encoded once."""
        patch = self.model.config.latent_patch_size
        if batch.pack.gen_images is None:
            return batch.pack
        latents = encode_latents(self.model.vae, batch.images, batch.posterior)
        return place_latent_tokens(batch.pack, latents, patch=patch)

    def step_counts(self, batch: BagelBatch) -> StepCounts:
        """Rows of the pack; images, twice where one is there as latents and as patches; FLOPs."""
        pack = batch.pack
        sizes = [(image.shape[1], image.shape[2]) for image in batch.images]
        n_seen = 0 if pack.und_images is None else len(pack.und_images.lengths)
        flops = bagel_flops(self.model, pack, sizes).total
        return StepCounts(tokens=len(pack.layout.position_ids), images=len(sizes) + n_seen, flops=flops)

    @property
    def held_out_batch(self) -> BagelDataset:
        """Batches of scenes that no run trains on."""
        return replace(self.batch, seed=held_out_seed(self.batch.seed))

    def sample_image(self) -> Image.Image:
        """Images of test prompts."""
        return sample_grid(self.model)

    def save(self, folder: Path) -> None:
        """Write the released layout, in bfloat16; the VAE's file as it was trained."""
        self.model.save_pretrained(folder, dtype="bfloat16")
        copy_file(self.vae, folder / "ae.safetensors")


def init_bagel(model: Bagel) -> None:
    """Set the weights that training from scratch starts from: see `init_decoder`; the velocity is 0."""
    init_decoder(model.decoder)
    # image features must not be drowned by their positions: the connector's output begins about as large
    nn.init.normal_(model.connector.fc2.weight, std=2 * model.connector.fc2.in_features**-0.5)
    for table in (model.llm2vae.weight, model.llm2vae.bias):
        nn.init.zeros_(table)
