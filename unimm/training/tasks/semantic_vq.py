"""Training the semantic tokenizer: the losses of a VQ autoencoder, and to say what a frozen encoder sees at every code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unimm.data.shapes.scenes import SCORING_BATCH, test_scenes
from unimm.encoders.siglip import SiglipConfig, SiglipNaViT, navit_config_from_json
from unimm.encoders.timm_vit import TimmEncoderConfig, TimmVisionEncoder
from unimm.nn.patches import grid_position_ids
from unimm.tokenizers.semantic_vq import SemanticBranchConfig, SemanticVQ
from unimm.training.config import TrainConfig, strict
from unimm.training.tasks import vq as plain
from unimm.training.tasks.kl_vae import DTYPES

TEACHER_FILE = "vision.safetensors"


class Teacher(Protocol):
    """A frozen encoder: image [B, 3, H, W] in [-1, 1] -> features [B, F, h', w'], on any grid; `out_dim` is F."""

    out_dim: int

    def __call__(self, image: Tensor) -> Tensor: ...

    def to(self, device: torch.device) -> Any:
        """Move to a device, in place."""


class NaViTTeacher(nn.Module):
    """A ViT of ours, as the recipe bagel-nano-vit trains it."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.config, self.out_dim = config, config.dim
        self.vision = SiglipNaViT(config)

    def forward(self, image: Tensor) -> Tensor:
        p = self.config.patch_size
        height, width = image.shape[2] // p, image.shape[3] // p
        where = grid_position_ids(height, width, self.config.grid_side).to(image.device)
        patches = rearrange(image, "B C (h p) (w q) -> (B h w) (p q C)", p=p, q=p)
        seen = self.vision(patches, repeat(where, "n -> (B n)", B=len(image)), [height * width] * len(image))
        return rearrange(seen, "(B h w) F -> B F h w", h=height, w=width)


class TimmViTTeacher(nn.Module):
    """An encoder of timm's, for square pictures of one size: SigLIP, as Janus looks through it."""

    def __init__(self, config: TimmEncoderConfig) -> None:
        super().__init__()
        self.vision = TimmVisionEncoder(config)
        self.out_dim: int = self.vision.trunk.num_features

    def forward(self, image: Tensor) -> Tensor:
        return rearrange(self.vision(image), "B (h w) F -> B F h w", h=self.vision.grid_side)


def load_teacher(files: Mapping[str, Any], folder: Path) -> NaViTTeacher | TimmViTTeacher:
    """The encoder in folder/vision.safetensors, frozen.

    files: the keys of a released vit_config.json for one of ours, whose layers are one fewer than they say; the params of
    a released vision_config, known by `model_name`, for one of timm's.
    """
    if not (folder / TEACHER_FILE).is_file():
        raise ValueError(
            f"no {TEACHER_FILE} in {folder}: run `unimm train bagel-nano-vit {folder.parent}`, or name the folder of another "
            f"encoder as the recipe's teacher"
        )
    weights = load_file(folder / TEACHER_FILE)
    # the tower that timm builds, and its names inside ours
    if "model_name" in files:
        found: NaViTTeacher | TimmViTTeacher = TimmViTTeacher(TimmEncoderConfig.from_json(files))
        weights = {f"trunk.{name}": x for name, x in weights.items()}
    else:
        found = NaViTTeacher(navit_config_from_json(files))
    found.vision.load_state_dict(weights)
    return found.eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class SemanticVQTrainingConfig(plain.VQTrainingConfig):
    """What the recipe's `options` may say: those of a VQ autoencoder, and the folder of the teacher's vision.safetensors."""

    teacher: str


@dataclass(frozen=True, kw_only=True)
class SemanticVQSections:
    """What the recipe's `model` may say of its three parts."""

    vq: Mapping[str, Any]
    # numbers of BranchConfig, but for the two widths that follow from the others
    branch: Mapping[str, Any]
    teacher: Mapping[str, Any]


