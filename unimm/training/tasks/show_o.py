"""Training Show-o on the shapes world: masked image tokens behind their prompt, answers after images and questions.

All kinds are in every batch, in one pack (docs/originals/show_o.md, "Training"). What is made of samples serves training
on one's own records, too (unimm.training.tasks.show_o_records).
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn

from unimm.data.batching import name_indices, sample_tasks, stack_images, training_example
from unimm.data.shapes import TASKS, Example, tokenizer_corpus
from unimm.data.shapes.novel_attributes import augment_novel_attributes
from unimm.models.show_o.config import SPECIAL_TOKENS, ShowOConfig
from unimm.models.show_o.model import ShowO
from unimm.models.show_o.phi import PhiDecoder
from unimm.models.show_o.processor import ShowOProcessor
from unimm.models.show_o.tokenizer import END_OF_TEXT, ShowOTokenizer
from unimm.sequence.packing import PackedBatch, pack_sequences
from unimm.sequence.parts import IGNORE_INDEX, text_part
from unimm.tokenizers.magvit_v2 import MagvitV2
from unimm.tokenizers.text import JsonTokenizer
from unimm.training.config import RecipeSection, TrainConfig, from_mapping, require
from unimm.training.fields import AtLeastOne, Fraction, TaskWeights, held_out_seed, known_tasks
from unimm.training.freezing import freeze
from unimm.training.losses import LossSum, count_by_kind, sum_by_kind
from unimm.training.samples import sample_grid
from unimm.training.tasks.chat_sample import ChatSample

IMAGE_KINDS = ("draw", "edit")
TEXT_KINDS = ("caption", "answer", "fact")


@dataclass(frozen=True, kw_only=True)
class ShowOTrainingConfig(RecipeSection):
    """The recipe's `options`."""

    # samples of each task in a batch, or their weights (unimm.data.batching.sample_tasks)
    tasks: Annotated[TaskWeights, known_tasks(TASKS)]
    # the part of generation samples whose prompt is dropped, which guidance compares with
    dropout: Fraction
    # the part of things in generation and editing with a novel colour, and with a novel shape
    novel_colours: Fraction
    novel_shapes: Fraction
    vocab_size: AtLeastOne
    # the folder of a trained image tokenizer, which is not trained
    vq: str
    # prefixes of the names of parameters that are not trained
    frozen: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ShowOBatch:
    """A pack whose image tokens are blank until the image tokenizer has encoded the images.

    masked [P, n]: the tokens to predict. The kinds are of each image, and of each labelled text row.
    """

    pack: PackedBatch
    images: Tensor  # [P, 3, h, w]
    masked: Tensor
    image_kinds: Tensor
    text_kinds: Tensor


def masked_places(n_tokens: int, rng: random.Random) -> Tensor:
    """Which tokens of an image are masked [n] bool: a share of cos(pi t / 2) of them, t uniform, at least one."""
    share = math.cos(math.pi * rng.random() / 2)
    places = torch.zeros(n_tokens, dtype=torch.bool)
    places[rng.sample(range(n_tokens), max(1, round(n_tokens * share)))] = True
    return places


@dataclass(frozen=True, kw_only=True)
class ShowOSampleBuilder:
    """Samples of prompts, images and answers, and packs of samples.

    n_tokens: of an image to generate. dropout: the part of images to generate whose prompt is dropped. image_kinds,
    text_kinds: the losses of images to generate, and of answers.
    """

    processor: ShowOProcessor
    n_tokens: int
    dropout: float
    image_kinds: tuple[str, ...] = IMAGE_KINDS
    text_kinds: tuple[str, ...] = TEXT_KINDS

    def generation_sample(
        self, kind: str, text: str, images: Sequence[Image.Image], target: NDArray[np.uint8], rng: random.Random
    ) -> ChatSample:
        """The blank tokens of an image behind its prompt, which is dropped at random, its images too."""
        dropped = rng.random() < self.dropout
        prompt = (
            [text_part(self.processor.prompt_ids(""))] if dropped else self.processor.generation_parts(text, images)
        )
        image = self.processor.gen_image_part(torch.zeros(self.n_tokens, dtype=torch.long))
        return ChatSample(kind=kind, parts=[*prompt, image], target=target)

    def answer_sample(self, kind: str, question: str, images: Sequence[Image.Image], answer: str) -> ChatSample:
        """A question about images with its labelled answer."""
        message = {"role": "user", "content": question, "images": images}
        return ChatSample(kind=kind, parts=self.processor.with_answer([message], answer), target=None)

    def collate(self, samples: Sequence[ChatSample], rng: random.Random) -> ShowOBatch:
        """Samples as one pack, with tokens masked at random."""
        drawn = [one for one in samples if one.target is not None]
        masked = [masked_places(self.n_tokens, rng) for _ in drawn]
        n_labels = [sum(int((part.labels >= 0).sum()) for part in one.parts) for one in samples]
        return ShowOBatch(
            pack=pack_sequences([one.parts for one in samples]),
            images=stack_images([one.target for one in drawn if one.target is not None]),
            masked=torch.stack(masked) if masked else torch.zeros(0, self.n_tokens, dtype=torch.bool),
            image_kinds=name_indices(self.image_kinds, [one.kind for one in drawn], [1] * len(drawn)),
            text_kinds=name_indices(self.text_kinds, [one.kind for one in samples], n_labels),
        )


