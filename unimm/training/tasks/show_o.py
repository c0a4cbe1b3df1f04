"""Training Show-o on the shapes world: masked image tokens behind their prompt, answers after images and questions.

All kinds are in every batch, in one pack (docs/originals/show_o.md, "Training").
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tokenizers
import torch
from PIL import Image
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn

from unimm.data.batching import sample_tasks, stack_images, training_example
from unimm.data.shapes import TASKS, Example, tokenizer_corpus
from unimm.data.shapes.novel_attributes import augment_novel_attributes
from unimm.models.show_o.config import SPECIAL_TOKENS, ShowOConfig
from unimm.models.show_o.model import ShowO
from unimm.models.show_o.phi import PhiDecoder
from unimm.models.show_o.processor import ShowOProcessor
from unimm.models.show_o.tokenizer import END_OF_TEXT, ShowOTokenizer
from unimm.sequence.packing import PackedBatch, pack_sequences
from unimm.sequence.parts import IGNORE_INDEX, Part, text_part
from unimm.tokenizers.magvit_v2 import MagvitV2
from unimm.tokenizers.text import JsonTokenizer
from unimm.training.config import RecipeSection, TrainConfig, from_mapping, require
from unimm.training.fields import AtLeastOne, Fraction, TaskWeights, held_out_seed, known_tasks
from unimm.training.freezing import freeze
from unimm.training.losses import LossSum, count_by_kind, sum_by_kind
from unimm.training.samples import sample_grid

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
class ShowODataset:
    """Batches by number: the same for a seed on every machine, and made without the model."""

    options: ShowOTrainingConfig
    processor: ShowOProcessor
    n_tokens: int  # of an image
    batch_size: int
    seed: int

    def __call__(self, number: int) -> ShowOBatch:
        rng = random.Random(f"{self.seed}/{number}")
        tasks = sample_tasks(self.options.tasks, self.batch_size, rng)
        examples = [
            training_example(task, number * self.batch_size + i, seed=self.seed) for i, task in enumerate(tasks)
        ]
        options = self.options
        return self.batch(
            [
                augment_novel_attributes(one, rng, colours=options.novel_colours, shapes=options.novel_shapes)
                for one in examples
            ],
            rng,
        )

    def batch(self, examples: Sequence[Example], rng: random.Random) -> ShowOBatch:
        """Examples as one pack, with prompts dropped and tokens masked at random."""
        samples = [self.parts(one, rng) for one in examples]
        drawn = [one for one in examples if one.target is not None]
        masked = [masked_places(self.n_tokens, rng) for _ in drawn]
        kinds = [one.task.split(".")[0] for one in examples]
        n_labels = torch.tensor([sum(int((part.labels >= 0).sum()) for part in parts) for parts in samples])
        text_kinds = torch.tensor([_index(TEXT_KINDS, kind) for kind in kinds]).repeat_interleave(n_labels)
        return ShowOBatch(
            pack=pack_sequences(samples),
            images=stack_images([one.target for one in drawn if one.target is not None]),
            masked=torch.stack(masked) if masked else torch.zeros(0, self.n_tokens, dtype=torch.bool),
            image_kinds=torch.tensor([_index(IMAGE_KINDS, one.task.split(".")[0]) for one in drawn], dtype=torch.long),
            text_kinds=text_kinds,
        )

    def parts(self, one: Example, rng: random.Random) -> list[Part]:
        """A question with its labelled answer, or the blank tokens of an image behind its prompt."""
        images = [Image.fromarray(image) for image in one.images]
        if one.answer is not None:
            return self.processor.with_answer([{"role": "user", "content": one.prompt, "images": images}], one.answer)
        dropped = rng.random() < self.options.dropout
        prompt = (
            [text_part(self.processor.prompt_ids(""))]
            if dropped
            else self.processor.generation_parts(one.prompt, images)
        )
        return [*prompt, self.processor.gen_image_part(torch.zeros(self.n_tokens, dtype=torch.long))]


def _index(names: Sequence[str], kind: str) -> int:
    return names.index(kind) if kind in names else -1


class ShowOTask:
    """Show-o on the shapes world."""

    name = "showo-nano"
    loss_names = IMAGE_KINDS + TEXT_KINDS

    def __init__(self, model: ShowO, batch: ShowODataset):
        self.model = model
        self.batch = batch

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> ShowOTask:
        """Build a model of the recipe's numbers around a trained image tokenizer."""
        options = from_mapping(ShowOTrainingConfig, recipe.options, where="options")
        return cls.from_model(init_show_o(recipe, options), recipe, options)

    @classmethod
    def from_model(cls, model: ShowO, recipe: TrainConfig, options: ShowOTrainingConfig) -> ShowOTask:
        """The task of training a given model; image tokenizer and CLIP stay as they are."""
        freeze(model, options.frozen, always=("vq.", "clip."))
        dataset = ShowODataset(
            options=options,
            processor=model.processor,
            n_tokens=model.config.image_tokens,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
        )
        return cls(model, dataset)

    def losses(self, batch: ShowOBatch) -> dict[str, LossSum]:
        """Cross entropy of every kind of sample in the batch: in place of images, of the next id of texts."""
        device = self.model.device
        pack = batch.pack.to(device)
        labels = None
        if pack.gen_images is not None:
            codes, labels = self.encode_targets(batch)
            pack = replace(pack, gen_images=replace(pack.gen_images, content=codes))
        losses = self.model(pack, labels)
        found = sum_by_kind(TEXT_KINDS, batch.text_kinds.to(device), losses.text)
        return sum_by_kind(IMAGE_KINDS, self.image_row_kinds(batch).to(device), losses.image) | found

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
        return count_by_kind(IMAGE_KINDS, self.image_row_kinds(batch)) | count_by_kind(TEXT_KINDS, batch.text_kinds)

    @property
    def held_out_batch(self) -> ShowODataset:
        """Batches of scenes that no run trains on."""
        return replace(self.batch, seed=held_out_seed(self.batch.seed))

    def sample_image(self) -> Image.Image:
        """Images of test prompts."""
        return sample_grid(self.model)

    def save(self, folder: Path) -> None:
        """Write the released layout, in bfloat16; the image tokenizer in float32."""
        self.model.save_pretrained(folder, dtype="bfloat16")


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
