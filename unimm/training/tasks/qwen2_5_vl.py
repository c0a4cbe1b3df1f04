"""Training a small Qwen2.5-VL on the little world: it answers, describes, knows who likes what, and says what a drawing holds.

It is the reader that metaquery-nano is built around, where it stays as it is. Its tower is trained first and alone, to say
what is centred in each cell of a picture, and then frozen, as BAGEL's nano does it. Trained together with the words it comes
to see the pairs of shape and colour that there are, and others are taken for them: examples/metaquery-nano.md has numbers.
"""

from __future__ import annotations

import json
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

from unimm.data.batching import ROW_MULTIPLE, kind_indices, label_counts, mean_by_kind, sample_tasks, training_example
from unimm.data.shapes import TASKS, Example, example, judge
from unimm.data.shapes.language import FAVOURITES, describe, join_phrases
from unimm.generation.text_sampling import TextSampling
from unimm.processing.requests import ROLES, Message
from unimm.sequence.packing import PackedBatch, pack_sequences
from unimm.sequence.parts import Part, text_part
from unimm.tokenizers.text import SentencePieceTokenizer
from unimm.training.config import TrainConfig, strict
from unimm.training.init import compile_experts, init_decoder, train_tokenizer
from unimm.training.tasks.vit import ATTRIBUTE_NAMES, ViTDataset
from unimm.training.tasks.vit import ViTTrainingConfig as Looks
from unimm.vlms.processor import IM_END, IM_START
from unimm.vlms.qwen2_5_vl.config import QwenSpecialTokens, QwenVLConfig
from unimm.vlms.qwen2_5_vl.model import QwenVL
from unimm.vlms.qwen2_5_vl.processor import DEFAULT_SYSTEM_PROMPT, IMAGE_PAD, QwenVLProcessor

# a loss for each kind of text, and for each thing that is asked about a cell
TEXT_KINDS = ("caption", "answer", "fact", "plan")
ATTRIBUTES = ("shape", "colour", "size")
# in the order of QwenMarkers
QWEN_TOKENS = (IM_END, "<|vision_start|>", "<|vision_end|>", IMAGE_PAD, "<|video_pad|>")
PLAN_PREFIX = "plan."
MAX_ANSWER_TOKENS = 12  # ids, more than any judged answer has
SCORED_TASKS = ("answer.count", "answer.colour", "answer.shape", "answer.relation", "fact.forward", "fact.inverse")


@dataclass(frozen=True, kw_only=True)
class QwenVLTrainingConfig:
    """What the recipe's `options` may say."""

    # samples of each task in a batch, or their weights (training/tasks.py). plan.X asks of the
    # prompt of draw.X, edit.X or reason.X what the picture holds, in words
    tasks: Mapping[str, int]
    # the system prompt of plans; that of the painter that will be built around the reader should say the same
    plan_system_prompt: str
    # whose favourites are planned, too: of the other characters single facts are told and nothing is ever planned
    planned_characters: tuple[str, ...]
    # pieces of the text model
    vocab_size: int
    # steps that train the tower alone, before it is frozen; pictures in a batch of those, and what is in them
    vision_steps: int
    vision_batch_size: int
    vision: Mapping[str, Any]
    # test examples of each task that the report is about
    scored_examples: int
    # whether torch.compile fuses what a token meets before and after attention
    compile: bool

    def __post_init__(self) -> None:
        known = {
            *TASKS,
            *(PLAN_PREFIX + task.split(".")[1] for task in TASKS if task.split(".")[0] in ("draw", "edit", "reason")),
        }
        known |= {f"fact.{kind}{level}" for kind in ("math", "map") for level in (1, 2, 3)}
        if lost := sorted({*self.tasks} - {task for task in known if task.split(".")[0] in TEXT_KINDS}):
            raise ValueError(
                f"got tasks {', '.join(lost)}: expected captions, answers, facts and plans of the little world"
            )
        if lost := sorted({*self.planned_characters} - FAVOURITES.keys()):
            raise ValueError(f"got planned {', '.join(lost)}: expected some of {', '.join(FAVOURITES)}")


@dataclass(frozen=True, kw_only=True)
class QwenVLBatch:
    """A pack of conversations with the group of each label, index into TEXTS."""

    pack: PackedBatch
    text_kinds: Tensor


@dataclass(frozen=True, kw_only=True)
class QwenVLVisionBatch:
    """Pictures for the tower alone: patches [N, F] and what is centred in each cell [n, 3]."""

    patches: Tensor
    targets: Tensor


