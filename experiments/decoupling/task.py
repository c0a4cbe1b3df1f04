"""The experiments of Janus's ablation (arXiv 2410.13848, table 5): one encoder or two, one task or two, otherwise
alike.

Where there is one, the vision encoder is replaced by the image tokenizer that generation uses; the rest of the model is
unchanged.
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
from unimm.training.losses import LossSum
from unimm.training.tasks.deepseek_chat import IMAGE_KINDS, TEXT_KINDS
from unimm.training.tasks.janus import JanusBatch, JanusTask, JanusTrainingConfig, init_janus, init_projector


class CodeEncoder(nn.Module):
    """A vision encoder that quantizes images and projects the codes to `width`; no gradient passes the codes."""

    def __init__(
        self, encode: Callable[[Tensor], Tensor], projector: nn.Module, *, patch_size: int, grid_side: int, width: int
    ) -> None:
        super().__init__()
        # a function: the image tokenizer is a part of the model, and must not be registered here again
        self.encode = encode
        self.projector = projector
        self.patch_size = patch_size
        self.grid_side = grid_side
        self.width = width

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] in [-1, 1] -> features [B, n, width]"""
        with torch.no_grad():
            codes = self.encode(images)
        return self.projector(codes)


class FlattenCodes(nn.Module):
    """Codes as features, without weights."""

    def forward(self, codes: Tensor) -> Tensor:
        """codes [B, C, h, w] -> [B, n, C]"""
        return rearrange(codes, "B C h w -> B (h w) C")


@dataclass(frozen=True, kw_only=True)
class DecouplingTrainingConfig(JanusTrainingConfig):
    """The recipe's `options`: those of Janus, and two more."""

    experiment: Literal["A", "B", "D", "E", "F"]
    # the folder of a trained semantic tokenizer; B alone uses it
    semantic: str


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One row of the table."""

    description: str
    # kinds of samples that are learned
    kinds: tuple[str, ...] = TEXT_KINDS + IMAGE_KINDS
    # the folder of the VQ tokenizer of generation
    vq_folder: Callable[[DecouplingTrainingConfig], str] = lambda options: options.vq
    # what replaces the vision encoder, if anything does, given the VQ tokenizer and the images' size
    encoder: Callable[[VQModel, int, DecouplingTrainingConfig], CodeEncoder] | None = None


def vq_encoder(vq: VQModel, size: int, options: DecouplingTrainingConfig) -> CodeEncoder:
    """An encoder of images of size * size pixels to their VQ codes."""
    return _code_encoder(vq, size, FlattenCodes(), vq.config.code_dim)


def semantic_encoder(vq: VQModel, size: int, options: DecouplingTrainingConfig) -> CodeEncoder:
    """An encoder of images to the features that a semantic tokenizer's branch computes from their codes."""
    weights = Path(options.semantic) / "semantic.safetensors"
    config = json.loads(weights.with_name("semantic_config.json").read_text())
    branch = SemanticBranch(SemanticBranchConfig.from_json(config))
    branch.load_state_dict({name: x.float() for name, x in load_file(weights).items()})
    return _code_encoder(vq, size, branch, branch.config.out_dim)


def _code_encoder(vq: VQModel, size: int, projector: nn.Module, width: int) -> CodeEncoder:
    patch_size = vq.config.stride
    side = size // patch_size

    def encode(images: Tensor) -> Tensor:
        return vq.quantize.lookup(vq.encode_ids(images), (side, side))

    return CodeEncoder(encode, projector, patch_size=patch_size, grid_side=side, width=width)


def semantic_folder(options: DecouplingTrainingConfig) -> str:
    """The folder of the semantic tokenizer, with the VQ codes that it was trained on."""
    return str(trained_file(options.semantic, "semantic.safetensors", "janus-nano-semantic").parent)


EXPERIMENTS = {
    "A": Experiment(description="one VQ tokenizer for both", encoder=vq_encoder),
    "B": Experiment(description="one semantic tokenizer for both", encoder=semantic_encoder, vq_folder=semantic_folder),
    "D": Experiment(description="a vision encoder and a VQ tokenizer"),
    "E": Experiment(description="D, understanding only", kinds=TEXT_KINDS),
    "F": Experiment(description="D, generation only", kinds=IMAGE_KINDS),
}


class DecouplingTask:
    """Janus on the shapes world, as one of the experiments has it."""

    name = "decoupling"
    loss_names = JanusTask.loss_names

    def __init__(self, janus: JanusTask, experiment: Experiment) -> None:
        self.janus_task = janus
        self.experiment = experiment
        self.model = janus.model
        self.batch = janus.batch

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> DecouplingTask:
        """Build a model of the recipe's numbers: equal seeds begin with equal decoders, whatever encodes the images."""
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
        # at the learning rate of an untrained decoder, a trained encoder forgets: no experiment trains it
        model.vision.requires_grad_(False)
        return cls(janus, experiment)

    def losses(self, batch: JanusBatch) -> dict[str, LossSum]:
        """Cross entropy of every kind of sample in the batch."""
        return self.janus_task.losses(batch)

    def loss_counts(self, batch: JanusBatch) -> dict[str, int]:
        """How many rows of the batch have each loss."""
        return self.janus_task.loss_counts(batch)

    def sample_image(self) -> Image.Image:
        """Images of test prompts."""
        return self.janus_task.sample_image()

    def save(self, folder: Path) -> None:
        """Write the released layout in bfloat16 if the vision encoder was kept, which it asks for; else our names."""
        if self.experiment.encoder is None:
            self.janus_task.save(folder)
            return
        weights = self.model.named_parameters()
        state = {name: x.detach().to(torch.bfloat16).contiguous().cpu() for name, x in weights}
        save_file(state, folder / "decoupling.safetensors")


def replace_encoder(model: Janus, encoder: CodeEncoder) -> None:
    """Give an untrained model another vision encoder, and a projector of its width."""
    model.add_module("vision", encoder)
    model.aligner = Projector(replace(model.config.aligner, dim_in=encoder.width))
    init_projector(model.aligner)
