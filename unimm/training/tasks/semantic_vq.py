"""Training the semantic tokenizer: a VQ autoencoder's losses, and those of predicting a frozen encoder's features."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor, nn

from unimm.checkpoint.json_files import write_json
from unimm.checkpoint.load import check_not_interrupted, parse_dtype
from unimm.checkpoint.save import own_state_dict, save_safetensors
from unimm.data.shapes.scenes import SCORING_BATCH, held_out_scenes
from unimm.encoders.siglip import SiglipConfig, SiglipNaViT, navit_config_from_json
from unimm.encoders.timm_vit import TimmEncoderConfig, TimmVisionEncoder
from unimm.nn.pos_embed import grid_position_ids
from unimm.tokenizers.semantic_vq import SemanticBranchConfig, SemanticVQ
from unimm.training.config import RecipeSection, TrainConfig, from_mapping
from unimm.training.fields import held_out_seed
from unimm.training.init import load_trained
from unimm.training.losses import LossSum
from unimm.training.tasks.vq import (
    VQArchitecture,
    VQBatch,
    VQDataset,
    VQLosses,
    VQTask,
    VQTrainingConfig,
    reconstruction_grid,
    save_vq,
    starting_vq,
    vq_report,
)

TEACHER_FILE = "vision.safetensors"


class Teacher(Protocol):
    """A frozen encoder: image [B, 3, H, W] in [-1, 1] -> features [B, F, h, w], on any grid; `out_dim` is F."""

    out_dim: int

    def __call__(self, image: Tensor) -> Tensor: ...

    def to(self, device: torch.device) -> Any:
        """Move to a device, in place."""


class NaViTTeacher(nn.Module):
    """A ViT of ours, as the recipe bagel-nano-vit trains it."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.config = config
        self.out_dim = config.dim
        self.vision = SiglipNaViT(config)

    def forward(self, image: Tensor) -> Tensor:
        p = self.config.patch_size
        height = image.shape[2] // p
        width = image.shape[3] // p
        position_ids = grid_position_ids(height, width, self.config.grid_side).to(image.device)
        patches = rearrange(image, "B C (h p) (w q) -> (B h w) (p q C)", p=p, q=p)
        features = self.vision(patches, repeat(position_ids, "n -> (B n)", B=len(image)), [height * width] * len(image))
        return rearrange(features, "(B h w) F -> B F h w", h=height, w=width)


class TimmViTTeacher(nn.Module):
    """An encoder of timm's, for square images of one size: SigLIP, as Janus understands images through it."""

    def __init__(self, config: TimmEncoderConfig) -> None:
        super().__init__()
        self.vision = TimmVisionEncoder(config)
        self.out_dim: int = self.vision.trunk.num_features

    def forward(self, image: Tensor) -> Tensor:
        return rearrange(self.vision(image), "B (h w) F -> B F h w", h=self.vision.grid_side)


def load_teacher(files: Mapping[str, Any], folder: Path) -> NaViTTeacher | TimmViTTeacher:
    """The encoder in folder/vision.safetensors, frozen. Raises ValueError where there is none.

    files: the keys of a released vit_config.json for one of ours, which has one layer fewer; the params of a released
    vision_config, known by `model_name`, for one of timm's.
    """
    if not (folder / TEACHER_FILE).is_file():
        raise ValueError(
            f"no {TEACHER_FILE} in {folder}: run `unimm train bagel-nano-vit {folder.parent}`, or name the folder of "
            "another encoder as the recipe's teacher"
        )
    check_not_interrupted(folder)
    if "model_name" in files:
        teacher: NaViTTeacher | TimmViTTeacher = TimmViTTeacher(TimmEncoderConfig.from_json(files))
    else:
        teacher = NaViTTeacher(navit_config_from_json(files))
    # a file of timm's has timm's names, which ours have inside of `trunk`
    load_trained(teacher.vision, folder / TEACHER_FILE, prefix="trunk." if "model_name" in files else "")
    return teacher.eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class SemanticVQTrainingConfig(VQTrainingConfig):
    """The recipe's `options`: those of a VQ autoencoder, and the folder of the teacher's vision.safetensors."""

    teacher: str


@dataclass(frozen=True, kw_only=True)
class SemanticVQSections(RecipeSection):
    """The recipe's `model`: sections for its three parts."""

    vq: Mapping[str, Any]
    # numbers of SemanticBranchConfig, but for the two widths that follow from the others
    branch: Mapping[str, Any]
    teacher: Mapping[str, Any]


