"""Training MetaQuery on one's own records: images from captions, and from instructions with images.

Both published stages (docs/originals/metaquery.md, "Training") are this task on other data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image

from unimm.models.metaquery.model import MetaQuery
from unimm.training.alignment import check_no_adapter, with_alignment
from unimm.training.config import TrainConfig, from_mapping
from unimm.training.pretrained import load_released, names_release
from unimm.training.samples import prompt_grid
from unimm.training.tasks.generation_request import GENERATED_KINDS
from unimm.training.tasks.metaquery import MetaQueryLossTask, init_metaquery, metaquery_builder, prepare_metaquery
from unimm.training.tasks.metaquery_data import MetaQueryCommonConfig, MetaQuerySampleBuilder


@dataclass(frozen=True, kw_only=True)
class MetaQueryRecordConfig(MetaQueryCommonConfig):
    """The recipe's `options` where it has `data`."""

    # what sample images are generated from
    sample_prompts: tuple[str, ...] = ()


class MetaQueryRecordTask(MetaQueryLossTask):
    """MetaQuery on records."""

    name = "metaquery"

    def __init__(
        self, model: MetaQuery, sample_builder: MetaQuerySampleBuilder, sample_prompts: tuple[str, ...] = ()
    ) -> None:
        self.model = model
        self.builder = self.sample_builder = sample_builder
        self.sample_prompts = sample_prompts
        self.loss_names = with_alignment(GENERATED_KINDS, self.alignment_block)

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> MetaQueryRecordTask:
        """Load the release that the recipe names, or build queries and a connector around parts that are trained."""
        options = from_mapping(MetaQueryRecordConfig, recipe.options, where="options")
        check_no_adapter(options.alignment_block, recipe.lora)
        torch.manual_seed(recipe.seed)
        if names_release(recipe.model, options.parts):
            model = load_released(MetaQuery, recipe.model)
        else:
            model = init_metaquery(options, recipe.model)
        prepare_metaquery(model, options, seed=recipe.seed)
        return cls(model, metaquery_builder(model, options), options.sample_prompts)

    def sample_image(self) -> Image.Image | None:
        """Images of the recipe's prompts; None without prompts."""
        return prompt_grid(self.model, self.sample_prompts)
