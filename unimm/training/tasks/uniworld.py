"""Training UniWorld: projectors from a frozen MLLM to the denoiser, and the denoiser, learn to generate and to edit.

Rectified flow at timesteps t = sigmoid(n), n ~ N(0, 1), shifted as the sampler's; where an edit changed the image its
loss counts more. Lin et al. 2025, arXiv 2506.03147, section 3; docs/originals/uniworld.md, "Training".
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from unimm.checkpoint import hub
from unimm.checkpoint.load import parse_dtype
from unimm.data.batching import kind_indices, mean_by_kind, pad_rows, sample_tasks, stack_images
from unimm.data.shapes import Example, example
from unimm.data.shapes.novel_attributes import augment_novel_attributes
from unimm.denoisers.flux import FluxTransformer
from unimm.denoisers.mmdit import PATCH_SIZE, MMDiTStream, SingleStreamBlock
from unimm.encoders.siglip import SiglipVisionEncoder
from unimm.generation.flow import dynamic_shift, shift_timesteps
from unimm.models.uniworld.config import PROJECTOR_HIDDEN, UniWorldConfig
from unimm.models.uniworld.model import UniWorld
from unimm.models.uniworld.processor import UniWorldProcessor
from unimm.processing.images.siglip import SiglipImageProcessor
from unimm.sequence.parts import Part, text_part
from unimm.tokenizers.kl import AutoencoderKL
from unimm.training.config import Fraction, RecipeSection, TrainConfig, from_mapping
from unimm.training.freezing import freeze
from unimm.training.init import compile_blocks, init_siglip, resolve_part
from unimm.training.samples import sample_grid
from unimm.training.tasks.deepseek_chat import IMAGE_KINDS
from unimm.training.tasks.edit_weights import EditWeights, SmallEditError
from unimm.vlms.qwen2_5_vl.model import QwenVL

# never trained, in any stage: the released data has no reference images, whose latents are projected
ALWAYS_FROZEN = ("mllm.", "task_head.", "vae_projector.", "auxiliary.vae.", "auxiliary.clip.", "auxiliary.t5.")
# of a double block's image stream, what stage 2 trains: attention and modulation, no feed-forward
STAGE_2_SUFFIXES = ("qkv.", "q_norm.", "k_norm.", "out_proj.", "modulation.")


@dataclass(frozen=True, kw_only=True)
class UniWorldTrainingConfig(RecipeSection):
    """The recipe's `options`."""

    # samples of each task in a batch, or their weights (unimm.data.batching.sample_tasks)
    tasks: Mapping[str, int]
    # the published stages: the MLLM's projector, without image features; that, SigLIP2's projector, and the attention
    # and modulation of the denoiser's image stream. "all": everything but the MLLM and the autoencoder, for a denoiser
    # that is trained from scratch
    trained: Literal["stage 1", "stage 2", "all"]
    # noised copies of a target, each at its own timestep: cheaper than as many samples
    timesteps_per_image: int
    # the part of samples without a condition
    dropout: Fraction
    # whether a prompt ends with the token that images follow, as in the original's training and not in its sampling
    append_vision_start: bool
    # how much more an edit's loss counts where it changed the image: log, linear, exp, quadratic; "" for evenly
    edit_weights: str
    # the guidance scale that is embedded, where the denoiser embeds one
    guidance: float
    # the part of things in generation and editing with a novel colour, and with a novel shape
    novel_colours: float
    novel_shapes: float
    # folders or hub ids: of a Qwen2.5-VL; of a VAE; of CLIP and its tokenizer in a FLUX, or "" where `captioned` is
    # false; of a FLUX transformer, or "" for one of the recipe's numbers; of a SigLIP2, or "" for one of the recipe's
    # numbers that begins from the trained ViT in the folder `vit`
    mllm: str
    vae: str
    text_encoders: str
    denoiser: str
    siglip: str
    vit: str
    # of the MLLM's weights, which are not trained
    mllm_dtype: str
    # whether torch.compile fuses the denoiser's blocks
    compile: bool


@dataclass(frozen=True, kw_only=True)
class UniWorldBatch:
    """Prompts with their images, a target for each, and noised copies of the targets."""

    prompts: list[Sequence[Part]]
    conditioned: Tensor  # [P] bool: whether a sample has a condition
    siglip_images: Tensor  # [k, 3, S, S], the prompts' images for SigLIP2, in order
    reference_images: Tensor  # [k, 3, h, w], the same for the VAE, the first of each sample that has one
    reference_indices: Tensor  # [P], index into them, -1 for none
    images: Tensor  # [P, 3, h, w], the targets
    posterior: Tensor  # [P, C, h / 8, w / 8]
    weights: Tensor  # [P, 1, h / 8, w / 8], of the loss
    noise: Tensor  # [B, C, h / 8, w / 8]
    times: Tensor  # [B]
    sample_indices: Tensor  # [B], index into the samples
    image_kinds: Tensor  # [B], index into IMAGE_KINDS


