"""Training Janus on the shapes world: VQ image tokens after their prompt, answers after images and questions.

Plain next-token cross entropy, on image tokens and on the assistant's words; samples packed, all kinds in every batch
(arXiv 2410.13848, sections 3.3 and 3.4; docs/originals/janus.md, "Training").
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from unimm.checkpoint.json_files import read_json
from unimm.data.batching import stack_images
from unimm.models.janus.config import JanusConfig
from unimm.models.janus.flops import janus_flops
from unimm.models.janus.model import Janus
from unimm.models.janus.network import Projector
from unimm.models.janus.processor import padded_unconditional, with_image_start
from unimm.nn.compiled import compile_experts
from unimm.sequence.packing import PackedBatch
from unimm.sequence.parts import Part, image_part, text_part
from unimm.training.cache import Record
from unimm.training.checkpoints import read_tensors
from unimm.training.config import TrainConfig, from_mapping, require
from unimm.training.freezing import freeze
from unimm.training.init import (
    init_decoder,
    init_timm_vit,
    load_trained,
    train_tokenizer,
    trained_file,
)
from unimm.training.losses import LossSum, count_by_kind, sum_by_kind
from unimm.training.tasks.chat_sample import ChatSample
from unimm.training.tasks.deepseek_chat import (
    DEEPSEEK_TOKENS,
    IMAGE_KINDS,
    TEXT_KINDS,
    DeepseekChatDataset,
    DeepseekChatTask,
    DeepseekChatTrainingConfig,
)
from unimm.training.tasks.deepseek_samples import ChatSampleBuilder, chat_images, pack_counts
from unimm.training.throughput import StepCounts


@dataclass(frozen=True, kw_only=True)
class JanusTrainingConfig(DeepseekChatTrainingConfig):
    """The recipe's `options`."""

    # the folder of a trained VQ tokenizer
    vq: str


@dataclass(frozen=True, kw_only=True)
class JanusBatch:
    """A pack whose image tokens are indices (image, token of it), until the VQ tokenizer has encoded the images."""

    pack: PackedBatch
    images: Tensor  # [P, 3, h, w], the targets
    text_kinds: Tensor  # [labels with loss], index into the builder's text_kinds
    image_kinds: Tensor  # [image tokens], index into its image_kinds
    ids: Tensor | None = None  # [P, n], the targets' image tokens, where they are known


@dataclass(frozen=True, kw_only=True)
class JanusSampleBuilder(ChatSampleBuilder):
    """Samples with image tokens to generate."""

    tokens_per_image: int

    FAMILY: ClassVar[str] = "Janus"

    def generation_sample(
        self, kind: str, prompt: Sequence[Part], target: NDArray[np.uint8], rng: random.Random
    ) -> ChatSample:
        """The tokens of an image behind its prompt."""
        special = self.processor.special_tokens
        if rng.random() < self.dropout:
            # pads between the first id and the image's begin token, which the image's part brings
            (pads,) = padded_unconditional(with_image_start(prompt, special.boi), special.pad)
            prompt = [text_part(pads.ids[:-1].tolist())]
        positions = torch.arange(self.tokens_per_image)
        tokens = torch.stack((torch.zeros_like(positions), positions), -1)
        image = image_part("gen_image", tokens, positions, boundary_ids=(special.boi,), causal=True)
        return ChatSample(kind=kind, parts=[*prompt, image], target=target)

    def collate(self, samples: Sequence[ChatSample], rng: random.Random) -> JanusBatch:
        """Samples as one pack."""
        text_kinds, image_kinds = self.loss_kinds(samples)
        images = stack_images(chat_images(samples))
        return JanusBatch(pack=self.pack(samples), images=images, text_kinds=text_kinds, image_kinds=image_kinds)


@dataclass(frozen=True, kw_only=True)
class JanusDataset(DeepseekChatDataset):
    """Batches by number, with image tokens to generate."""

    builder: JanusSampleBuilder

    def encoded(self, batch: JanusBatch, records: list[Record]) -> JanusBatch:
        """The batch with its targets' image tokens, in order."""
        return replace(batch, ids=torch.stack([record["target"] for record in records]) if records else None)


class JanusPackTask:
    """The half of both of Janus's tasks: the losses of a pack, and the release."""

    model: Janus
    # what makes the packs
    builder: JanusSampleBuilder

    def losses(self, batch: JanusBatch) -> dict[str, LossSum]:
        """Cross entropy of every kind of sample in the batch."""
        losses = self.model(self.encode_image_tokens(batch).to(self.model.device))
        image_losses = sum_by_kind(self.builder.image_kinds, batch.image_kinds, losses.image)
        return image_losses | sum_by_kind(self.builder.text_kinds, batch.text_kinds, losses.text)

    def loss_counts(self, batch: JanusBatch) -> dict[str, int]:
        """How many rows of the batch have each loss."""
        images = count_by_kind(self.builder.image_kinds, batch.image_kinds)
        return images | count_by_kind(self.builder.text_kinds, batch.text_kinds)

    @torch.no_grad()
    def encode_image_tokens(self, batch: JanusBatch) -> PackedBatch:
        """The pack with its image tokens in place; every image is encoded once."""
        if batch.pack.gen_images is None:
            return batch.pack
        ids = self.encode_targets(batch) if batch.ids is None else batch.ids
        image, token = batch.pack.gen_images.content.unbind(-1)
        return replace(batch.pack, gen_images=replace(batch.pack.gen_images, content=ids[image, token]))

    @torch.no_grad()
    def encode_targets(self, batch: JanusBatch) -> Tensor:
        """The image tokens of the targets [P, n]."""
        return self.model.vq.encode_ids(batch.images.to(self.model.device)).cpu()

    def step_counts(self, batch: JanusBatch) -> StepCounts:
        """Rows of the pack, images to understand and to generate, FLOPs."""
        sizes = [] if batch.ids is not None else [(image.shape[1], image.shape[2]) for image in batch.images]
        return pack_counts(batch.pack, janus_flops(self.model, batch.pack, sizes))

    def save(self, folder: Path) -> None:
        """Write the released layout, in bfloat16."""
        self.model.save_pretrained(folder, dtype="bfloat16")