@dataclass(frozen=True, kw_only=True)
class ShowODataset:
    """Batches by number: the same for a seed on every machine, and made without the model."""

    options: ShowOTrainingConfig
    builder: ShowOSampleBuilder
    batch_size: int
    seed: int

    def __call__(self, number: int) -> ShowOBatch:
        rng = random.Random(f"{self.seed}/{number}")
        tasks = sample_tasks(self.options.tasks, self.batch_size, rng)
        first = number * self.batch_size
        examples = [training_example(task, first + i, seed=self.seed) for i, task in enumerate(tasks)]
        options = self.options
        examples = [
            augment_novel_attributes(one, rng, colours=options.novel_colours, shapes=options.novel_shapes)
            for one in examples
        ]
        return self.builder.collate([self.sample(one, rng) for one in examples], rng)

    def sample(self, one: Example, rng: random.Random) -> ChatSample:
        """A question with its answer, or an image to generate behind its prompt."""
        kind = one.task.split(".")[0]
        images = [Image.fromarray(image) for image in one.images]
        if one.answer is not None:
            return self.builder.answer_sample(kind, one.prompt, images, one.answer)
        assert one.target is not None, f"{one.task} has neither an answer nor an image"
        return self.builder.generation_sample(kind, one.prompt, images, one.target, rng)


class ShowOPackTask:
    """The half of both of Show-o's tasks: the losses of a pack, and the release."""

    model: ShowO
    # what makes the packs
    builder: ShowOSampleBuilder

    def losses(self, batch: ShowOBatch) -> dict[str, LossSum]:
        """Cross entropy of every kind of sample in the batch: in place of images, of the next id of texts."""
        device = self.model.device
        pack = batch.pack.to(device)
        labels = None
        if pack.gen_images is not None:
            codes, labels = self.encode_targets(batch)
            pack = replace(pack, gen_images=replace(pack.gen_images, content=codes))
        losses = self.model(pack, labels)
        found = sum_by_kind(self.builder.text_kinds, batch.text_kinds.to(device), losses.text)
        return sum_by_kind(self.builder.image_kinds, self.image_row_kinds(batch).to(device), losses.image) | found

    @torch.no_grad()
    def encode_targets(self, batch: ShowOBatch) -> tuple[Tensor, Tensor]:
        """The image tokens as the model gets them, masked where they are to be predicted, and their labels [P n]."""
        device = self.model.device
        codes = self.model.required_vq.encode_ids(batch.images.to(device))
        masked = batch.masked.to(device)
        labels = codes.masked_fill(~masked, IGNORE_INDEX)
        return codes.masked_fill(masked, self.model.config.n_codes).flatten(), labels.flatten()

    def image_row_kinds(self, batch: ShowOBatch) -> Tensor:
        """The kind of every row of images that carries loss: masked tokens, then the ids before and behind images."""
        of_tokens = batch.image_kinds[:, None].expand_as(batch.masked)[batch.masked]
        return torch.cat((of_tokens, batch.image_kinds, batch.image_kinds))

    def loss_counts(self, batch: ShowOBatch) -> dict[str, int]:
        """How many rows of the batch have each loss."""
        images = count_by_kind(self.builder.image_kinds, self.image_row_kinds(batch))
        return images | count_by_kind(self.builder.text_kinds, batch.text_kinds)

    def save(self, folder: Path) -> None:
        """Write the released layout, in bfloat16; the image tokenizer in float32."""
        self.model.save_pretrained(folder, dtype="bfloat16")


