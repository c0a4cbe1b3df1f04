"""The experiments of Janus's ablation (arXiv 2410.13848, table 5): one encoder or two, one task or two, otherwise alike.

What looks at a picture is exchanged for the codes that it would be drawn with: the model itself knows nothing of this.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unimm.models.janus.model import Janus
from unimm.models.janus.network import Projector
from unimm.tokenizers.semantic_vq import Branch, BranchConfig
from unimm.tokenizers.vq import VQ
from unimm.training.config import Recipe, strict
from unimm.training.init import trained
from unimm.training.tasks.deepseek_chat import DRAWINGS, TEXTS
from unimm.training.tasks.janus import Batch, JanusObjective, fresh, init_aligner
from unimm.training.tasks.janus import Options as Plain


class Looking(nn.Module):
    """In the tower's place: pictures to their codes, and codes to features of `width`; the codes take no gradient."""

    def __init__(
        self, codes: Callable[[Tensor], Tensor], read: nn.Module, *, patch: int, side: int, width: int
    ) -> None:
        super().__init__()
        # a function: what makes codes belongs to the model, and is not to be found here a second time
        self.codes, self.read = codes, read
        self.patch, self.side, self.width = patch, side, width

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] in [-1, 1] -> [B, n, width]"""
        with torch.no_grad():
            codes = self.codes(images)
        return self.read(codes)


class Flat(nn.Module):
    """Codes as they are."""

    def forward(self, codes: Tensor) -> Tensor:
        """codes [B, E, h, w] -> [B, n, E]"""
        return rearrange(codes, "B E h w -> B (h w) E")


@dataclass(frozen=True, kw_only=True)
class Options(Plain):
    """What the recipe's `options` may say: those of Janus, and two more."""

    experiment: Literal["A", "B", "D", "E", "F"]
    # the folder of a trained semantic tokenizer; B alone reads it
    semantic: str


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One row of the table."""

    says: str
    # kinds of samples that are learned
    learns: tuple[str, ...] = TEXTS + DRAWINGS
    # the folder of the VQ tokenizer that draws
    draws: Callable[[Options], str] = lambda options: options.vq
    # what looks in the tower's place, if anything does
    looks: Callable[[VQ, int, Options], Looking] | None = None


def through_codes(vq: VQ, size: int, options: Options) -> Looking:
    """A picture of size * size pixels as the codes that it would be drawn with."""
    return _looking(vq, size, Flat(), vq.config.code_dim)


def through_branch(vq: VQ, size: int, options: Options) -> Looking:
    """The same codes, as a semantic tokenizer's branch reads them."""
    weights = Path(options.semantic) / "semantic.safetensors"
    branch = Branch(BranchConfig.from_files(json.loads(weights.with_name("semantic_config.json").read_text())))
    branch.load_state_dict({name: x.float() for name, x in load_file(weights).items()})
    return _looking(vq, size, branch, branch.config.out_dim)


def _looking(vq: VQ, size: int, read: nn.Module, width: int) -> Looking:
    patch = vq.config.stride
    side = size // patch

    def codes(images: Tensor) -> Tensor:
        return vq.quantize.lookup(vq.ids(images), (side, side))

    return Looking(codes, read, patch=patch, side=side, width=width)


def semantic_folder(options: Options) -> str:
    """The folder of the semantic tokenizer, with the codes that it reads."""
    return str(trained(options.semantic, "semantic.safetensors", "janus-nano-semantic").parent)


EXPERIMENTS = {
    "A": Experiment(says="one VQ tokenizer for both", looks=through_codes),
    "B": Experiment(says="one semantic tokenizer for both", looks=through_branch, draws=semantic_folder),
    "D": Experiment(says="a tower and a VQ tokenizer"),
    "E": Experiment(says="D, understanding only", learns=TEXTS),
    "F": Experiment(says="D, drawing only", learns=DRAWINGS),
}


class DecouplingObjective:
    """Janus on the little world, as one of the experiments has it."""

    name = "decoupling"
    loss_names = JanusObjective.loss_names

    def __init__(self, janus: JanusObjective, experiment: Experiment) -> None:
        self.janus, self.experiment = janus, experiment
        self.model, self.batch = janus.model, janus.batch

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> DecouplingObjective:
        """A fresh model: equal seeds begin with equal language models, whatever looks."""
        options = strict(Options, recipe.options, where="options")
        experiment = EXPERIMENTS[options.experiment]
        tasks = {task: n for task, n in options.tasks.items() if task.split(".")[0] in experiment.learns}
        if not tasks:
            raise ValueError(
                f"experiment {options.experiment} learns {experiment.learns}: expected some of these in tasks"
            )
        options = replace(options, tasks=tasks, vq=experiment.draws(options))
        model = fresh(recipe, options)
        if experiment.looks is not None:
            exchange(model, experiment.looks(model.vq, model.cfg.tower.size, options))
        janus = JanusObjective.of(model, recipe, options)
        # at the rate of a fresh decoder, a trained encoder forgets what it sees: in no experiment is it trained
        model.vision.requires_grad_(False)
        return cls(janus, experiment)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Mean cross entropy of every kind of sample in the batch."""
        return self.janus.losses(batch)

    def picture(self) -> Image.Image:
        """A sheet of test prompts drawn."""
        return self.janus.picture()

    def save(self, folder: Path) -> None:
        """The released layout in bfloat16 where there is a tower; no release looks through its codes, so else our names."""
        if self.experiment.looks is None:
            self.janus.save(folder)
        else:
            state = {
                name: x.detach().to(torch.bfloat16).contiguous().cpu() for name, x in self.model.named_parameters()
            }
            save_file(state, folder / "decoupling.safetensors")


def exchange(model: Janus, looking: Looking) -> None:
    """Give a fresh model something else to look through, and an aligner of its width."""
    model.add_module("vision", looking)
    model.aligner = Projector(replace(model.cfg.aligner, dim_in=looking.width))
    init_aligner(model.aligner)