@dataclass(frozen=True, kw_only=True)
class UniWorldDataset:
    """Batches by step: the same for a seed on every machine, and made without the model."""

    options: UniWorldTrainingConfig
    processor: UniWorldProcessor
    siglip_transform: SiglipImageProcessor
    # channels, height, width
    latent_shape: tuple[int, int, int]
    batch_size: int
    seed: int

    def __call__(self, step: int) -> UniWorldBatch:
        rng = random.Random(f"{self.seed}/{step}")
        tasks = sample_tasks(self.options.tasks, self.batch_size, rng)
        first = step * self.batch_size
        return self.batch([self.training_example(task, first + i, rng) for i, task in enumerate(tasks)], rng)

    def training_example(self, task: str, index: int, rng: random.Random) -> Example:
        """A training example, with some novel attributes. Raises ValueError for a task whose output is text."""
        one = example(task, index, seed=self.seed)
        if one.target is None:
            raise ValueError(
                f"got the task {task}, which generates no image: the MLLM is frozen; expected draw, edit or reason"
            )
        return augment_novel_attributes(one, rng, colours=self.options.novel_colours, shapes=self.options.novel_shapes)

    def batch(self, examples: Sequence[Example], rng: random.Random) -> UniWorldBatch:
        """Examples as a batch, with sampled timesteps and noise, and conditions dropped at random."""
        n_copies = self.options.timesteps_per_image
        n = len(examples)
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        images = [[Image.fromarray(image) for image in one.images] for one in examples]
        samples = [self.prompt_parts(one.prompt, some) for one, some in zip(examples, images, strict=True)]
        size = self.siglip_transform.size
        siglip_images = [self.siglip_transform.preprocess(image) for some in images for image in some]
        has_reference = torch.tensor([bool(one.images) for one in examples])
        conditioned = torch.tensor([rng.random() >= self.options.dropout for _ in examples])
        # the order of what is sampled from the generator is part of a batch's definition
        posterior = torch.randn(n, *self.latent_shape, generator=generator)
        noise = torch.randn(n_copies * n, *self.latent_shape, generator=generator)
        times = torch.randn(n_copies * n, generator=generator).sigmoid()
        shift = dynamic_shift(self.latent_shape[1] * self.latent_shape[2] // PATCH_SIZE**2)
        return UniWorldBatch(
            prompts=pad_rows(samples, self.processor.mllm_processor.special_tokens.im_end),
            conditioned=conditioned,
            siglip_images=torch.stack(siglip_images) if siglip_images else torch.zeros(0, 3, size, size),
            reference_images=stack_images([one.images[0] for one in examples if one.images]),
            reference_indices=torch.where(has_reference, has_reference.cumsum(0) - 1, -1),
            images=stack_images([one.target for one in examples if one.target is not None]),
            posterior=posterior,
            weights=torch.stack([self.loss_weights(one) for one in examples]),
            noise=noise,
            times=shift_timesteps(times, shift),
            sample_indices=torch.arange(n).repeat_interleave(n_copies),
            image_kinds=kind_indices(IMAGE_KINDS, examples, [n_copies] * n),
        )

    def prompt_parts(self, prompt: str, images: Sequence[Image.Image]) -> list[Part]:
        """A prompt as training has it."""
        parts = self.processor.prompt_parts(prompt, images)
        if not self.options.append_vision_start:
            return parts
        *before, last = parts
        vision_start = self.processor.mllm_processor.special_tokens.vision_start
        return [*before, text_part([*last.ids.tolist(), vision_start])]

    def loss_weights(self, one: Example) -> Tensor:
        """The weight of each latent in a sample's loss [1, h / 8, w / 8]; even where too little was edited to tell."""
        assert one.target is not None, "every sample has a target"
        even = torch.ones(1, *self.latent_shape[1:])
        if not self.options.edit_weights or not one.images:
            return even
        factor = one.target.shape[0] // self.latent_shape[1]
        try:
            return EditWeights(function=self.options.edit_weights, factor=factor)(one.images, one.target)
        except SmallEditError:
            return even


class UniWorldTask:
    """UniWorld on the shapes world."""

    name = "uniworld"
    loss_names = IMAGE_KINDS

    def __init__(self, model: UniWorld, batch: UniWorldDataset, vae: Path):
        self.model = model
        self.batch = batch
        # the folder of the VAE, which is not trained
        self.vae = vae

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> UniWorldTask:
        """Build projectors and a denoiser, untrained or trained, around a trained MLLM, SigLIP2 and autoencoder."""
        options = from_mapping(UniWorldTrainingConfig, recipe.options, where="options")
        torch.manual_seed(recipe.seed)
        vae = resolve_part(options.vae, "vae")
        model = init_uniworld(options, recipe.model, vae)
        freeze_for_stage(model, options.trained)
        if options.compile:
            compile_blocks([*model.denoiser.mmdit.double_blocks, *model.denoiser.mmdit.single_blocks])
        height, width = model.output_size([])
        stride = model.auxiliary.required_vae.config.stride
        assert model.auxiliary.siglip is not None, "built with one"
        dataset = UniWorldDataset(
            options=options,
            processor=model.processor,
            siglip_transform=model.auxiliary.siglip.image_processor,
            latent_shape=(model.config.latent_channels, height // stride, width // stride),
            batch_size=recipe.batch_size,
            seed=recipe.seed,
        )
        return cls(model, dataset, vae)

    def losses(self, batch: UniWorldBatch) -> dict[str, Tensor]:
        """Mean flow loss of every kind of sample in the batch."""
        latents = self.encode_latents(batch)
        conditions = self.conditions(batch)
        # those with references go apart: half of the others' sequences would be padding
        has_reference = batch.reference_indices[batch.sample_indices] >= 0
        groups = [(~has_reference).nonzero().squeeze(1), has_reference.nonzero().squeeze(1)]
        groups = [rows for rows in groups if len(rows)]
        losses = [self.flow_losses(batch, rows, conditions, latents) for rows in groups]
        return mean_by_kind(IMAGE_KINDS, batch.image_kinds[torch.cat(groups)], torch.cat(losses))

    def conditions(self, batch: UniWorldBatch) -> list[Tensor]:
        """Each sample's condition [L, D] for the denoiser; [0, D] for a sample whose condition is dropped."""
        model = self.model
        n = len(batch.conditioned)
        with torch.no_grad():
            states = model.mllm.encode(batch.prompts)[:n]
        siglip = model.auxiliary.siglip
        features = None
        if siglip is not None and len(batch.siglip_images) and self.batch.options.trained != "stage 1":
            features = siglip(batch.siglip_images.to(model.device))
        dtype = model.mllm_projector.fc1.weight.dtype
        conditions = model.condition(batch.prompts[:n], [x.to(dtype) for x in states], features)
        return [one if kept else one[:0] for one, kept in zip(conditions, batch.conditioned.tolist(), strict=True)]

    def flow_losses(self, batch: UniWorldBatch, rows: Tensor, conditions: Sequence[Tensor], latents: Tensor) -> Tensor:
        """The losses [n] of some of the noised copies. rows: indices into them [n]."""
        device = self.model.device
        indices = batch.sample_indices[rows]
        return self.model(
            [conditions[i] for i in indices.tolist()],
            latents[indices.to(device)],
            batch.noise[rows].to(device),
            batch.times[rows].to(device),
            pooled=self.model.clip_embedding([""]).expand(len(rows), -1),
            weights=batch.weights[indices].to(device),
            guidance=self.batch.options.guidance,
            reference_latents=self.reference_latents(batch, indices),
        )

    @torch.no_grad()
    def reference_latents(self, batch: UniWorldBatch, indices: Tensor) -> Tensor | None:
        """The latents of each sample's reference image [n, C, h, w], where the denoiser takes them.

        indices: of samples.
        """
        if self.model.config.reference_latents != "tokens" or int(batch.reference_indices[indices[0]]) < 0:
            return None
        device = self.model.device
        latents = self.model.auxiliary.required_vae.encode(batch.reference_images.to(device))
        return latents[batch.reference_indices[indices].to(device)]

    @torch.no_grad()
    def encode_latents(self, batch: UniWorldBatch) -> Tensor:
        """Latents of the targets [P, C, h / 8, w / 8], a sample of the posterior."""
        vae = self.model.auxiliary.required_vae
        device = self.model.device
        return vae.encode(batch.images.to(device), noise=batch.posterior.to(device)).float()

    def sample_image(self) -> Image.Image:
        """Images of test prompts."""
        return sample_grid(self.model)

    def save(self, folder: Path) -> None:
        """Write the released layout, in bfloat16; the VAE's file as it was trained."""
        self.model.save_pretrained(folder, dtype="bfloat16")
        if (self.vae / "ae.safetensors").exists():
            shutil.copyfile(self.vae / "ae.safetensors", folder / "vae" / "ae.safetensors")


def init_uniworld(options: UniWorldTrainingConfig, sections: Mapping[str, Any], vae: Path) -> UniWorld:
    """A model of the recipe's `model` around trained parts: its sections generation, hidden, denoiser, vision."""
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
    model.auxiliary.vae = AutoencoderKL.from_pretrained(vae)
    if denoiser is not None:
        model.denoiser = denoiser
    else:
        init_flux(model.denoiser)
    if options.text_encoders:
        folders = {part: resolve_part(options.text_encoders, part) for part in ("text_encoder", "tokenizer")}
        model.auxiliary.load(folders, dtype=torch.float32, device="cpu")
    model.auxiliary.check_widths(model.config)
    return model


def _siglip(options: UniWorldTrainingConfig, sections: Mapping[str, Any]) -> SiglipVisionEncoder:
    """A released SigLIP2, or one of the recipe's numbers that begins from a trained ViT."""
    if options.siglip:
        return SiglipVisionEncoder.from_pretrained(hub.resolve(options.siglip))
    return init_siglip(sections["vision"], options.vit)


def freeze_for_stage(model: UniWorld, stage: str) -> None:
    """Leave out of training what a stage does not train."""
    freeze(model, (), always=ALWAYS_FROZEN)
    if stage == "all":
        return
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_trained(name, stage))
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
