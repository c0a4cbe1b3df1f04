"""Training UniWorld: projectors from a frozen MLLM to the denoiser, and the denoiser, learn to generate and to edit.

Rectified flow at timesteps t = sigmoid(n), n ~ N(0, 1), shifted as the sampler's; where an edit changed the image its
loss counts more. Lin et al. 2025, arXiv 2506.03147, section 3; docs/originals/uniworld.md, "Training".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from unimm.checkpoint import hub
from unimm.checkpoint.atomic import copy_file
from unimm.checkpoint.load import parse_dtype
from unimm.denoisers.flux import FluxTransformer
from unimm.denoisers.mmdit import PATCH_SIZE, MMDiTStream, SingleStreamBlock
from unimm.encoders.flops import siglip_flops
from unimm.encoders.siglip import SiglipVisionEncoder
from unimm.models.uniworld.auxiliary_encoders import require_part
from unimm.models.uniworld.config import PROJECTOR_HIDDEN, UniWorldConfig
from unimm.models.uniworld.flops import DenoisedGroup, UniWorldEncoding, uniworld_flops
from unimm.models.uniworld.model import UniWorld
from unimm.models.uniworld.network import image_end_rows
from unimm.nn.compiled import compile_blocks
from unimm.nn.flops import StepFlops
from unimm.tokenizers.kl import AutoencoderKL
from unimm.training.alignment import (
    HEAD,
    add_alignment_head,
    alignment_losses,
    recorded_outputs,
    resize_features,
    with_alignment,
    without_head,
)
from unimm.training.alignment import LOSS as ALIGN
from unimm.training.cache import FeatureCache, Record
from unimm.training.config import TrainConfig, from_mapping, require
from unimm.training.fields import held_out_seed
from unimm.training.freezing import freeze, has_prefix
from unimm.training.init import init_siglip, resolve_part
from unimm.training.losses import LossSum, count_by_kind, sum_by_kind
from unimm.training.samples import sample_grid
from unimm.training.tasks.deepseek_chat import IMAGE_KINDS
from unimm.training.tasks.uniworld_data import (
    ConditionRows,
    UniWorldDataset,
    condition_rows,
    groups_by_reference,
    records_of,
)
from unimm.training.tasks.uniworld_samples import (
    UniWorldBatch,
    UniWorldCommonConfig,
    UniWorldEncoded,
    UniWorldInputs,
    UniWorldSampleBuilder,
    UniWorldTrainingConfig,
)
from unimm.training.throughput import StepCounts
from unimm.vlms.qwen2_5_vl.model import QwenVL

# never trained, in any stage: the released data has no reference images, whose latents are projected
ALWAYS_FROZEN = ("mllm.", "task_head.", "vae_projector.", "auxiliary.vae.", "auxiliary.clip.", "auxiliary.t5.")
# of a double block's image stream, what stage 2 trains: attention and modulation, no feed-forward
STAGE_2_SUFFIXES = ("qkv.", "q_norm.", "k_norm.", "out_proj.", "modulation.")


class UniWorldLossTask:
    """The half of both of UniWorld's tasks: the losses of a batch."""

    model: UniWorld
    # what makes the batches
    builder: UniWorldSampleBuilder

    @property
    def alignment_block(self) -> int | None:
        """The denoiser's block behind which hidden states are aligned, counted from 1."""
        return self.builder.options.alignment_block

    def losses(self, batch: UniWorldBatch) -> dict[str, LossSum]:
        """The flow loss of every kind of sample in the batch, and the alignment of the noised images' tokens."""
        samples = batch.samples if isinstance(batch.samples, UniWorldEncoded) else self.encode(batch.samples)
        conditions = self.conditions(samples)
        groups = groups_by_reference(batch)
        block = denoiser_blocks(self.model)[self.alignment_block - 1] if self.alignment_block else None
        with recorded_outputs(block) as outputs:
            losses = [self.flow_losses(batch, samples, rows, conditions) for rows in groups]
        kinds = samples.image_kinds[batch.sample_indices[torch.cat(groups)]]
        found = sum_by_kind(self.builder.kinds, kinds, torch.cat(losses))
        if block is not None:
            found[ALIGN] = LossSum.over(self.token_alignment_losses(batch, samples, groups, outputs))
        return found

    def token_alignment_losses(
        self, batch: UniWorldBatch, samples: UniWorldEncoded, groups: Sequence[Tensor], outputs: Sequence[Any]
    ) -> Tensor:
        """The losses of every token of the noised copies, all groups' [n]. outputs: of the aligned block, one a group."""
        assert samples.target_features is not None, "the builder makes the targets for SigLIP2"
        grid = token_grid(batch)
        n_tokens = grid[0] * grid[1]
        features = resize_features(samples.target_features, grid).to(self.model.device)
        losses = []
        for rows, output in zip(groups, outputs, strict=True):
            n_shown = n_tokens * (1 + self.shows_reference(batch, rows))
            # a double block returns both streams, a single one the text's rows ahead of the image's; references come last
            image = output[0] if isinstance(output, tuple) else output[:, -n_shown:]
            predicted = self.model.get_submodule(HEAD)(image[:, :n_tokens])
            losses.append(
                alignment_losses(predicted, features[batch.sample_indices[rows].to(features.device)]).flatten()
            )
        return torch.cat(losses)

    def loss_counts(self, batch: UniWorldBatch) -> dict[str, int]:
        """How many noised copies of the batch have each flow loss, and how many of their tokens are aligned."""
        counts = count_by_kind(self.builder.kinds, batch.samples.image_kinds[batch.sample_indices])
        height, width = token_grid(batch)
        return counts | ({ALIGN: len(batch.noise) * height * width} if self.alignment_block else {})

    def encode(self, inputs: UniWorldInputs) -> UniWorldEncoded:
        """What the MLLM, the VAE and the vision encoder, the last with gradients, compute of samples."""
        model = self.model
        n = len(inputs.conditioned)
        trains_mllm = any(p.requires_grad for p in model.mllm.parameters())  # by an adapter
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains_mllm):
            states = model.mllm.encode(inputs.prompts)[:n]
        siglip = model.auxiliary.siglip
        features = None
        if siglip is not None and len(inputs.siglip_images) and self.builder.options.trained != "stage 1":
            features = siglip(inputs.siglip_images.to(model.device))
        return UniWorldEncoded(
            hidden_states=list(states),
            image_ends=[image_end_rows(parts) for parts in inputs.prompts[:n]],
            siglip_features=features,
            conditioned=inputs.conditioned,
            latents=self.encode_latents(inputs),
            target_features=self.encode_target_features(inputs),
            reference_latents=self.encode_references(inputs),
            reference_indices=inputs.reference_indices,
            weights=inputs.weights,
            image_kinds=inputs.image_kinds,
        )

    def conditions(self, samples: UniWorldEncoded) -> list[Tensor]:
        """Each sample's condition [L, D] for the denoiser; [0, D] for a sample whose condition is dropped."""
        model = self.model
        dtype = model.mllm_projector.fc1.weight.dtype
        states = [one.to(model.device, dtype) for one in samples.hidden_states]
        features = samples.siglip_features
        conditions = model.condition_at(
            samples.image_ends, states, None if features is None else features.to(model.device, dtype)
        )
        return [one if kept else one[:0] for one, kept in zip(conditions, samples.conditioned.tolist(), strict=True)]

    def flow_losses(
        self, batch: UniWorldBatch, samples: UniWorldEncoded, rows: Tensor, conditions: Sequence[Tensor]
    ) -> Tensor:
        """The losses [n] of some of the noised copies. rows: indices into them [n]."""
        device = self.model.device
        indices = batch.sample_indices[rows]
        references = None
        if self.shows_reference(batch, rows):
            references = samples.reference_latents.to(device)[samples.reference_indices[indices].to(device)]
        return self.model(
            [conditions[i] for i in indices.tolist()],
            samples.latents.to(device)[indices.to(device)],
            batch.noise[rows].to(device),
            batch.times[rows].to(device),
            pooled=self.model.clip_embedding([""]).expand(len(rows), -1),
            weights=samples.weights[indices].to(device),
            guidance=self.builder.options.guidance,
            reference_latents=references,
        )

    def shows_reference(self, batch: UniWorldBatch, group: Tensor) -> bool:
        """Whether the denoiser has a reference image beside each of a group's noised copies. group: indices into them."""
        first = batch.sample_indices[group[0]]
        return self.model.config.reference_latents == "tokens" and int(batch.samples.reference_indices[first]) >= 0

    @torch.no_grad()
    def encode_target_features(self, inputs: UniWorldInputs) -> Tensor | None:
        """SigLIP2's features of the targets [P, patches, F], where hidden states are aligned with them."""
        if inputs.siglip_targets is None:
            return None
        assert self.model.auxiliary.siglip is not None, "the builder asks for it"
        return self.model.auxiliary.siglip(inputs.siglip_targets.to(self.model.device)).float()

    @torch.no_grad()
    def encode_references(self, inputs: UniWorldInputs) -> Tensor:
        """The latents of the reference images [k, C, h / 8, w / 8], where the denoiser takes them."""
        if self.model.config.reference_latents != "tokens" or not len(inputs.reference_images):
            return torch.zeros(len(inputs.reference_images), *inputs.posterior.shape[1:])
        return self.model.auxiliary.required_vae.encode(inputs.reference_images.to(self.model.device))

    @torch.no_grad()
    def encode_latents(self, inputs: UniWorldInputs) -> Tensor:
        """Latents of the targets [P, C, h / 8, w / 8], a sample of the posterior."""
        vae = self.model.auxiliary.required_vae
        device = self.model.device
        return vae.encode(inputs.images.to(device), noise=inputs.posterior.to(device)).float()

    def step_counts(self, batch: UniWorldBatch) -> StepCounts:
        """Tokens of noised latents, of their references and conditions; noised images; FLOPs."""
        samples = batch.samples
        has_features = self.builder.options.trained != "stage 1" and self.model.auxiliary.siglip is not None
        rows = condition_rows(samples, has_features=has_features)
        encoding = None
        if isinstance(samples, UniWorldInputs):
            n_features = len(samples.siglip_images) if has_features else 0
            used = self.model.config.reference_latents == "tokens"
            references = samples.reference_images[: len(samples.reference_images) * used]
            images = [*samples.images, *references]
            sizes = [(image.shape[1], image.shape[2]) for image in images]
            encoding = UniWorldEncoding(prompts=samples.prompts, n_siglip_images=n_features, vae_image_sizes=sizes)
        groups = [self.denoised_group(batch, group, rows) for group in groups_by_reference(batch)]
        flops = uniworld_flops(
            self.model,
            encoding,
            groups,
            n_mllm_rows=sum(one.n_states for one in rows),
            n_siglip_images=sum(one.n_images for one in rows),
        )
        if self.alignment_block:
            self.add_alignment_flops(flops, batch)
        tokens = sum(group.rows.image + group.rows.text for group in groups)
        return StepCounts(tokens=tokens, images=len(batch.noise), flops=flops.total)

    def add_alignment_flops(self, flops: StepFlops, batch: UniWorldBatch) -> None:
        """Add the features of the targets, where no cache holds them, and the network that aligns with them."""
        if isinstance(batch.samples, UniWorldInputs):
            siglip = self.model.auxiliary.siglip
            assert siglip is not None, "the builder asks for it"
            features = StepFlops()
            siglip_flops(features, siglip, len(batch.samples.images))
            flops.add_forward(features)
        flops.chain(self.loss_counts(batch)[ALIGN], True, self.model.get_submodule(HEAD))

    def denoised_group(self, batch: UniWorldBatch, group: Tensor, rows: Sequence[ConditionRows]) -> DenoisedGroup:
        """The sizes of noised copies that the denoiser takes at once. group: indices into them."""
        indices = batch.sample_indices[group].tolist()
        height, width = batch.noise.shape[2:]
        height *= 1 + self.shows_reference(batch, group)
        siglip = self.model.auxiliary.siglip
        n_patches = 0 if siglip is None else siglip.config.grid_side**2
        return DenoisedGroup(
            latent_size=(height, width), condition_lengths=[rows[i].condition_length(n_patches) for i in indices]
        )


