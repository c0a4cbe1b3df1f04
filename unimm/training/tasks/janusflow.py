"""Training JanusFlow on the shapes world: velocities of latents after their prompt, answers after images and questions.

Rectified flow, t = sigmoid(n), n ~ N(0, 1), beside next-token cross entropy, and the alignment of hidden states with the
vision encoder's features (arXiv 2411.07975; docs/originals/janusflow.md, "Training").
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unimm.checkpoint.atomic import copy_file
from unimm.checkpoint.json_files import read_json
from unimm.data.batching import encode_latents, place_latent_tokens, stack_images
from unimm.data.shapes import Example
from unimm.encoders.flops import timm_vit_flops
from unimm.models.janusflow.config import JanusFlowConfig
from unimm.models.janusflow.flops import janusflow_flops
from unimm.models.janusflow.model import JanusFlow
from unimm.models.janusflow.processor import bos_unconditional, noised_part
from unimm.nn.compiled import compile_experts
from unimm.nn.flops import StepFlops
from unimm.sequence.packing import PackedBatch
from unimm.sequence.parts import Part
from unimm.training.alignment import (
    HEAD,
    add_alignment_head,
    alignment_losses,
    recorded_outputs,
    with_alignment,
    without_head,
)
from unimm.training.alignment import LOSS as ALIGN
from unimm.training.cache import Record as CacheRecord
from unimm.training.checkpoints import read_tensors
from unimm.training.config import TrainConfig, from_mapping, require
from unimm.training.fields import AtLeastOne
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
from unimm.vlms.llama_layout import EXPERT

# of a cache's record: the vision encoder's features of the target [patches, F]
TARGET_FEATURES = "target_features"


@dataclass(frozen=True, kw_only=True)
class JanusFlowTrainingConfig(DeepseekChatTrainingConfig):
    """The recipe's `options`."""

    # noised copies of a target, each at its own timestep: cheaper than as many samples
    timesteps_per_image: AtLeastOne
    # the block behind which hidden states are aligned with the vision encoder's features, counted from 1; null: none
    alignment_block: AtLeastOne | None = None
    # the folder of a trained VAE
    vae: str


@dataclass(frozen=True, kw_only=True)
class JanusFlowBatch:
    """A pack whose image tokens are indices (image, token of it), until the VAE has encoded the images."""

    pack: PackedBatch
    images: Tensor  # [P, 3, h, w], the targets
    posterior: Tensor  # [P, C, h / 8, w / 8]
    noise: Tensor  # [image tokens, p * p * C]
    text_kinds: Tensor  # [labels with loss], index into the builder's text_kinds
    image_kinds: Tensor  # [image tokens], index into its image_kinds
    latents: Tensor | None = None  # [P, C, h / 8, w / 8], of the targets, where they are known
    features: Tensor | None = None  # [P, patches, F], the vision encoder's of the targets, where they are known


