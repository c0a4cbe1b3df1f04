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
from unimm.tokenizers.semantic_vq import SemanticBranch, SemanticBranchConfig
from unimm.tokenizers.vq import VQModel
from unimm.training.config import TrainConfig, from_mapping
from unimm.training.init import trained_file
from unimm.training.tasks.deepseek_chat import IMAGE_KINDS, TEXT_KINDS
from unimm.training.tasks.janus import JanusBatch, JanusTask, init_janus, init_projector
from unimm.training.tasks.janus import JanusTrainingConfig as Plain


class CodeEncoder(nn.Module):
    """In the tower's place: pictures to their codes, and codes to features of `width`; the codes take no gradient."""

    def __init__(
        self, codes: Callable[[Tensor], Tensor], read: nn.Module, *, patch: int, side: int, width: int
    ) -> None:
        super().__init__()
        # a function: what makes codes belongs to the model, and is not to be found here a second time
        self.encode, self.projector = codes, read
        self.patch, self.side, self.width = patch, side, width

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] in [-1, 1] -> [B, n, width]"""
        with torch.no_grad():
            codes = self.encode(images)
        return self.projector(codes)


class FlattenCodes(nn.Module):
    """Codes as they are."""

    def forward(self, codes: Tensor) -> Tensor:
        """codes [B, E, h, w] -> [B, n, E]"""
        return rearrange(codes, "B E h w -> B (h w) E")


@dataclass(frozen=True, kw_only=True)
class DecouplingTrainingConfig(Plain):
    """What the recipe's `options` may say: those of Janus, and two more."""

    experiment: Literal["A", "B", "D", "E", "F"]
    # the folder of a trained semantic tokenizer; B alone reads it
    semantic: str


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One row of the table."""

    description: str
    # kinds of samples that are learned
    kinds: tuple[str, ...] = TEXT_KINDS + IMAGE_KINDS
    # the folder of the VQ tokenizer that draws
    vq_folder: Callable[[DecouplingTrainingConfig], str] = lambda options: options.vq
    # what looks in the tower's place, if anything does
    encoder: Callable[[VQModel, int, DecouplingTrainingConfig], CodeEncoder] | None = None


def vq_encoder(vq: VQModel, size: int, options: DecouplingTrainingConfig) -> CodeEncoder:
    """A picture of size * size pixels as the codes that it would be drawn with."""
    return _code_encoder(vq, size, FlattenCodes(), vq.config.code_dim)


def semantic_encoder(vq: VQModel, size: int, options: DecouplingTrainingConfig) -> CodeEncoder:
    """The same codes, as a semantic tokenizer's branch reads them."""
    weights = Path(options.semantic) / "semantic.safetensors"
    branch = SemanticBranch(
        SemanticBranchConfig.from_json(json.loads(weights.with_name("semantic_config.json").read_text()))
    )
    branch.load_state_dict({name: x.float() for name, x in load_file(weights).items()})
    return _code_encoder(vq, size, branch, branch.config.out_dim)


def _code_encoder(vq: VQModel, size: int, read: nn.Module, width: int) -> CodeEncoder:
    patch = vq.config.stride
    side = size // patch

    def codes(images: Tensor) -> Tensor:
        return vq.quantize.lookup(vq.encode_ids(images), (side, side))

    return CodeEncoder(codes, read, patch=patch, side=side, width=width)


def semantic_folder(options: DecouplingTrainingConfig) -> str:
    """The folder of the semantic tokenizer, with the codes that it reads."""
    return str(trained_file(options.semantic, "semantic.safetensors", "janus-nano-semantic").parent)


EXPERIMENTS = {
    "A": Experiment(description="one VQ tokenizer for both", encoder=vq_encoder),
    "B": Experiment(description="one semantic tokenizer for both", encoder=semantic_encoder, vq_folder=semantic_folder),
    "D": Experiment(description="a tower and a VQ tokenizer"),
    "E": Experiment(description="D, understanding only", kinds=TEXT_KINDS),
    "F": Experiment(description="D, drawing only", kinds=IMAGE_KINDS),
}


class DecouplingTask:
    """Janus on the little world, as one of the experiments has it."""

    name = "decoupling"
    loss_names = JanusTask.loss_names

    def __init__(self, janus: JanusTask, experiment: Experiment) -> None:
        self.janus_task, self.experiment = janus, experiment
        self.model, self.batch = janus.model, janus.batch

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> DecouplingTask:
        """A fresh model: equal seeds begin with equal language models, whatever looks."""
        options = from_mapping(DecouplingTrainingConfig, recipe.options, where="options")
        experiment = EXPERIMENTS[options.experiment]
        tasks = {task: n for task, n in options.tasks.items() if task.split(".")[0] in experiment.kinds}
        if not tasks:
            raise ValueError(
                f"experiment {options.experiment} learns {experiment.kinds}: expected some of these in tasks"
            )
        options = replace(options, tasks=tasks, vq=experiment.vq_folder(options))
        model = init_janus(recipe, options)
        if experiment.encoder is not None:
            replace_encoder(model, experiment.encoder(model.vq, model.config.vision.image_size, options))
        janus = JanusTask.from_model(model, recipe, options)
        # at the rate of a fresh decoder, a trained encoder forgets what it sees: in no experiment is it trained
        model.vision.requires_grad_(False)
        return cls(janus, experiment)

    def losses(self, batch: JanusBatch) -> dict[str, Tensor]:
        """Mean cross entropy of every kind of sample in the batch."""
        return self.janus_task.losses(batch)

    def sample_image(self) -> Image.Image:
        """A sheet of test prompts drawn."""
        return self.janus_task.sample_image()

    def save(self, folder: Path) -> None:
        """The released layout in bfloat16 where there is a tower; no release looks through its codes, so else our names."""
        if self.experiment.encoder is None:
            self.janus_task.save(folder)
        else:
            state = {
                name: x.detach().to(torch.bfloat16).contiguous().cpu() for name, x in self.model.named_parameters()
            }
            save_file(state, folder / "decoupling.safetensors")


def replace_encoder(model: Janus, looking: CodeEncoder) -> None:
    """Give a fresh model something else to look through, and an aligner of its width."""
    model.add_module("vision", looking)
    model.aligner = Projector(replace(model.config.aligner, dim_in=looking.width))
    init_projector(model.aligner)