class UniWorldTask(UniWorldLossTask):
    """UniWorld on the shapes world."""

    name = "uniworld"

    def __init__(self, model: UniWorld, batch: UniWorldDataset, vae: Path):
        self.model = model
        self.batch = batch
        self.builder = batch.builder
        self.loss_names = with_alignment(IMAGE_KINDS, self.alignment_block)
        # the folder of the VAE, which is not trained
        self.vae = vae

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> UniWorldTask:
        """Build projectors and a denoiser, untrained or trained, around a trained MLLM, SigLIP2 and autoencoder."""
        options = from_mapping(UniWorldTrainingConfig, recipe.options, where="options")
        torch.manual_seed(recipe.seed)
        model = init_uniworld(options, recipe.model)
        prepare_uniworld(model, options, seed=recipe.seed)
        builder = replace(uniworld_builder(model, options), kinds=IMAGE_KINDS, reference_latents=True)
        dataset = UniWorldDataset(options=options, builder=builder, batch_size=recipe.batch_size, seed=recipe.seed)
        return cls(model, dataset, resolve_part(options.vae, "vae"))

    @property
    def cache_inputs(self) -> Callable[[int], UniWorldInputs]:
        """The samples of one shard of a cache."""
        return self.batch.cache_inputs

    def cache_records(self, inputs: UniWorldInputs) -> list[Record]:
        """Hidden states, features of images, latents of targets and references."""
        return records_of(self.encode(inputs))

    def use_cache(self, cache: FeatureCache) -> None:
        """Make batches of the cache's records from now on."""
        siglip = self.model.auxiliary.siglip
        if siglip is not None and any(p.requires_grad for p in siglip.parameters()):
            raise ValueError(
                "got a cache, and a vision encoder that is trained, which changes the features it would hold: add "
                "`auxiliary.siglip.` to frozen, or leave `cache` out"
            )
        if any(p.requires_grad for p in self.model.mllm.parameters()):
            raise ValueError("got a cache, and an adapter of the MLLM, which changes what it would hold: leave one out")
        self.batch = replace(self.batch, cache=cache)

    @property
    def held_out_batch(self) -> UniWorldDataset:
        """Batches of scenes that no run trains on."""
        return replace(self.batch, seed=held_out_seed(self.batch.seed), cache=None)

    def sample_image(self) -> Image.Image:
        """Images of test prompts."""
        return sample_grid(self.model)

    def save(self, folder: Path) -> None:
        """Write the released layout, in bfloat16; the VAE's file as it was trained."""
        with without_head(self.model):
            self.model.save_pretrained(folder, dtype="bfloat16")
        if (self.vae / "ae.safetensors").exists():
            copy_file(self.vae / "ae.safetensors", folder / "vae" / "ae.safetensors")


