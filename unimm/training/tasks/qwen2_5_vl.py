"""Training a small Qwen2.5-VL on the shapes world: answers, captions, facts, and plans, which tell a target in words.

It is the MLLM of metaquery-nano and uniworld-nano, where it is frozen. Its vision encoder is trained first and alone,
to predict what is centred in each cell of an image, and then frozen, as for BAGEL's nano. Trained together with the
text it learned the pairs of shape and colour that training has, and took others for them: docs/families/metaquery.md
has numbers.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor, nn

from unimm.checkpoint.json_files import write_json
from unimm.data.batching import kind_indices, label_counts, pad_rows, sample_tasks, training_example
from unimm.data.shapes import TASKS, Example, example, judge
from unimm.data.shapes.language import FAVOURITES, describe, join_phrases
from unimm.data.shapes.novel_attributes import augment_novel_attributes
from unimm.generation.text_sampling import TextSampling
from unimm.nn.compiled import compile_experts
from unimm.nn.flops import StepFlops
from unimm.processing.requests import ROLES, Message
from unimm.sequence.packing import PackedBatch, pack_sequences
from unimm.sequence.parts import Part
from unimm.tokenizers.text import SentencePieceTokenizer
from unimm.training.config import RecipeSection, TrainConfig, from_mapping, require
from unimm.training.fields import AtLeastOne, Fraction, NoneOrMore, TaskWeights, held_out_seed
from unimm.training.init import init_decoder, train_tokenizer
from unimm.training.losses import LossSum, count_by_kind, sum_by_kind
from unimm.training.tasks.vit import LOGIT_COUNTS, ViTDataset, ViTTrainingConfig
from unimm.training.throughput import StepCounts
from unimm.vlms.flops import vlm_flops
from unimm.vlms.processor import IM_END, IM_START
from unimm.vlms.qwen2_5_vl.config import QwenSpecialTokens, QwenVLConfig
from unimm.vlms.qwen2_5_vl.flops import qwen_vision_flops
from unimm.vlms.qwen2_5_vl.model import QwenVL
from unimm.vlms.qwen2_5_vl.processor import DEFAULT_SYSTEM_PROMPT, IMAGE_PAD, QwenVLProcessor

# a loss for each kind of text, and for each attribute of what is centred in a cell
TEXT_KINDS = ("caption", "answer", "fact", "plan")
ATTRIBUTES = ("shape", "colour", "size")
# in the order of QwenSpecialTokens
QWEN_TOKENS = (IM_END, "<|vision_start|>", "<|vision_end|>", IMAGE_PAD, "<|video_pad|>")
# plan.X asks what the target of draw.X, edit.X or reason.X holds, in words
PLAN_PREFIX = "plan."
PLANNED_GROUPS = ("draw", "edit", "reason")
# more than any scored answer has
MAX_ANSWER_TOKENS = 12
SCORED_TASKS = ("answer.count", "answer.colour", "answer.shape", "answer.relation", "fact.forward", "fact.inverse")


@dataclass(frozen=True, kw_only=True)
class QwenVLTrainingConfig(RecipeSection):
    """The recipe's `options`."""

    # samples of each task in a batch, or their weights (unimm.data.batching.sample_tasks)
    tasks: TaskWeights
    # the system prompt of plans: a denoiser that is built on this MLLM should have the same
    plan_system_prompt: str
    # whose favourites are planned, too; of the other characters training has single facts only
    planned_characters: tuple[str, ...]
    # the part of things in images and plans with a novel colour, and with a novel shape
    novel_colours: Fraction
    novel_shapes: Fraction
    vocab_size: AtLeastOne
    # steps that train the vision encoder alone, before it is frozen
    vision_steps: NoneOrMore
    # images in a batch of those, and their options (unimm.training.tasks.vit)
    vision_batch_size: AtLeastOne
    vision: Mapping[str, Any]
    # test examples of each task that are scored
    scored_examples: AtLeastOne
    # whether torch.compile fuses the decoder's layers around attention
    compile: bool

    def __post_init__(self) -> None:
        if unknown := sorted({*self.tasks} - _known_tasks()):
            raise ValueError(
                f"got tasks {', '.join(unknown)}: expected captions, answers, facts and plans of the shapes world"
            )
        if unknown := sorted({*self.planned_characters} - FAVOURITES.keys()):
            raise ValueError(f"got planned_characters {', '.join(unknown)}: expected some of {', '.join(FAVOURITES)}")
        if "plan.favourite" in self.tasks and not self.planned_characters:
            raise ValueError("got no planned_characters for the task plan.favourite: expected at least one")
        self.vision_options()

    def vision_options(self) -> ViTTrainingConfig:
        """The options of the vision encoder's images."""
        return from_mapping(ViTTrainingConfig, self.vision, where="vision of the options")