class SemanticVQTask:
    """Reconstruct through a codebook, and say the teacher's features."""

    name = "semantic"
    # cosine: 1 - the cosine of what is said and what is seen; features: their squared difference
    loss_names = (*plain.VQTask.loss_names, "cosine", "features")

    def __init__(
        self, model: SemanticVQ, teacher: Teacher, options: SemanticVQTrainingConfig, recipe: TrainConfig
    ) -> None:
        self.model, self.teacher, self.options, self.seed = model, teacher, options, recipe.seed
        self.terms = plain.VQLosses(model.vq, options, recipe)
        self.batch = plain.VQDataset(options=options, batch_size=recipe.batch_size, seed=recipe.seed)

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> SemanticVQTask:
        parts = strict(SemanticVQSections, recipe.model, where="model of the recipe")
        options = strict(SemanticVQTrainingConfig, recipe.options, where="options of the recipe")
        told = load_teacher(parts.teacher, Path(options.teacher))
        config = strict(plain.VQArchitecture, parts.vq, where="vq of the model").config()
        branch = SemanticBranchConfig.from_json({**parts.branch, "code_dim": config.code_dim, "out_dim": told.out_dim})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = SemanticVQ(config, branch)
        model.vq = plain.starting_vq(config, options, recipe.seed)
        return cls(model, told, options, recipe)

    def losses(self, batch: plain.VQBatch) -> dict[str, Tensor]:
        """Mean losses by name."""
        image = batch.image.to(next(self.model.parameters()).device)
        losses, codes = self.terms(image, batch.step)
        said, seen = self.model.branch(codes).float(), self.teacher_features(image, (codes.shape[2], codes.shape[3]))
        cosine = 1 - F.cosine_similarity(said, seen, dim=-1).mean()
        return losses | {"cosine": cosine, "features": F.mse_loss(said, seen)}

    @torch.no_grad()
    def teacher_features(self, image: Tensor, grid: tuple[int, int]) -> Tensor:
        """image [B, 3, H, W] -> the teacher's features [B, n, F] on the grid of codes: of the patch that a code lies in."""
        self.teacher.to(image.device)
        features = F.interpolate(self.teacher(image).float(), grid, mode="nearest")
        return rearrange(features, "B F h w -> B (h w) F")

    def sample_image(self) -> Image.Image:
        """Test scenes and train scenes with nameless things, each above their reconstructions."""
        return plain.reconstruction_grid(self.model.vq, self.options, self.batch, self.seed)

    def save(self, folder: Path) -> None:
        """The autoencoder as its own objective writes it, and semantic.safetensors and semantic_config.json."""
        dtype = DTYPES[self.options.dtype]
        plain.save_vq(self.model.vq, folder, dtype)
        branch = {name: x.detach().to(dtype).contiguous().cpu() for name, x in self.model.branch.state_dict().items()}
        save_file(branch, folder / "semantic.safetensors")
        config = json.dumps(self.model.branch.config.to_json(), indent=1)
        (folder / "semantic_config.json").write_text(config + "\n", encoding="utf-8")
        report = plain.vq_report(self.model.vq, self.options, self.seed) | self.report()
        (folder / "report.json").write_text(json.dumps(report) + "\n", encoding="utf-8")

    def report(self) -> dict[str, float]:
        """Mean cosine of what is said and seen on test scenes; the same for a guess that does not look: the mean feature."""
        image = test_scenes(self.options.tasks, self.options.scored_scenes, self.seed)[1]
        said, seen = [], []
        for part in image.split(SCORING_BATCH):
            at = part.to(next(self.model.parameters()).device)
            ids = self.model.vq.encode_ids(at)
            grid = (at.shape[2] // self.model.vq.config.stride, at.shape[3] // self.model.vq.config.stride)
            said.append(self.model.features(ids, grid=grid).float().cpu())
            seen.append(self.teacher_features(at, grid).cpu())
        told, found = torch.cat(said), torch.cat(seen)
        blind = found.mean((0, 1), keepdim=True)
        cosines = (F.cosine_similarity(guess, found, dim=-1).mean().item() for guess in (told, blind))
        return dict(zip(("cosine", "cosine_blind"), cosines, strict=True))