def denoiser_blocks(model: UniWorld) -> list[nn.Module]:
    """The denoiser's blocks in the order of the forward pass."""
    return [*model.denoiser.mmdit.double_blocks, *model.denoiser.mmdit.single_blocks]


def token_grid(batch: UniWorldBatch) -> tuple[int, int]:
    """(rows, columns) of the tokens of a batch's noised images."""
    height, width = batch.noise.shape[2:]
    return height // PATCH_SIZE, width // PATCH_SIZE


def prepare_uniworld(model: UniWorld, options: UniWorldCommonConfig, *, seed: int) -> None:
    """Add what the options' alignment needs, freeze what the stage does not train, and compile blocks where the options
    say so.

    seed: where the network that aligns begins from. Raises ValueError for an aligned block that the denoiser has not.
    """
    if options.alignment_block:
        add_alignment_head(
            model,
            block=options.alignment_block,
            n_blocks=len(denoiser_blocks(model)),
            dim=model.config.denoiser.mmdit.dim,
            feature_dim=require_part(model.auxiliary.siglip, "SigLIP2", "the component siglip").config.dim,
            device=model.device,
            seed=seed,
        )
    freeze_for_stage(model, options.trained, options.frozen)
    if options.compile:
        compile_blocks(denoiser_blocks(model))


