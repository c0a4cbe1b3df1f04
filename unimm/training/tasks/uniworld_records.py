"""Training UniWorld on one's own records, as its data.txt: images from texts, and edits whose region counts more.

Both published stages (docs/originals/uniworld.md, "Training") are this task with other parts trained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from unimm.models.uniworld.model import UniWorld
from unimm.training.alignment import check_no_adapter, with_alignment, without_head
from unimm.training.config import TrainConfig, from_mapping
from unimm.training.fields import Fraction
from unimm.training.pretrained import load_released, names_release
from unimm.training.samples import prompt_grid
from unimm.training.tasks.generation_request import GENERATED_KINDS
from unimm.training.tasks.uniworld import UniWorldLossTask, init_uniworld, prepare_uniworld, uniworld_builder
from unimm.training.tasks.uniworld_samples import UniWorldCommonConfig, UniWorldSampleBuilder


@dataclass(frozen=True, kw_only=True)
class UniWorldRecordConfig(UniWorldCommonConfig):
    """The recipe's `options` where it has `data`."""

    # the part of samples whose text is "Generate an image." (the released code's drop_prompt_rate)
    prompt_dropout: Fraction
    # whether images stand among the texts where the data has them, as in the original's training; else where `generate`
    # places them
    images_in_place: bool
    # what sample images are generated from
    sample_prompts: tuple[str, ...] = ()


class UniWorldRecordTask(UniWorldLossTask):
    """UniWorld on records."""

    name = "uniworld"

    def __init__(
        self, model: UniWorld, sample_builder: UniWorldSampleBuilder, sample_prompts: tuple[str, ...] = ()
    ) -> None:
        self.model = model
        self.builder = self.sample_builder = sample_builder
        self.sample_prompts = sample_prompts
        self.loss_names = with_alignment(GENERATED_KINDS, self.alignment_block)

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> UniWorldRecordTask:
        """Load the release that the recipe names, or build projectors around parts that are trained."""
        options = from_mapping(UniWorldRecordConfig, recipe.options, where="options")
        if recipe.packing is not None:
            raise ValueError("got packing for uniworld, whose denoiser takes images of one size: leave it out")
        check_no_adapter(options.alignment_block, recipe.lora)
        torch.manual_seed(recipe.seed)
        if names_release(recipe.model, options.parts):
            model = load_released(UniWorld, recipe.model)
        else:
            model = init_uniworld(options, recipe.model)
        prepare_uniworld(model, options, seed=recipe.seed)
        builder = replace(
            uniworld_builder(model, options),
            prompt_dropout=options.prompt_dropout,
            images_in_place=options.images_in_place,
        )
        return cls(model, builder, options.sample_prompts)

    def sample_image(self) -> Image.Image | None:
        """Images of the recipe's prompts; None without prompts."""
        return prompt_grid(self.model, self.sample_prompts)

    def save(self, folder: Path) -> None:
        """Write the released layout, in bfloat16; the VAE stays in float32."""
        with without_head(self.model):
            self.model.save_pretrained(folder, dtype="bfloat16")