@dataclass(frozen=True, kw_only=True)
class QwenVLDataset:
    """Batches by step: the same for a seed on every machine, and made without the model."""

    options: QwenVLTrainingConfig
    prompts: QwenVLProcessor
    batch_size: int
    seed: int

    def __call__(self, step: int) -> QwenVLBatch | QwenVLVisionBatch:
        if step < self.options.vision_steps:
            return self.vision_batch(step)
        rng = random.Random(f"{self.seed}/{step}/reader")
        tasks = sample_tasks(self.options.tasks, self.batch_size, rng)
        return self.batch([self.training_example(task, step * self.batch_size + i) for i, task in enumerate(tasks)])

    def batch(self, examples: Sequence[Example]) -> QwenVLBatch:
        """Examples as one pack, rounded up with a sample without loss: new shapes cost a CPU more than these rows."""
        samples = [self.prompt_parts(one) for one in examples]
        rows = sum(item.segment.length for items in samples for item in items)
        filler = (
            [[text_part([self.prompts.special_tokens.im_end] * (-rows % ROW_MULTIPLE))]] if rows % ROW_MULTIPLE else []
        )
        return QwenVLBatch(
            pack=pack_sequences([*samples, *filler]),
            text_kinds=kind_indices(TEXT_KINDS, examples, label_counts(samples)),
        )

    def training_example(self, task: str, index: int) -> Example:
        """A training example of a task."""
        if not task.startswith(PLAN_PREFIX):
            return training_example(task, index, seed=self.seed)
        kind = task.removeprefix(PLAN_PREFIX)
        source = next(f"{group}.{kind}" for group in ("draw", "edit", "reason") if f"{group}.{kind}" in TASKS)
        # numbers are skipped until somebody is asked about whose favourites are planned
        tries = (example(source, i, seed=self.seed) for i in count(index, step=10**9))
        one = next(
            one
            for one in tries
            if kind != "favourite" or any(name in one.prompt for name in self.options.planned_characters)
        )
        return replace(one, task=task, answer=scene_in_words(one), target=None)

    def prompt_parts(self, one: Example) -> list[Part]:
        """A question or a prompt, and the labelled words that answer it."""
        assert one.answer is not None, f"{one.task} has no answer"
        return self.prompts.with_answer([user_message(one)], one.answer, system=self.system_prompt(one.task))

    def system_prompt(self, task: str) -> str | None:
        """The system prompt of a task; None for the usual one."""
        return self.options.plan_system_prompt if task.startswith(PLAN_PREFIX) else None

    def vision_batch(self, step: int) -> QwenVLVisionBatch:
        """Pictures of a step, as the tower takes them."""
        look, cell = self.prompts.image_processor, self.prompts.image_processor.merged_patch_size
        options = strict(Looks, self.options.vision, where="looks of the options")
        scenes = ViTDataset(options=options, batch_size=self.options.vision_batch_size, seed=self.seed, patch=cell)(
            step
        )
        side = round((len(scenes.targets) // self.options.vision_batch_size) ** 0.5)
        pixels = rearrange(scenes.patches, "(b h w) (p q c) -> b c (h p) (w q)", h=side, w=side, p=cell, q=cell)
        mean, std = (torch.tensor(values)[:, None, None] for values in (look.mean, look.std))
        frames = repeat(((pixels + 1) / 2 - mean) / std, "b c h w -> b c f h w", f=look.temporal_patch_size)
        order = "b c f (h m p) (w k q) -> (b h w m k) (c f p q)"
        patches = rearrange(frames, order, m=look.merge_size, k=look.merge_size, p=look.patch_size, q=look.patch_size)
        return QwenVLVisionBatch(patches=patches, targets=scenes.targets)


def user_message(one: Example) -> Message:
    """What the user says, with the pictures it is about."""
    return {"role": "user", "content": one.prompt, "images": [Image.fromarray(image) for image in one.images]}


def scene_in_words(one: Example) -> str:
    """The picture that a prompt asks for, in words: sizes and places, in reading order; the last thing may be removed."""
    assert one.target_scene is not None, f"{one.task} ends in no picture"
    return join_phrases(
        [describe(thing, size=True, place=True) for thing in one.target_scene.reading_order()] or ["nothing"]
    )


class QwenVLWithProbe(nn.Module):
    """A reader and, for training only, a linear guess of what is centred in each cell of a picture."""

    def __init__(self, mllm: QwenVL):
        super().__init__()
        self.mllm = mllm
        self.probe = nn.Linear(mllm.config.decoder.dim, sum(len(kind) + 1 for kind in ATTRIBUTE_NAMES))

    def attribute_logits(self, patches: Tensor, n_cells: int) -> tuple[Tensor, ...]:
        """patches [N, F] of square pictures of `cells` cells -> for each kind the logits [n, names + 1]."""
        side = round(n_cells**0.5) * self.mllm.config.vision.spatial_merge_size
        rows = self.mllm.vision(patches, [(1, side, side)] * (len(patches) // side**2))
        return self.probe(rows).split([len(kind) + 1 for kind in ATTRIBUTE_NAMES], -1)


class QwenVLTask:
    """Say what is centred in each cell, then the assistant's words."""

    name = "metaquery-nano-mllm"
    loss_names = TEXT_KINDS + ATTRIBUTES

    def __init__(self, model: QwenVLWithProbe, batch: QwenVLDataset):
        self.model, self.batch = model, batch

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> QwenVLTask:
        """A fresh reader of the recipe's numbers, with a text model of the world's own text."""
        options = strict(QwenVLTrainingConfig, recipe.options, where="options")
        reader = init_qwen2_5_vl(recipe, options)
        if options.compile:
            compile_experts(reader.decoder)
        return cls(
            QwenVLWithProbe(reader),
            QwenVLDataset(options=options, prompts=reader.processor, batch_size=recipe.batch_size, seed=recipe.seed),
        )

    def losses(self, batch: QwenVLBatch | QwenVLVisionBatch) -> dict[str, Tensor]:
        """Mean cross entropy of every kind of thing in a cell, or of every kind of text in the batch."""
        reader = self.model.mllm
        reader.vision.requires_grad_(isinstance(batch, QwenVLVisionBatch))
        if isinstance(batch, QwenVLBatch):
            return mean_by_kind(TEXT_KINDS, batch.text_kinds, reader(batch.pack.to(reader.device)))
        targets = batch.targets.to(reader.device)
        logits = self.model.attribute_logits(
            batch.patches.to(reader.device), len(targets) // self.batch.options.vision_batch_size
        )
        pairs = zip(ATTRIBUTES, logits, targets.unbind(-1), strict=True)
        return {name: F.cross_entropy(guess.float(), target) for name, guess, target in pairs}

    def report(self) -> dict[str, float]:
        """The part of test questions that are answered right, by task."""
        reader, n = self.model.mllm, self.batch.options.scored_examples
        right = {}
        for task in SCORED_TASKS:
            examples = [example(task, i, seed=self.batch.seed, split="test") for i in range(n)]
            answers = reader.chat(
                [[user_message(one)] for one in examples], text_sampling=TextSampling(max_tokens=MAX_ANSWER_TOKENS)
            )
            right[task] = sum(judge(one, answer) for one, answer in zip(examples, answers, strict=True)) / n
        return right

    def sample_image(self) -> Image.Image:
        """A bar for each judged task, as long as the part that is right: this model draws nothing."""
        bars = [np.repeat(np.arange(256)[None] < 256 * part, 12, 0) for part in self.report().values()]
        return Image.fromarray(np.concatenate(bars).astype(np.uint8) * 255)

    def save(self, folder: Path) -> None:
        """The released layout of a Qwen2.5-VL, in bfloat16, and a report."""
        self.model.mllm.save_pretrained(folder, dtype="bfloat16")
        (folder / "report.json").write_text(json.dumps(self.report()) + "\n", encoding="utf-8")


def init_qwen2_5_vl(recipe: TrainConfig, options: QwenVLTrainingConfig) -> QwenVL:
    """An untrained reader of the recipe's numbers: text, vision, pixels."""
    tokenizer = qwen_tokenizer(options)
    ids = {
        name: tokenizer.token_id(token)
        for name, token in zip(QwenSpecialTokens().to_json(), QWEN_TOKENS, strict=True)
    }
    parts = {name: dict(part) for name, part in recipe.model.items()}
    vision = {**parts["vision"], "out_hidden_size": parts["text"]["hidden_size"]}
    files = {**parts["text"], **ids, "vocab_size": tokenizer.backend.vocab_size(), "vision_config": vision}
    torch.manual_seed(recipe.seed)
    reader = QwenVL(QwenVLConfig.from_json(files, parts["pixels"]))
    reader.tokenizer = tokenizer
    init_decoder(reader.decoder)
    # the table is the head, too: its rows begin of length 1, and what stands for a cell about as large
    for weight in (reader.decoder.embed.weight, reader.vision.merger.mlp.fc2.weight):
        nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return reader


def qwen_tokenizer(options: QwenVLTrainingConfig) -> SentencePieceTokenizer:
    """The text model: of the world's text, and of what stands around every prompt."""
    around = [" ".join(("system", *ROLES)), DEFAULT_SYSTEM_PROMPT, options.plan_system_prompt]
    return train_tokenizer(options.vocab_size, extra=around, special_tokens=(IM_START, *QWEN_TOKENS), kind="bpe")