def uniworld_builder(model: UniWorld, options: UniWorldCommonConfig) -> UniWorldSampleBuilder:
    """Samples of a model's prompts, sizes and latents. Raises ValueError for a model without SigLIP2 or a VAE."""
    siglip = require_part(model.auxiliary.siglip, "SigLIP2", "the component siglip")
    return UniWorldSampleBuilder(
        options=options,
        processor=model.processor,
        siglip_transform=siglip.image_processor,
        reference_latents=model.config.reference_latents == "tokens",
        image_pixels=model.config.image_pixels,
        n_ratios=model.config.n_aspect_ratios,
        latent_channels=model.config.latent_channels,
        stride=model.auxiliary.required_vae.config.stride,
    )


def init_uniworld(options: UniWorldCommonConfig, sections: Mapping[str, Any]) -> UniWorld:
    """A model of the recipe's `model` around trained parts: its sections generation, hidden, denoiser, vision."""
    require(options.parts, "mllm", "vae", where="options")
    require(sections, "generation.", *([] if options.denoiser else ["denoiser.joint_attention_dim"]))
    require(sections, *([] if options.siglip else ["vision."]), *(["hidden."] if "hidden" in sections else []))
    mllm = QwenVL.from_pretrained(options.mllm, dtype=parse_dtype(options.mllm_dtype))
    denoiser = (
        FluxTransformer.from_pretrained(resolve_part(options.denoiser, "transformer")) if options.denoiser else None
    )
    siglip = _siglip(options, sections)
    denoiser_config = denoiser.config.to_json() if denoiser is not None else dict(sections["denoiser"])
    hidden = dict.fromkeys(PROJECTOR_HIDDEN, 3 * denoiser_config["joint_attention_dim"])
    hidden |= {**sections.get("hidden", {}), "siglip": siglip.config.dim}
    files = mllm.config.to_json()
    top = {
        **files["config.json"],
        "model_type": "univa_qwen2p5vl",
        "denoise_tower": {"denoiser_config": denoiser_config},
        "generation": {**sections["generation"], "hidden": hidden},
    }
    model = UniWorld(UniWorldConfig.from_json(top, files["preprocessor_config.json"]))
    model.mllm = mllm
    model.auxiliary.siglip = siglip
    model.auxiliary.vae = AutoencoderKL.from_pretrained(resolve_part(options.vae, "vae"))
    if denoiser is not None:
        model.denoiser = denoiser
    else:
        init_flux(model.denoiser)
    if options.text_encoders:
        folders = {part: resolve_part(options.text_encoders, part) for part in ("text_encoder", "tokenizer")}
        model.auxiliary.load(folders, dtype=torch.float32, device="cpu")
    model.auxiliary.check_widths(model.config)
    return model