@dataclass(frozen=True, kw_only=True)
class JanusFlowSampleBuilder(ChatSampleBuilder):
    """Samples with latents to generate.

    timesteps_per_image: noised copies of a target, each at its own timestep. patch: latents a token, along each side.
    """

    timesteps_per_image: int
    # channels, height, width
    latent_shape: tuple[int, int, int]
    patch: int

    FAMILY: ClassVar[str] = "JanusFlow"

    def generation_sample(
        self, kind: str, prompt: Sequence[Part], target: NDArray[np.uint8], rng: random.Random
    ) -> ChatSample:
        """Noised copies of an image behind its prompt."""
        if rng.random() < self.dropout:
            prompt = bos_unconditional(prompt)
        positions = torch.arange(self.latent_shape[1] * self.latent_shape[2] // self.patch**2)
        tokens = torch.stack((torch.zeros_like(positions), positions), -1)
        normals = torch.tensor([rng.gauss(0, 1) for _ in range(self.timesteps_per_image)])
        boi = self.processor.special_tokens.boi
        copies = [noised_part(tokens, boi, timestep=t) for t in normals.sigmoid().tolist()]
        return ChatSample(kind=kind, parts=[*prompt, *copies], target=target)

    def collate(self, samples: Sequence[ChatSample], rng: random.Random) -> JanusFlowBatch:
        """Samples as one pack, with noise."""
        text_kinds, image_kinds = self.loss_kinds(samples)
        images = chat_images(samples)
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        return JanusFlowBatch(
            pack=self.pack(samples),
            images=stack_images(images),
            posterior=torch.randn(len(images), *self.latent_shape, generator=generator),
            noise=torch.randn(len(image_kinds), self.patch**2 * self.latent_shape[0], generator=generator),
            text_kinds=text_kinds,
            image_kinds=image_kinds,
        )


@dataclass(frozen=True, kw_only=True)
class JanusFlowDataset(DeepseekChatDataset):
    """Batches by number, with latents to generate."""

    builder: JanusFlowSampleBuilder

    def encoded(self, batch: JanusFlowBatch, records: list[CacheRecord]) -> JanusFlowBatch:
        """The batch with its targets' latents and, where they are aligned with, features, in order."""
        if not records:
            return batch
        latents = torch.stack([record["target"] for record in records])
        aligned = TARGET_FEATURES in records[0]
        features = torch.stack([record[TARGET_FEATURES] for record in records]) if aligned else None
        return replace(batch, latents=latents, features=features)


class JanusFlowPackTask:
    """The half of both of JanusFlow's tasks: the losses of a pack."""

    model: JanusFlow
    # what makes the packs
    builder: JanusFlowSampleBuilder
    # the block behind which hidden states are aligned, counted from 1
    alignment_block: int | None

    def losses(self, batch: JanusFlowBatch) -> dict[str, LossSum]:
        """The loss of every kind of sample in the batch: flow losses of images, cross entropy of texts; and the alignment
        of the images' tokens."""
        model = self.model
        pack = self.encode_latents(batch).to(model.device)
        block = model.decoder.blocks[self.alignment_block - 1] if self.alignment_block else None
        with recorded_outputs(block) as outputs:
            losses = model(pack, batch.noise.to(model.device))
        found = sum_by_kind(self.builder.image_kinds, batch.image_kinds, losses.mse)
        found |= sum_by_kind(self.builder.text_kinds, batch.text_kinds, losses.text)
        if block is not None and pack.gen_images is not None:
            predicted = model.get_submodule(HEAD)(outputs[0][EXPERT][pack.gen_images.rows])
            found[ALIGN] = LossSum.over(alignment_losses(predicted, self.token_features(batch).to(model.device)))
        return found

    def token_features(self, batch: JanusFlowBatch) -> Tensor:
        """The vision encoder's feature of what each image token of the batch stands for, [image tokens, F]."""
        assert batch.pack.gen_images is not None, "asked of packs with images to generate"
        features = self.target_features(batch) if batch.features is None else batch.features
        image, token = batch.pack.gen_images.content.unbind(-1)
        return features[image, token]

    @torch.no_grad()
    def target_features(self, batch: JanusFlowBatch) -> Tensor:
        """The vision encoder's features of the targets [P, patches, F]."""
        processor = self.model.image_processor
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (processor.mean, processor.std))
        images = ((batch.images + 1) / 2 - mean) / std
        return self.model.vision(images.to(self.model.device, self.model.dtype)).float().cpu()

    def loss_counts(self, batch: JanusFlowBatch) -> dict[str, int]:
        """How many rows of the batch have each loss."""
        counts = count_by_kind(self.builder.image_kinds, batch.image_kinds)
        counts |= count_by_kind(self.builder.text_kinds, batch.text_kinds)
        aligned = {ALIGN: len(batch.image_kinds)} if self.alignment_block and len(batch.image_kinds) else {}
        return counts | aligned

    def encode_latents(self, batch: JanusFlowBatch) -> PackedBatch:
        """The pack with its latents in place; every image is encoded once."""
        if batch.pack.gen_images is None:
            return batch.pack
        latents = self.encode_targets(batch) if batch.latents is None else batch.latents
        return place_latent_tokens(batch.pack, latents, patch=self.builder.patch)

    def encode_targets(self, batch: JanusFlowBatch) -> Tensor:
        """Latents of the targets [P, C, h / 8, w / 8], samples of the posterior."""
        return encode_latents(self.model.autoencoder, batch.images, batch.posterior)

    def step_counts(self, batch: JanusFlowBatch) -> StepCounts:
        """Rows of the pack, images to understand and noised copies of those to generate, FLOPs."""
        sizes = [] if batch.latents is not None else [(image.shape[1], image.shape[2]) for image in batch.images]
        flops = janusflow_flops(self.model, batch.pack, sizes)
        if self.alignment_block:
            n_encoded = 0 if batch.features is not None else len(batch.images)
            encoding = StepFlops()
            timm_vit_flops(encoding, self.model.vision, n_encoded)
            flops.add_forward(encoding)
            flops.chain(len(batch.image_kinds), True, self.model.get_submodule(HEAD))
        return pack_counts(batch.pack, flops)


