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

from unimm.data.batching import ROUND_ROWS, by_group, dealt, groups, labels, taken
from unimm.data.shapes import TASKS, Example, example, judge
from unimm.data.shapes.language import FAVOURITES, joined, phrase
from unimm.generation.text_sampling import TextSampling
from unimm.processing.requests import Turn
from unimm.sequence.packing import Pack, pack
from unimm.sequence.parts import Item, text_item
from unimm.tokenizers.text import SentencePieceTokenizer
from unimm.training.config import Recipe, strict
from unimm.training.init import compile_streams, init_decoder, text_model
from unimm.training.tasks.vit import KINDS, Scenes
from unimm.training.tasks.vit import Options as Looks
from unimm.vlms.qwen2_5_vl.config import QwenMarkers, QwenVLConfig
from unimm.vlms.qwen2_5_vl.model import QwenVL
from unimm.vlms.qwen2_5_vl.processor import END, PLACEHOLDER, ROLES, START, SYSTEM, QwenPrompts

# a loss for each kind of text, and for each thing that is asked about a cell
TEXTS = ("caption", "answer", "fact", "plan")
SEEN = ("shape", "colour", "size")
# in the order of QwenMarkers
MARKERS = (END, "<|vision_start|>", "<|vision_end|>", PLACEHOLDER, "<|video_pad|>")
PLAN = "plan."
ANSWER = 12  # ids, more than any judged answer has
JUDGED = ("answer.count", "answer.colour", "answer.shape", "answer.relation", "fact.forward", "fact.inverse")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the recipe's `options` may say."""

    # samples of each task in a batch, or their weights (training/tasks.py). plan.X asks of the
    # prompt of draw.X, edit.X or reason.X what the picture holds, in words
    tasks: Mapping[str, int]
    # the system prompt of plans; that of the painter that will be built around the reader should say the same
    plan: str
    # whose favourites are planned, too: of the other characters single facts are told and nothing is ever planned
    planned: tuple[str, ...]
    # pieces of the text model
    vocabulary: int
    # steps that train the tower alone, before it is frozen; pictures in a batch of those, and what is in them
    sighted: int
    looked: int
    looks: Mapping[str, Any]
    # test examples of each task that the report is about
    judged: int
    # whether torch.compile fuses what a token meets before and after attention
    compiled: bool

    def __post_init__(self) -> None:
        known = {
            *TASKS,
            *(PLAN + task.split(".")[1] for task in TASKS if task.split(".")[0] in ("draw", "edit", "reason")),
        }
        known |= {f"fact.{kind}{level}" for kind in ("math", "map") for level in (1, 2, 3)}
        if lost := sorted({*self.tasks} - {task for task in known if task.split(".")[0] in TEXTS}):
            raise ValueError(
                f"got tasks {', '.join(lost)}: expected captions, answers, facts and plans of the little world"
            )
        if lost := sorted({*self.planned} - FAVOURITES.keys()):
            raise ValueError(f"got planned {', '.join(lost)}: expected some of {', '.join(FAVOURITES)}")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A pack of conversations with the group of each label, index into TEXTS."""

    pack: Pack
    text_groups: Tensor


@dataclass(frozen=True, kw_only=True)
class Sights:
    """Pictures for the tower alone: patches [N, F] and what is centred in each cell [n, 3]."""

    patches: Tensor
    targets: Tensor


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """Batches by step: the same for a seed on every machine, and made without the model."""

    options: Options
    prompts: QwenPrompts
    size: int
    seed: int

    def __call__(self, step: int) -> Batch | Sights:
        if step < self.options.sighted:
            return self.looked(step)
        dice = random.Random(f"{self.seed}/{step}/reader")
        tasks = dealt(self.options.tasks, self.size, dice)
        return self.batch([self.taken(task, step * self.size + i) for i, task in enumerate(tasks)])

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Examples as one pack, rounded up with a sample without loss: new shapes cost a CPU more than these rows."""
        samples = [self.asked(one) for one in examples]
        rows = sum(item.segment.length for items in samples for item in items)
        filler = [[text_item([self.prompts.markers.end] * (-rows % ROUND_ROWS))]] if rows % ROUND_ROWS else []
        return Batch(pack=pack([*samples, *filler]), text_groups=groups(TEXTS, examples, labels(samples)))

    def taken(self, task: str, index: int) -> Example:
        """A training example of a task."""
        if not task.startswith(PLAN):
            return taken(task, index, seed=self.seed)
        kind = task.removeprefix(PLAN)
        source = next(f"{group}.{kind}" for group in ("draw", "edit", "reason") if f"{group}.{kind}" in TASKS)
        # numbers are skipped until somebody is asked about whose favourites are planned
        tries = (example(source, i, seed=self.seed) for i in count(index, step=10**9))
        one = next(
            one for one in tries if kind != "favourite" or any(name in one.prompt for name in self.options.planned)
        )
        return replace(one, task=task, answer=plan(one), target=None)

    def asked(self, one: Example) -> list[Item]:
        """A question or a prompt, and the labelled words that answer it."""
        assert one.answer is not None, f"{one.task} has no answer"
        return self.prompts.answered([turn(one)], one.answer, system=self.system(one.task))

    def system(self, task: str) -> str | None:
        """The system prompt of a task; None for the usual one."""
        return self.options.plan if task.startswith(PLAN) else None

    def looked(self, step: int) -> Sights:
        """Pictures of a step, as the tower takes them."""
        look, cell = self.prompts.pixels, self.prompts.pixels.cell
        options = strict(Looks, self.options.looks, where="looks of the options")
        scenes = Scenes(options=options, size=self.options.looked, seed=self.seed, patch=cell)(step)
        side = round((len(scenes.targets) // self.options.looked) ** 0.5)
        pixels = rearrange(scenes.patches, "(b h w) (p q c) -> b c (h p) (w q)", h=side, w=side, p=cell, q=cell)
        mean, std = (torch.tensor(values)[:, None, None] for values in (look.mean, look.std))
        frames = repeat(((pixels + 1) / 2 - mean) / std, "b c h w -> b c f h w", f=look.frames)
        order = "b c f (h m p) (w k q) -> (b h w m k) (c f p q)"
        patches = rearrange(frames, order, m=look.merge, k=look.merge, p=look.patch, q=look.patch)
        return Sights(patches=patches, targets=scenes.targets)


def turn(one: Example) -> Turn:
    """What the user says, with the pictures it is about."""
    return {"role": "user", "content": one.prompt, "images": [Image.fromarray(image) for image in one.images]}


def plan(one: Example) -> str:
    """The picture that a prompt asks for, in words: sizes and places, in reading order; the last thing may be removed."""
    assert one.after is not None, f"{one.task} ends in no picture"
    return joined([phrase(thing, size=True, place=True) for thing in one.after.reading_order()] or ["nothing"])


class Taught(nn.Module):
    """A reader and, for training only, a linear guess of what is centred in each cell of a picture."""

    def __init__(self, reader: QwenVL):
        super().__init__()
        self.reader = reader
        self.guess = nn.Linear(reader.cfg.decoder.dim, sum(len(kind) + 1 for kind in KINDS))

    def seen(self, patches: Tensor, cells: int) -> tuple[Tensor, ...]:
        """patches [N, F] of square pictures of `cells` cells -> for each kind the logits [n, names + 1]."""
        side = round(cells**0.5) * self.reader.cfg.vision.merge
        rows = self.reader.vision(patches, [(1, side, side)] * (len(patches) // side**2))
        return self.guess(rows).split([len(kind) + 1 for kind in KINDS], -1)


class ReaderObjective:
    """Say what is centred in each cell, then the assistant's words."""

    name = "metaquery-nano-reader"
    loss_names = TEXTS + SEEN

    def __init__(self, model: Taught, batch: Lessons):
        self.model, self.batch = model, batch

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> ReaderObjective:
        """A fresh reader of the recipe's numbers, with a text model of the world's own text."""
        options = strict(Options, recipe.options, where="options")
        reader = fresh(recipe, options)
        if options.compiled:
            compile_streams(reader.decoder)
        return cls(
            Taught(reader), Lessons(options=options, prompts=reader.prompts, size=recipe.batch, seed=recipe.seed)
        )

    def losses(self, batch: Batch | Sights) -> dict[str, Tensor]:
        """Mean cross entropy of every kind of thing in a cell, or of every kind of text in the batch."""
        reader = self.model.reader
        reader.vision.requires_grad_(isinstance(batch, Sights))
        if isinstance(batch, Batch):
            return by_group(TEXTS, batch.text_groups, reader(batch.pack.to(reader.device)))
        targets = batch.targets.to(reader.device)
        logits = self.model.seen(batch.patches.to(reader.device), len(targets) // self.batch.options.looked)
        pairs = zip(SEEN, logits, targets.unbind(-1), strict=True)
        return {name: F.cross_entropy(guess.float(), target) for name, guess, target in pairs}

    def report(self) -> dict[str, float]:
        """The part of test questions that are answered right, by task."""
        reader, n = self.model.reader, self.batch.options.judged
        right = {}
        for task in JUDGED:
            examples = [example(task, i, seed=self.batch.seed, split="test") for i in range(n)]
            answers = reader.chat([[turn(one)] for one in examples], text=TextSampling(max_tokens=ANSWER))
            right[task] = sum(judge(one, answer) for one, answer in zip(examples, answers, strict=True)) / n
        return right

    def picture(self) -> Image.Image:
        """A bar for each judged task, as long as the part that is right: this model draws nothing."""
        bars = [np.repeat(np.arange(256)[None] < 256 * part, 12, 0) for part in self.report().values()]
        return Image.fromarray(np.concatenate(bars).astype(np.uint8) * 255)

    def save(self, folder: Path) -> None:
        """The released layout of a Qwen2.5-VL, in bfloat16, and a report."""
        self.model.reader.save_pretrained(folder, dtype="bfloat16")
        (folder / "report.json").write_text(json.dumps(self.report()) + "\n", encoding="utf-8")


def fresh(recipe: Recipe, options: Options) -> QwenVL:
    """An untrained reader of the recipe's numbers: text, vision, pixels."""
    tokenizer = words(options)
    ids = {name: tokenizer.id(token) for name, token in zip(QwenMarkers.FILES.values(), MARKERS, strict=True)}
    parts = {name: dict(part) for name, part in recipe.model.items()}
    vision = {**parts["vision"], "out_hidden_size": parts["text"]["hidden_size"]}
    files = {**parts["text"], **ids, "vocab_size": tokenizer.inner.vocab_size(), "vision_config": vision}
    torch.manual_seed(recipe.seed)
    reader = QwenVL(QwenVLConfig.from_files(files, parts["pixels"]))
    reader.tokenizer = tokenizer
    init_decoder(reader.decoder)
    # the table is the head, too: its rows begin of length 1, and what stands for a cell about as large
    for weight in (reader.decoder.embed.weight, reader.vision.merger.mlp.fc2.weight):
        nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return reader


def words(options: Options) -> SentencePieceTokenizer:
    """The text model: of the world's text, and of what stands around every prompt."""
    around = [" ".join(("system", *ROLES)), SYSTEM, options.plan]
    return text_model(options.vocabulary, extra=around, markers=(START, *MARKERS), kind="bpe")