class SemanticVQTask:
    """Reconstruct images through a codebook, and predict the teacher's features from the codes."""

    name = "semantic"
    # cosine: 1 - the cosine of predicted and true features; features: their mean squared difference
    loss_names = (*VQTask.loss_names, "cosine", "features")

    def __init__(
        self, model: SemanticVQ, teacher: Teacher, options: SemanticVQTrainingConfig, recipe: TrainConfig
    ) -> None:
        self.model = model
        self.teacher = teacher
        self.options = options
        self.compute_losses = VQLosses(model.vq, options, recipe)
        self.batch = VQDataset(options=options, batch_size=recipe.batch_size, seed=recipe.seed)

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> SemanticVQTask:
        """Build a branch of the recipe's numbers on an untrained or a trained VQ autoencoder."""
        sections = from_mapping(SemanticVQSections, recipe.model, where="model of the recipe")
        options = from_mapping(SemanticVQTrainingConfig, recipe.options, where="options of the recipe")
        teacher = load_teacher(sections.teacher, Path(options.teacher))
        config = from_mapping(VQArchitecture, sections.vq, where="vq of the model").config()
        widths = {"code_dim": config.code_dim, "out_dim": teacher.out_dim}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = SemanticVQ(config, SemanticBranchConfig.from_json({**sections.branch, **widths}))
        model.vq = starting_vq(config, options, recipe.seed)
        return cls(model, teacher, options, recipe)

    def losses(self, batch: VQBatch) -> dict[str, LossSum]:
        """Losses by name."""
        image = batch.image.to(next(self.model.parameters()).device)
        losses, codes = self.compute_losses(image, batch.number)
        predicted = self.model.branch(codes).float()
        features = self.teacher_features(image, (codes.shape[2], codes.shape[3]))
        losses["cosine"] = LossSum.over(1 - F.cosine_similarity(predicted, features, dim=-1))
        losses["features"] = LossSum.over((predicted - features).square())
        return losses

    def loss_counts(self, batch: VQBatch) -> dict[str, int]:
        """Those of a VQ autoencoder, the number of features and that of their elements."""
        counts = self.compute_losses.counts(batch.image, batch.number)
        stride = self.model.vq.config.stride
        n = len(batch.image) * (batch.image.shape[2] // stride) * (batch.image.shape[3] // stride)
        return counts | {"cosine": n, "features": n * self.teacher.out_dim}

    @torch.no_grad()
    def teacher_features(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """image [B, 3, H, W] -> the teacher's features [B, n, F] on the grid of codes, of the patch around each."""
        self.teacher.to(image.device)
        features = F.interpolate(self.teacher(image).float(), grid, mode="nearest")
        return rearrange(features, "B F h w -> B (h w) F")

    @property
    def held_out_batch(self) -> VQDataset:
        """Batches of scenes that no run trains on."""
        return replace(self.batch, seed=held_out_seed(self.batch.seed))

    def sample_image(self) -> Image.Image:
        """Test scenes and augmented train scenes, each above their reconstructions."""
        return reconstruction_grid(self.model.vq, self.batch)

    def save(self, folder: Path) -> None:
        """Write the autoencoder as its own task does, and semantic.safetensors and semantic_config.json."""
        dtype = parse_dtype(self.options.dtype)
        save_vq(self.model.vq, folder, dtype)
        branch = {name: x.to(dtype) for name, x in own_state_dict(self.model.branch).items()}
        save_safetensors(branch, folder / "semantic.safetensors")
        config = json.dumps(self.model.branch.config.to_json(), indent=1)
        (folder / "semantic_config.json").write_text(config + "\n", encoding="utf-8")
        report = vq_report(self.model.vq, self.options, self.batch.seed) | self.report()
        write_json(folder / "report.json", report, indent=None)

    def report(self) -> dict[str, float]:
        """Mean cosine of predicted and true features of test scenes; and of the mean feature, the best blind guess."""
        predicted = []
        features = []
        image = held_out_scenes(self.options.tasks, self.options.scored_scenes, self.batch.seed)[1]
        device = next(self.model.parameters()).device
        for part in image.to(device).split(SCORING_BATCH):
            stride = self.model.vq.config.stride
            grid = (part.shape[2] // stride, part.shape[3] // stride)
            predicted.append(self.model.features(self.model.vq.encode_ids(part), grid=grid).float().cpu())
            features.append(self.teacher_features(part, grid).cpu())
        expected = torch.cat(features)
        blind = expected.mean((0, 1), keepdim=True)
        return {
            "cosine": F.cosine_similarity(torch.cat(predicted), expected, dim=-1).mean().item(),
            "cosine_blind": F.cosine_similarity(blind, expected, dim=-1).mean().item(),
        }