class JanusFlowTask(JanusFlowPackTask, DeepseekChatTask):
    """JanusFlow on the shapes world."""

    name = "janusflow-nano"
    model: JanusFlow
    batch: JanusFlowDataset

    def __init__(
        self, model: JanusFlow, batch: JanusFlowDataset, vae: Path, *, alignment_block: int | None = None
    ) -> None:
        self.model = model
        self.batch = batch
        self.builder = batch.builder
        self.alignment_block = alignment_block
        self.loss_names = with_alignment(IMAGE_KINDS + TEXT_KINDS, alignment_block)
        # the file of the VAE's weights, which are not trained
        self.vae = vae

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> JanusFlowTask:
        """Build a model of the recipe's numbers around a trained VAE and a trained ViT."""
        options = from_mapping(JanusFlowTrainingConfig, recipe.options, where="options")
        require(recipe.model, "language.hidden_size", "vision.width", "flow.width", "flow.blocks", "generation.")
        vae = trained_file(options.vae, "ae.safetensors", "bagel-nano-vae")
        tokenizer = train_tokenizer(options.vocab_size, special_tokens=DEEPSEEK_TOKENS)
        vae_files = read_json(vae.parent / "vae_config.json", required=True)
        files = janusflow_config_json(recipe.model, vae_files, tokenizer.backend.vocab_size())
        torch.manual_seed(recipe.seed)
        model = JanusFlow(JanusFlowConfig.from_json(files, {}, vae_files))
        init_decoder(model.decoder)
        init_flow_layers(model)
        load_trained(model.autoencoder, vae)
        init_timm_vit(model.vision, read_tensors(trained_file(options.vit, "vision.safetensors", "bagel-nano-vit")))
        model.tokenizer = tokenizer
        prepare_janusflow(
            model, options.frozen, compiled=options.compile, alignment_block=options.alignment_block, seed=recipe.seed
        )
        builder = janusflow_builder(model, dropout=options.dropout, timesteps_per_image=options.timesteps_per_image)
        builder = replace(builder, image_kinds=IMAGE_KINDS, text_kinds=TEXT_KINDS)
        dataset = JanusFlowDataset(options=options, builder=builder, batch_size=recipe.batch_size, seed=recipe.seed)
        return cls(model, dataset, vae, alignment_block=options.alignment_block)

    def cache_records(self, inputs: tuple[list[Example], Any]) -> list[CacheRecord]:
        """As every cache of conversations, with the features of the targets where these are aligned with."""
        records = super().cache_records(inputs)
        batch = inputs[1]
        if self.alignment_block:
            features = iter(self.target_features(batch) if len(batch.images) else ())
            none = torch.zeros(0)
            for record in records:
                record[TARGET_FEATURES] = next(features) if len(record["target"]) else none
        return records

    def save(self, folder: Path) -> None:
        """Write the released layout, in bfloat16; the VAE's file as it was trained."""
        with without_head(self.model):
            self.model.save_pretrained(folder, dtype="bfloat16")
        copy_file(self.vae, folder / "ae.safetensors")