def _siglip(options: UniWorldCommonConfig, sections: Mapping[str, Any]) -> SiglipVisionEncoder:
    """A released SigLIP2, or one of the recipe's numbers that begins from a trained ViT."""
    if options.siglip:
        return SiglipVisionEncoder.from_pretrained(hub.resolve(options.siglip))
    return init_siglip(sections["vision"], options.vit)


def freeze_for_stage(model: UniWorld, stage: str, frozen: Sequence[str] = ()) -> None:
    """Leave out of training what a stage does not train, and what `frozen` names."""
    freeze(model, frozen, always=ALWAYS_FROZEN)
    if stage == "all":
        return
    for name, parameter in model.named_parameters():
        trained = name.startswith(f"{HEAD}.") or _is_trained(name, stage)
        parameter.requires_grad_(trained and not has_prefix(name, frozen))
    for block in (module for module in model.denoiser.modules() if isinstance(module, SingleStreamBlock)):
        for weight in (block.qkv_mlp.weight, block.qkv_mlp.bias):
            if weight.requires_grad:
                weight.register_hook(_keep_first_rows(block.split_sizes[0]))


def _is_trained(name: str, stage: str) -> bool:
    """Whether a published stage trains the parameter."""
    if name.startswith("mllm_projector."):
        return True
    if stage != "stage 2":
        return False
    if name.startswith("siglip_projector."):
        return True
    if ".mmdit.double_blocks." in name:
        return name.partition(".image.")[2].startswith(STAGE_2_SUFFIXES)
    return ".mmdit.single_blocks." in name and ".out_proj." not in name


def _keep_first_rows(n: int) -> Callable[[Tensor], Tensor]:
    """A hook that keeps a gradient's first rows: queries, keys and values, which stand before a feed-forward."""

    def hook(gradient: Tensor) -> Tensor:
        return torch.cat((gradient[:n], torch.zeros_like(gradient[n:])))

    return hook


def init_flux(denoiser: FluxTransformer) -> None:
    """Set the weights that training from scratch starts from: closed gates of residual branches, and the velocity 0."""
    for module in denoiser.modules():
        if isinstance(module, MMDiTStream | SingleStreamBlock):
            nn.init.zeros_(module.modulation.weight)
            nn.init.zeros_(module.modulation.bias)
    last = denoiser.mmdit.final_layer
    for linear in (last.modulation, last.out_proj):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