class JanusTask(JanusPackTask, DeepseekChatTask):
    """Janus on the shapes world."""

    name = "janus-nano"
    loss_names = IMAGE_KINDS + TEXT_KINDS
    model: Janus
    batch: JanusDataset

    def __init__(self, model: Janus, batch: JanusDataset):
        self.model = model
        self.batch = batch
        self.builder = batch.builder

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> JanusTask:
        """Build a model of the recipe's numbers around a trained VQ tokenizer and a trained ViT."""
        options = from_mapping(JanusTrainingConfig, recipe.options, where="options")
        return cls.from_model(init_janus(recipe, options), recipe, options)

    @classmethod
    def from_model(cls, model: Janus, recipe: TrainConfig, options: JanusTrainingConfig) -> JanusTask:
        """The task of training a given model."""
        prepare_janus(model, options.frozen, compiled=options.compile)
        builder = replace(janus_builder(model, dropout=options.dropout), image_kinds=IMAGE_KINDS, text_kinds=TEXT_KINDS)
        dataset = JanusDataset(options=options, builder=builder, batch_size=recipe.batch_size, seed=recipe.seed)
        return cls(model, dataset)


def prepare_janus(model: Janus, frozen: Sequence[str], *, compiled: bool) -> None:
    """Freeze what is not trained, the VQ tokenizer always. compiled: whether layers are fused."""
    if compiled:
        compile_experts(model.decoder)
    freeze(model, frozen, always=("vq.", "vision.trunk.attn_pool."))


def janus_builder(model: Janus, *, dropout: float, first_sentence: float = 0.0) -> JanusSampleBuilder:
    """Samples of a model's grid and chat format."""
    height, width = model.config.token_grid
    return JanusSampleBuilder(
        processor=model.processor,
        dropout=dropout,
        first_sentence=first_sentence,
        image_size=model.config.image_size,
        max_positions=model.config.decoder.max_positions,
        tokens_per_image=height * width,
    )


def init_janus(recipe: TrainConfig, options: JanusTrainingConfig) -> Janus:
    """An untrained model of the recipe's numbers, around a trained VQ tokenizer and a trained ViT."""
    require(recipe.model, "language.hidden_size", "vision.width", "gen_head_dim", "generation.")
    vq = trained_file(options.vq, "vq.safetensors", "janus-nano-vq")
    tokenizer = train_tokenizer(options.vocab_size, special_tokens=DEEPSEEK_TOKENS)
    vq_config = read_json(vq.parent / "vq_config.json", required=True)
    files = janus_config_json(recipe.model, vq_config, tokenizer.backend.vocab_size())
    torch.manual_seed(recipe.seed)
    model = Janus(JanusConfig.from_json(files, {}))
    init_decoder(model.decoder)
    init_projectors(model)
    load_trained(model.vq, vq)
    init_timm_vit(model.vision, read_tensors(trained_file(options.vit, "vision.safetensors", "bagel-nano-vit")))
    # image tokens begin as their vectors in the VQ tokenizer's codebook
    model.gen_embed.weight.data.copy_(F.normalize(model.vq.quantize.embedding.weight, dim=-1))
    model.tokenizer = tokenizer
    return model


def janus_config_json(model: Mapping[str, Any], vq: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """A config.json of the recipe's `model`: its sections language, vision, generation, and gen_head_dim."""
    dim = model["language"]["hidden_size"]
    head = {
        "image_token_embed": model["gen_head_dim"],
        "image_token_size": vq["params"]["image_token_size"],
        "n_embed": dim,
    }
    aligner = {"projector_type": "mlp_gelu", "depth": 2, "n_embed": dim}
    return {
        "vision_config": {"params": dict(model["vision"])},
        "aligner_config": {"params": aligner | {"input_dim": model["vision"]["width"]}},
        "gen_vision_config": dict(vq),
        "gen_aligner_config": {"params": aligner | {"input_dim": vq["params"]["n_embed"]}},
        "gen_head_config": {"params": head},
        "language_config": {**model["language"], "vocab_size": vocab_size},
        "generation": dict(model["generation"]),
    }


def init_projectors(model: Janus) -> None:
    """Let image features begin about as large as words' embeddings, and the image head's logits near 0."""
    init_projector(model.aligner)
    init_projector(model.gen_aligner)
    nn.init.normal_(model.gen_head.fc2.weight, std=0.02)
    nn.init.zeros_(model.gen_head.fc2.bias)


def init_projector(projector: Projector) -> None:
    """Let a projector's output begin about as large as its hidden features."""
    last = projector.layers[-1]
    assert isinstance(last, nn.Linear), "projectors end with a linear"
    nn.init.normal_(last.weight, std=last.in_features**-0.5)