def prepare_janusflow(
    model: JanusFlow, frozen: Sequence[str], *, compiled: bool, alignment_block: int | None, seed: int
) -> None:
    """Freeze what is not trained, the autoencoder always. compiled: whether layers are fused.

    alignment_block: the block behind which hidden states are aligned with features, by a head that begins from the seed.
    Raises ValueError where there is no such block, or where a patch of the vision encoder is no token of a generated image.
    """
    if alignment_block:
        check_same_grid(model)
        add_alignment_head(
            model,
            block=alignment_block,
            n_blocks=model.config.decoder.n_layers,
            dim=model.config.decoder.dim,
            feature_dim=model.vision.trunk.num_features,
            device=model.device,
            seed=seed,
        )
    if compiled:
        compile_experts(model.decoder)
    freeze(model, frozen, always=("vae.", "vision.trunk.attn_pool."))


def check_same_grid(model: JanusFlow) -> None:
    """Raise ValueError where a patch of the vision encoder is no token of a generated image."""
    config = model.config
    grid = tuple(side // config.latent_patch_size for side in config.latent_size)
    patches = (model.vision.grid_side, model.vision.grid_side)
    size = (config.vision.image_size, config.vision.image_size)
    if grid != patches or config.image_size != size:
        raise ValueError(
            f"got alignment_block, images of {config.image_size} in {grid} tokens to generate, and of {size} in {patches} "
            "patches to understand: expected the same of both; leave alignment_block out"
        )


def janusflow_builder(
    model: JanusFlow, *, dropout: float, timesteps_per_image: int, first_sentence: float = 0.0
) -> JanusFlowSampleBuilder:
    """Samples of a model's latents and chat format."""
    return JanusFlowSampleBuilder(
        processor=model.processor,
        dropout=dropout,
        first_sentence=first_sentence,
        image_size=model.config.image_size,
        max_positions=model.config.decoder.max_positions,
        timesteps_per_image=timesteps_per_image,
        latent_shape=(model.config.gen_encoder.in_channels, *model.config.latent_size),
        patch=model.config.latent_patch_size,
    )


def janusflow_config_json(model: Mapping[str, Any], vae: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """A config.json of the recipe's `model`: its sections language, vision, flow, generation."""
    width = model["flow"]["width"]
    channels = vae["z_channels"]
    common = {
        "block_out_channels": [width],
        "layers_in_middle": model["flow"]["blocks"],
        "hidden_size": model["language"]["hidden_size"],
    }
    return {
        "vision_und_enc_config": {"params": dict(model["vision"])},
        "vision_gen_enc_config": {"params": common | {"input_channels": channels}},
        "vision_gen_dec_config": {"params": common | {"in_channels": width, "out_channels": channels}},
        "language_config": {**model["language"], "vocab_size": vocab_size},
        "generation": dict(model["generation"]),
    }


def init_flow_layers(model: JanusFlow) -> None:
    """Let image features and latents begin about as large as words' embeddings, and the velocity as 0."""
    for linear in (model.aligner, model.gen_encoder_aligner):
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    nn.init.normal_(model.und_start_embed, std=0.5)
    last = model.gen_decoder.out_convs[-1].unpatch_conv
    assert isinstance(last, nn.Conv2d), "the decoder ends with a convolution"
    for table in (last.weight, last.bias):
        assert table is not None, "with a bias"
        nn.init.zeros_(table)