class ShowOTask(ShowOPackTask):
    """Show-o on the shapes world."""

    name = "showo-nano"
    loss_names = IMAGE_KINDS + TEXT_KINDS

    def __init__(self, model: ShowO, batch: ShowODataset):
        self.model = model
        self.batch = batch
        self.builder = batch.builder

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> ShowOTask:
        """Build a model of the recipe's numbers around a trained image tokenizer."""
        options = from_mapping(ShowOTrainingConfig, recipe.options, where="options")
        return cls.from_model(init_show_o(recipe, options), recipe, options)

    @classmethod
    def from_model(cls, model: ShowO, recipe: TrainConfig, options: ShowOTrainingConfig) -> ShowOTask:
        """The task of training a given model; image tokenizer and CLIP stay as they are."""
        freeze(model, options.frozen, always=("vq.", "clip."))
        builder = ShowOSampleBuilder(
            processor=model.processor, n_tokens=model.config.image_tokens, dropout=options.dropout
        )
        return cls(
            model, ShowODataset(options=options, builder=builder, batch_size=recipe.batch_size, seed=recipe.seed)
        )

    @property
    def held_out_batch(self) -> ShowODataset:
        """Batches of scenes that no run trains on."""
        return replace(self.batch, seed=held_out_seed(self.batch.seed))

    def sample_image(self) -> Image.Image:
        """Images of test prompts."""
        return sample_grid(self.model)


# ---- the start


def init_show_o(recipe: TrainConfig, options: ShowOTrainingConfig) -> ShowO:
    """An untrained model of the recipe's numbers, around a trained image tokenizer."""
    require(recipe.model, "language.hidden_size", "image_tokens", "generation.")
    vq = MagvitV2.from_pretrained(options.vq)
    tokenizer = train_bpe_tokenizer(options.vocab_size)
    torch.manual_seed(recipe.seed)
    config = show_o_config_json(recipe.model, n_text=tokenizer.n_text, n_codes=vq.config.n_codes)
    model = ShowO(ShowOConfig.from_json(config, dict(recipe.model["language"])))
    init_phi(model.decoder)
    model.vq = vq
    model.tokenizer = tokenizer
    return model


def show_o_config_json(model: Mapping[str, Any], *, n_text: int, n_codes: int) -> dict[str, Any]:
    """A config.json of the recipe's `model`: its sections language and generation, and image_tokens."""
    return {
        "_class_name": "Showo",
        "vocab_size": n_text + len(SPECIAL_TOKENS) + n_codes + 1,
        "llm_vocab_size": n_text,
        "codebook_size": n_codes,
        "num_vq_tokens": model["image_tokens"],
        "w_clip_vit": False,
        "generation": dict(model["generation"]),
    }


def init_phi(decoder: PhiDecoder) -> None:
    """Small embeddings and heads, and residual branches that are scaled down with depth."""
    scale = (2 * decoder.config.n_layers) ** -0.5
    for name, x in decoder.named_parameters():
        if x.ndim == 2:
            nn.init.normal_(x, std=0.02 if name.startswith("head.") else x.shape[1] ** -0.5)
        if name.endswith(("out_proj.weight", "fc2.weight")):
            x.data *= scale
        if name.endswith(".bias") or name == "head.bias":
            nn.init.zeros_(x)
    nn.init.normal_(decoder.embed.weight, std=0.5)


def train_bpe_tokenizer(vocab_size: int, *, lines: int = 20_000) -> ShowOTokenizer:
    """A byte-level BPE of the shapes world's text, as Phi's is one, with the id that begins and ends texts."""
    backend = tokenizers.Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    backend.train_from_iterator(tokenizer_corpus(lines), trainer)
    with tempfile.TemporaryDirectory() as folder:
        backend.save(str(Path(folder) / "tokenizer.json"))
        inner = JsonTokenizer(Path(folder), (END_OF_TEXT,))
    return ShowOTokenizer(inner, backend.get_vocab_size())