def _known_tasks() -> set[str]:
    """Tasks whose output is text."""
    plans = (PLAN_PREFIX + task.split(".")[1] for task in TASKS if task.split(".")[0] in PLANNED_GROUPS)
    thoughts = (f"fact.{kind}{level}" for kind in ("math", "map") for level in (1, 2, 3))
    return {task for task in (*TASKS, *plans, *thoughts) if task.split(".")[0] in TEXT_KINDS}


@dataclass(frozen=True, kw_only=True)
class QwenVLBatch:
    """A pack of conversations, and the kind of each label, an index into TEXT_KINDS."""

    pack: PackedBatch
    text_kinds: Tensor


@dataclass(frozen=True, kw_only=True)
class QwenVLVisionBatch:
    """Images for the vision encoder alone: patches [N, F], and targets of what is centred in each cell [n, 3]."""

    patches: Tensor
    targets: Tensor


@dataclass(frozen=True, kw_only=True)
class QwenVLDataset:
    """Batches by step: the same for a seed on every machine, and made without the model."""

    options: QwenVLTrainingConfig
    processor: QwenVLProcessor
    batch_size: int
    seed: int

    def __call__(self, step: int) -> QwenVLBatch | QwenVLVisionBatch:
        if step < self.options.vision_steps:
            return self.vision_batch(step)
        rng = random.Random(f"{self.seed}/{step}/reader")
        tasks = sample_tasks(self.options.tasks, self.batch_size, rng)
        examples = [self.training_example(task, step * self.batch_size + i) for i, task in enumerate(tasks)]
        return self.batch([self.augment(one, rng) for one in examples])

    def augment(self, one: Example, rng: random.Random) -> Example:
        """The example, with some novel attributes if it is about an image, or plans one."""
        return augment_novel_attributes(one, rng, colours=self.options.novel_colours, shapes=self.options.novel_shapes)

    def batch(self, examples: Sequence[Example]) -> QwenVLBatch:
        """Examples as one pack, its rows rounded up."""
        samples = [self.prompt_parts(one) for one in examples]
        pack = pack_sequences(pad_rows(samples, self.processor.special_tokens.im_end))
        return QwenVLBatch(pack=pack, text_kinds=kind_indices(TEXT_KINDS, examples, label_counts(samples)))

    def training_example(self, task: str, index: int) -> Example:
        """A training example of a task."""
        if not task.startswith(PLAN_PREFIX):
            return training_example(task, index, seed=self.seed)
        kind = task.removeprefix(PLAN_PREFIX)
        source = next(f"{group}.{kind}" for group in PLANNED_GROUPS if f"{group}.{kind}" in TASKS)
        candidates = (example(source, i, seed=self.seed) for i in count(index, step=10**9))
        if kind == "favourite":
            # examples are skipped until one is about a character whose favourites are planned
            planned = self.options.planned_characters
            candidates = (one for one in candidates if any(name in one.prompt for name in planned))
        one = next(candidates)
        return replace(one, task=task, answer=scene_in_words(one), target=None)

    def prompt_parts(self, one: Example) -> list[Part]:
        """A question or a prompt, and the labelled words that answer it."""
        assert one.answer is not None, f"{one.task} has no answer"
        return self.processor.with_answer([user_message(one)], one.answer, system=self.system_prompt(one.task))

    def system_prompt(self, task: str) -> str | None:
        """The system prompt of a task; None for the default one."""
        return self.options.plan_system_prompt if task.startswith(PLAN_PREFIX) else None

    def vision_batch(self, step: int) -> QwenVLVisionBatch:
        """Images of a step, as patches for the vision encoder."""
        images = self.processor.image_processor
        cell = images.merged_patch_size
        size = self.options.vision_batch_size
        options = self.options.vision_options()
        batch = ViTDataset(options=options, batch_size=size, seed=self.seed, patch=cell)(step)
        side = round((len(batch.targets) // size) ** 0.5)
        pixels = rearrange(batch.patches, "(B h w) (p q C) -> B C (h p) (w q)", h=side, w=side, p=cell, q=cell)
        mean, std = (torch.tensor(values)[:, None, None] for values in (images.mean, images.std))
        frames = repeat(((pixels + 1) / 2 - mean) / std, "B C h w -> B C f h w", f=images.temporal_patch_size)
        order = "B C f (h m p) (w k q) -> (B h w m k) (C f p q)"
        merge = images.merge_size
        p = images.patch_size
        patches = rearrange(frames, order, m=merge, k=merge, p=p, q=p)
        return QwenVLVisionBatch(patches=patches, targets=batch.targets)


def user_message(one: Example) -> Message:
    """The user's message of an example: its prompt, with its images."""
    return {"role": "user", "content": one.prompt, "images": [Image.fromarray(image) for image in one.images]}


def scene_in_words(one: Example) -> str:
    """The target of an example in words: sizes and places, in reading order; "nothing" for an empty one."""
    assert one.target_scene is not None, f"{one.task} has no target image"
    phrases = [describe(thing, size=True, place=True) for thing in one.target_scene.reading_order()]
    return join_phrases(phrases or ["nothing"])


class QwenVLWithProbe(nn.Module):
    """An MLLM and, for training only, a linear probe of what is centred in each cell of an image."""

    def __init__(self, mllm: QwenVL):
        super().__init__()
        self.mllm = mllm
        self.probe = nn.Linear(mllm.config.decoder.dim, sum(LOGIT_COUNTS))

    def attribute_logits(self, patches: Tensor, n_cells: int) -> tuple[Tensor, ...]:
        """patches [N, F] of square images of n_cells cells -> logits of each attribute [n, names + 1]."""
        side = round(n_cells**0.5) * self.mllm.config.vision.spatial_merge_size
        features = self.mllm.vision(patches, [(1, side, side)] * (len(patches) // side**2))
        return self.probe(features).split(LOGIT_COUNTS, -1)


class QwenVLTask:
    """Predict what is centred in each cell, then the assistant's words."""

    name = "metaquery-nano-mllm"
    loss_names = TEXT_KINDS + ATTRIBUTES

    def __init__(self, model: QwenVLWithProbe, batch: QwenVLDataset):
        self.model = model
        self.batch = batch

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> QwenVLTask:
        """Build an MLLM of the recipe's numbers, with a tokenizer of the shapes world."""
        options = from_mapping(QwenVLTrainingConfig, recipe.options, where="options")
        mllm = init_qwen2_5_vl(recipe, options)
        if options.compile:
            compile_experts(mllm.decoder)
        dataset = QwenVLDataset(
            options=options, processor=mllm.processor, batch_size=recipe.batch_size, seed=recipe.seed
        )
        return cls(QwenVLWithProbe(mllm), dataset)

    def losses(self, batch: QwenVLBatch | QwenVLVisionBatch) -> dict[str, LossSum]:
        """Cross entropy of every attribute in a cell, or of every kind of text in the batch."""
        mllm = self.model.mllm
        mllm.vision.requires_grad_(isinstance(batch, QwenVLVisionBatch))
        if isinstance(batch, QwenVLBatch):
            return sum_by_kind(TEXT_KINDS, batch.text_kinds, mllm(batch.pack.to(mllm.device)))
        targets = batch.targets.to(mllm.device)
        n_cells = len(targets) // self.batch.options.vision_batch_size
        logits = self.model.attribute_logits(batch.patches.to(mllm.device), n_cells)
        pairs = zip(ATTRIBUTES, logits, targets.unbind(-1), strict=True)
        return {
            name: LossSum.over(F.cross_entropy(one.float(), target, reduction="none")) for name, one, target in pairs
        }

    def loss_counts(self, batch: QwenVLBatch | QwenVLVisionBatch) -> dict[str, int]:
        """The number of cells, or of labels of every kind of text."""
        if isinstance(batch, QwenVLBatch):
            return count_by_kind(TEXT_KINDS, batch.text_kinds)
        return dict.fromkeys(ATTRIBUTES, len(batch.targets))

    def step_counts(self, batch: QwenVLBatch | QwenVLVisionBatch) -> StepCounts:
        """Rows of the pack, or of the images of a step that trains the vision encoder; images; FLOPs."""
        mllm = self.model.mllm
        mllm.vision.requires_grad_(isinstance(batch, QwenVLVisionBatch))
        count = StepFlops()
        if isinstance(batch, QwenVLBatch):
            vlm_flops(count, mllm, batch.pack)
            images = batch.pack.und_images
            n_images = 0 if images is None else len(images.lengths)
            return StepCounts(tokens=len(batch.pack.layout.position_ids), images=n_images, flops=count.total)
        n_images = self.batch.options.vision_batch_size
        side = round((len(batch.patches) // n_images) ** 0.5)
        features = qwen_vision_flops(count, mllm.vision, [(1, side, side)] * n_images)
        count.chain(len(batch.targets), features, self.model.probe)
        return StepCounts(tokens=len(batch.targets), images=n_images, flops=count.total)

    def report(self) -> dict[str, float]:
        """The part of test questions that are answered right, by task."""
        mllm = self.model.mllm
        n = self.batch.options.scored_examples
        accuracy = {}
        for task in SCORED_TASKS:
            examples = [example(task, i, seed=self.batch.seed, split="test") for i in range(n)]
            conversations = [[user_message(one)] for one in examples]
            answers = mllm.chat(conversations, text_sampling=TextSampling(max_tokens=MAX_ANSWER_TOKENS))
            accuracy[task] = sum(judge(one, answer) for one, answer in zip(examples, answers, strict=True)) / n
        return accuracy

    @property
    def held_out_batch(self) -> QwenVLDataset:
        """Batches of words about scenes that no run trains on."""
        options = replace(self.batch.options, vision_steps=0)
        return replace(self.batch, options=options, seed=held_out_seed(self.batch.seed))

    def sample_image(self) -> Image.Image:
        """A bar for each scored task, as long as its accuracy: this model generates no images."""
        bars = [np.repeat(np.arange(256)[None] < 256 * accuracy, 12, 0) for accuracy in self.report().values()]
        return Image.fromarray(np.concatenate(bars).astype(np.uint8) * 255)

    def save(self, folder: Path) -> None:
        """Write the released layout of a Qwen2.5-VL, in bfloat16, and a report."""
        self.model.mllm.save_pretrained(folder, dtype="bfloat16")
        write_json(folder / "report.json", self.report(), indent=None)


def init_qwen2_5_vl(recipe: TrainConfig, options: QwenVLTrainingConfig) -> QwenVL:
    """An untrained MLLM of the recipe's `model`: its sections text, vision, pixels."""
    require(recipe.model, "text.hidden_size", "vision.", "pixels.")
    tokenizer = qwen_tokenizer(options)
    keys = zip(QwenSpecialTokens().to_json(), QWEN_TOKENS, strict=True)
    ids = {key: tokenizer.token_id(token) for key, token in keys}
    sections = {name: dict(section) for name, section in recipe.model.items()}
    vision = {**sections["vision"], "out_hidden_size": sections["text"]["hidden_size"]}
    files = {**sections["text"], **ids, "vocab_size": tokenizer.backend.vocab_size(), "vision_config": vision}
    torch.manual_seed(recipe.seed)
    mllm = QwenVL(QwenVLConfig.from_json(files, sections["pixels"]))
    mllm.tokenizer = tokenizer
    init_decoder(mllm.decoder)
    # embeddings are the head's weights, too: they begin of length 1, and the features of a cell about as large
    for weight in (mllm.decoder.embed.weight, mllm.vision.merger.mlp.fc2.weight):
        nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return mllm


def qwen_tokenizer(options: QwenVLTrainingConfig) -> SentencePieceTokenizer:
    """A tokenizer of the shapes world's text, and of what surrounds every prompt."""
    extra = [" ".join(("system", *ROLES)), DEFAULT_SYSTEM_PROMPT, options.plan_system_prompt]
    return train_tokenizer(options.vocab_size, extra=extra, special_tokens=(IM_START, *QWEN_TOKENS), kind="bpe")
