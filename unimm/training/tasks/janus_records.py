"""Training Janus and JanusFlow on one's own records: images from texts and from images, answers, texts, in packs.

What of a model is trained is the recipe's `frozen`; the papers' stages are recipes of ours (docs/training.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from unimm.models.janus.model import Janus
from unimm.models.janusflow.model import JanusFlow
from unimm.training.alignment import check_no_adapter, with_alignment, without_head
from unimm.training.config import TrainConfig, from_mapping
from unimm.training.fields import AtLeastOne, Fraction, RecipeSection
from unimm.training.pretrained import load_released
from unimm.training.samples import prompt_grid
from unimm.training.tasks.generation_request import GENERATED_KINDS, check_pack_limit
from unimm.training.tasks.janus import JanusPackTask, JanusSampleBuilder, janus_builder, prepare_janus
from unimm.training.tasks.janusflow import (
    JanusFlowPackTask,
    JanusFlowSampleBuilder,
    janusflow_builder,
    prepare_janusflow,
)
from unimm.training.tasks.record_answers import ANSWERED_KINDS


@dataclass(frozen=True, kw_only=True)
class JanusRecordConfig(RecipeSection):
    """The recipe's `options` where it has `data`."""

    # the part of images to generate whose prompt is dropped, which guidance compares with
    dropout: Fraction
    # the part of captions of which the first sentence alone is taken
    first_sentence: Fraction = 0.0
    # prefixes of the names of parameters that are not trained; the image tokenizer, or the autoencoder, never is
    frozen: tuple[str, ...]
    # whether torch.compile fuses the decoder's layers around attention
    compile: bool
    # what sample images are generated from
    sample_prompts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class JanusFlowRecordConfig(JanusRecordConfig):
    """The recipe's `options` where it has `data`."""

    # noised copies of a target, each at its own timestep: cheaper than as many samples
    timesteps_per_image: AtLeastOne
    # the block behind which hidden states are aligned with the vision encoder's features, counted from 1; null: none
    alignment_block: AtLeastOne | None = None


class JanusRecordTask(JanusPackTask):
    """Janus on records."""

    name = "janus"
    loss_names = GENERATED_KINDS + ANSWERED_KINDS

    def __init__(self, model: Janus, sample_builder: JanusSampleBuilder, sample_prompts: tuple[str, ...] = ()) -> None:
        self.model = model
        self.builder = self.sample_builder = sample_builder
        self.sample_prompts = sample_prompts

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> JanusRecordTask:
        """Load the release that the recipe names."""
        options = from_mapping(JanusRecordConfig, recipe.options, where="options")
        model = load_released(Janus, recipe.model)
        prepare_janus(model, options.frozen, compiled=options.compile)
        builder = janus_builder(model, dropout=options.dropout, first_sentence=options.first_sentence)
        check_pack_limit(builder.tokens_per_image, recipe)
        return cls(model, builder, options.sample_prompts)

    def sample_image(self) -> Image.Image | None:
        """Images of the recipe's prompts; None without prompts."""
        return prompt_grid(self.model, self.sample_prompts)


class JanusFlowRecordTask(JanusFlowPackTask):
    """JanusFlow on records."""

    name = "janusflow"

    def __init__(
        self,
        model: JanusFlow,
        sample_builder: JanusFlowSampleBuilder,
        sample_prompts: tuple[str, ...] = (),
        *,
        alignment_block: int | None = None,
    ) -> None:
        self.model = model
        self.builder = self.sample_builder = sample_builder
        self.sample_prompts = sample_prompts
        self.alignment_block = alignment_block
        self.loss_names = with_alignment(GENERATED_KINDS + ANSWERED_KINDS, alignment_block)

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> JanusFlowRecordTask:
        """Load the release that the recipe names, with its autoencoder."""
        options = from_mapping(JanusFlowRecordConfig, recipe.options, where="options")
        check_no_adapter(options.alignment_block, recipe.lora)
        model = load_released(JanusFlow, recipe.model)
        prepare_janusflow(
            model, options.frozen, compiled=options.compile, alignment_block=options.alignment_block, seed=recipe.seed
        )
        builder = janusflow_builder(
            model,
            dropout=options.dropout,
            timesteps_per_image=options.timesteps_per_image,
            first_sentence=options.first_sentence,
        )
        height, width = model.config.latent_size
        n_tokens = height * width // builder.patch**2 * builder.timesteps_per_image
        check_pack_limit(n_tokens, recipe)
        return cls(model, builder, options.sample_prompts, alignment_block=options.alignment_block)

    def sample_image(self) -> Image.Image | None:
        """Images of the recipe's prompts; None without prompts."""
        return prompt_grid(self.model, self.sample_prompts)

    def save(self, folder: Path) -> None:
        """Write the released layout, in bfloat16; an autoencoder of the release's own stays in float32."""
        with without_head(self.model):
            self.model.save_pretrained(folder, dtype="bfloat16")
