"""Training UniWorld: what leads from a frozen reader to the painter, and the painter, learn to draw and to edit.

Rectified flow at times t = sigmoid(n), n ~ N(0, 1), shifted as the sampler's; where an edit changed the picture its
loss counts more. Lin et al. 2025, arXiv 2506.03147, section 3; docs/originals/uniworld.md, "Training".
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from unimm.checkpoint import hub
from unimm.checkpoint.load import parse_dtype
from unimm.data.batching import ROW_MULTIPLE, kind_indices, mean_by_kind, sample_tasks, stack_images
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
from unimm.training.config import TrainConfig, strict
from unimm.training.freezing import freeze
from unimm.training.init import init_siglip
from unimm.training.samples import sample_grid
from unimm.training.tasks.deepseek_chat import IMAGE_KINDS
from unimm.training.tasks.edit_weights import EditWeights, SmallEditError
from unimm.vlms.qwen2_5_vl.model import QwenVL

# never trained, in any stage: the released data shows no references, whose latents are projected
ALWAYS_FROZEN = ("mllm.", "task_head.", "vae_projector.", "auxiliary.vae.", "auxiliary.clip.", "auxiliary.t5.")
# of a double block's picture stream, and of a single block, what stage 2 trains: attention and modulation, no feed-forward
STAGE_2_SUFFIXES = ("qkv.", "q_norm.", "k_norm.", "out_proj.", "modulation.")


@dataclass(frozen=True, kw_only=True)
class UniWorldTrainingConfig:
    """What the recipe's `options` may say."""

    # samples of each task in a batch, or their weights (training/tasks.py)
    tasks: Mapping[str, int]
    # the published stages: what leads from the reader, without features; that, what leads from SigLIP2, and the painter's
    # attention to and modulation of the picture. "all": everything but the reader and the autoencoder, for a painter that
    # begins with noise
    trained: Literal["stage 1", "stage 2", "all"]
    # noised copies of a picture, each at its own time: cheaper than as many samples
    timesteps_per_image: int
    # the part of samples of which nothing is told
    dropout: float
    # whether a prompt ends with the marker that pictures stand behind, as in the original's training and not in its sampling
    append_vision_start: bool
    # how much more an edit's loss counts where it changed the picture: log, linear, exp, quadratic; "" for evenly
    edit_weights: str
    # the guidance that the painter is told, where it embeds one
    guidance: float
    # the part of things in drawings and edits whose colour, or whose shape, has no name
    novel_colours: float
    novel_shapes: float
    # folders or hub ids: of a Qwen2.5-VL; of a VAE; of CLIP and its tokenizer below FLUX's, or "" where `captioned` is false;
    # of a FLUX transformer, or "" for one of the recipe's numbers; of a SigLIP2, or "" for one of the recipe's numbers that
    # begins from the trained ViT in the folder `vit`
    mllm: str
    vae: str
    text_encoders: str
    denoiser: str
    siglip: str
    vit: str
    # of the reader's weights, which never change
    mllm_dtype: str
    # whether torch.compile fuses the painter's blocks
    compile: bool


@dataclass(frozen=True, kw_only=True)
class UniWorldBatch:
    """Samples to be read, pictures to be looked at, and noised copies of the pictures to be drawn, a picture a sample."""

    prompts: list[list[Part]]
    conditioned: Tensor  # [P] bool: whether anything is told of a sample
    siglip_images: Tensor  # [k, 3, S, S], the tower's pictures, sample by sample
    reference_images: Tensor  # [k, 3, h, w], the same for the VAE, one a sample that has one
    reference_indices: Tensor  # [P], index into them, -1 for none
    images: Tensor  # [P, 3, h, w], what is drawn
    posterior: Tensor  # [P, C, h / 8, w / 8]
    weights: Tensor  # [P, 1, h / 8, w / 8]
    noise: Tensor  # [B, C, h / 8, w / 8]
    times: Tensor  # [B]
    sample_indices: Tensor  # [B], index into the samples
    image_kinds: Tensor  # [B], index into DRAWINGS


@dataclass(frozen=True, kw_only=True)
class UniWorldDataset:
    """Batches by step: the same for a seed on every machine, and made without the model."""

    options: UniWorldTrainingConfig
    prompts: UniWorldProcessor
    siglip_transform: SiglipImageProcessor
    latent_shape: tuple[int, int, int]  # (channels, height, width)
    batch_size: int
    seed: int

    def __call__(self, step: int) -> UniWorldBatch:
        rng = random.Random(f"{self.seed}/{step}")
        tasks = sample_tasks(self.options.tasks, self.batch_size, rng)
        return self.batch(
            [self.training_example(task, step * self.batch_size + i, rng) for i, task in enumerate(tasks)], rng
        )

    def training_example(self, task: str, index: int, rng: random.Random) -> Example:
        """A training example; some of its things have no name, if it draws or edits. Raises ValueError for a text task."""
        one = example(task, index, seed=self.seed)
        if one.target is None:
            raise ValueError(
                f"got the task {task}, which draws nothing: the reader is frozen; expected drawings and edits"
            )
        return augment_novel_attributes(one, rng, colours=self.options.novel_colours, shapes=self.options.novel_shapes)

    def batch(self, examples: Sequence[Example], rng: random.Random) -> UniWorldBatch:
        """Examples with the dice's times, noises and dropped conditions."""
        options, n, many = self.options, self.options.timesteps_per_image, len(examples)
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        shown = [[Image.fromarray(image) for image in one.images] for one in examples]
        samples = [self.prompt_parts(one.prompt, some) for one, some in zip(examples, shown, strict=True)]
        looks = [self.siglip_transform.preprocess(picture) for some in shown for picture in some]
        firsts = [some[0] for some in (one.images for one in examples) if some]
        shown_at = torch.tensor([bool(one.images) for one in examples])
        shift = dynamic_shift(self.latent_shape[1] * self.latent_shape[2] // PATCH_SIZE**2)
        return UniWorldBatch(
            prompts=self.pad_rows(samples),
            conditioned=torch.tensor([rng.random() >= options.dropout for _ in examples]),
            siglip_images=torch.stack(looks)
            if looks
            else torch.zeros(0, 3, self.siglip_transform.size, self.siglip_transform.size),
            reference_images=stack_images(firsts),
            reference_indices=torch.where(shown_at, shown_at.cumsum(0) - 1, -1),
            images=stack_images([one.target for one in examples if one.target is not None]),
            posterior=torch.randn(many, *self.latent_shape, generator=generator),
            weights=torch.stack([self.loss_weights(one) for one in examples]),
            noise=torch.randn(n * many, *self.latent_shape, generator=generator),
            times=shift_timesteps(torch.randn(n * many, generator=generator).sigmoid(), shift),
            sample_indices=torch.arange(many).repeat_interleave(n),
            image_kinds=kind_indices(IMAGE_KINDS, examples, [n] * many),
        )

    def prompt_parts(self, prompt: str, pictures: Sequence[Image.Image]) -> list[Part]:
        """A prompt as it is read in training."""
        *before, last = self.prompts.prompt_parts(prompt, pictures)
        ids = last.ids.tolist()
        return [
            *before,
            text_part(
                [*ids, self.prompts.mllm_processor.special_tokens.vision_start]
                if self.options.append_vision_start
                else ids
            ),
        ]

    def pad_rows(self, samples: list[list[Part]]) -> list[list[Part]]:
        """With one more, so that all rows fill a round number: new shapes cost a CPU more than these rows."""
        rows = sum(item.segment.length for items in samples for item in items)
        end = self.prompts.mllm_processor.special_tokens.im_end
        return [*samples, [text_part([end] * (-rows % ROW_MULTIPLE))]] if rows % ROW_MULTIPLE else samples

    def loss_weights(self, one: Example) -> Tensor:
        """How much each place of a sample's loss counts [1, h / 8, w / 8]; evenly where too little was edited to tell."""
        assert one.target is not None, "every sample draws"
        even = torch.ones(1, *self.latent_shape[1:])
        if not self.options.edit_weights or not one.images:
            return even
        weigh = EditWeights(function=self.options.edit_weights, factor=one.target.shape[0] // self.latent_shape[1])
        try:
            return weigh(one.images, one.target)
        except SmallEditError:
            return even


class UniWorldTask:
    """UniWorld on the little world."""

    name = "uniworld"
    loss_names = IMAGE_KINDS

    def __init__(self, model: UniWorld, batch: UniWorldDataset, vae: Path):
        self.model, self.batch, self.vae = model, batch, vae

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> UniWorldTask:
        """What leads to the painter, and the painter, fresh or trained, around a trained reader, tower and autoencoder."""
        options = strict(UniWorldTrainingConfig, recipe.options, where="options")
        torch.manual_seed(recipe.seed)
        vae = uniworld_part_folder(options.vae, "vae")
        model = init_uniworld(options, recipe.model, vae)
        freeze_for_stage(model, options.trained)
        if options.compile:
            for block in (*model.denoiser.mmdit.double_blocks, *model.denoiser.mmdit.single_blocks):
                block.forward = torch.compile(block.forward, dynamic=True)
        height, width = model.output_size([])
        stride = model.auxiliary.required_vae.config.stride
        assert model.auxiliary.siglip is not None, "built with one"
        worlds = UniWorldDataset(
            options=options,
            prompts=model.processor,
            siglip_transform=model.auxiliary.siglip.image_processor,
            latent_shape=(model.config.latent_channels, height // stride, width // stride),
            batch_size=recipe.batch_size,
            seed=recipe.seed,
        )
        return cls(model, worlds, vae)

    def losses(self, batch: UniWorldBatch) -> dict[str, Tensor]:
        """Mean flow loss of every kind of sample in the batch."""
        model, device = self.model, self.model.device
        latents = self.encode_latents(batch)
        with torch.no_grad():
            states = model.mllm.encode(batch.prompts)[: len(batch.conditioned)]
        seen = len(batch.siglip_images) and self.batch.options.trained != "stage 1"
        looks = (
            model.auxiliary.siglip(batch.siglip_images.to(device))
            if seen and model.auxiliary.siglip is not None
            else None
        )
        whole = model.condition(
            batch.prompts[: len(states)], [x.to(model.mllm_projector.fc1.weight.dtype) for x in states], looks
        )
        told = [one if some else one[:0] for one, some in zip(whole, batch.conditioned.tolist(), strict=True)]
        # those that are shown pictures are drawn apart: half of the others' text would be padding
        shown = batch.reference_indices[batch.sample_indices] >= 0
        parts = [rows for some in (~shown, shown) if len(rows := some.nonzero().squeeze(1))]
        errors = [self.flow_losses(batch, rows, told, latents) for rows in parts]
        return mean_by_kind(IMAGE_KINDS, batch.image_kinds[torch.cat(parts)], torch.cat(errors))

    def flow_losses(self, batch: UniWorldBatch, rows: Tensor, conditions: Sequence[Tensor], latents: Tensor) -> Tensor:
        """The loss of some of the noised copies [n]."""
        device, owners = self.model.device, batch.sample_indices[rows]
        return self.model(
            [conditions[i] for i in owners.tolist()],
            latents[owners.to(device)],
            batch.noise[rows].to(device),
            batch.times[rows].to(device),
            pooled=self.model.clip_embedding([""]).expand(len(rows), -1),
            weights=batch.weights[owners].to(device),
            guidance=self.batch.options.guidance,
            reference_latents=self.reference_latents(batch, owners),
        )

    @torch.no_grad()
    def reference_latents(self, batch: UniWorldBatch, owners: Tensor) -> Tensor | None:
        """The latents of each sample's picture [n, C, h, w], where the model is shown them."""
        if self.model.config.reference_latents != "tokens" or int(batch.reference_indices[owners[0]]) < 0:
            return None
        vae, device = self.model.auxiliary.required_vae, self.model.device
        return vae.encode(batch.reference_images.to(device))[batch.reference_indices[owners].to(device)]

    @torch.no_grad()
    def encode_latents(self, batch: UniWorldBatch) -> Tensor:
        """The pictures' latents [P, C, h, w], a sample of the posterior."""
        vae = self.model.auxiliary.required_vae
        device = self.model.device
        return vae.encode(batch.images.to(device), noise=batch.posterior.to(device)).float()

    def sample_image(self) -> Image.Image:
        """A sheet of test prompts drawn."""
        return sample_grid(self.model)

    def save(self, folder: Path) -> None:
        """The released layout, in bfloat16; the VAE's file as it was trained."""
        self.model.save_pretrained(folder, dtype="bfloat16")
        if (self.vae / "ae.safetensors").exists():
            shutil.copyfile(self.vae / "ae.safetensors", folder / "vae" / "ae.safetensors")


def init_uniworld(options: UniWorldTrainingConfig, sections: Mapping[str, Any], vae: Path) -> UniWorld:
    """A model of the recipe's numbers around what is trained already: generation, hidden, painter, vision."""
    reader = QwenVL.from_pretrained(options.mllm, dtype=parse_dtype(options.mllm_dtype))
    painter = (
        FluxTransformer.from_pretrained(uniworld_part_folder(options.denoiser, "transformer"))
        if options.denoiser
        else None
    )
    tower = (
        SiglipVisionEncoder.from_pretrained(hub.resolve(options.siglip))
        if options.siglip
        else init_siglip(sections["vision"], options.vit)
    )
    described = painter.config.to_json() if painter is not None else dict(sections["denoiser"])
    hidden = dict.fromkeys(PROJECTOR_HIDDEN, 3 * described["joint_attention_dim"]) | dict(sections.get("hidden", {}))
    files = reader.config.to_json()
    top = files["config.json"] | {"model_type": "univa_qwen2p5vl", "denoise_tower": {"denoiser_config": described}}
    top["generation"] = dict(sections["generation"]) | {"hidden": hidden | {"siglip": tower.config.dim}}
    model = UniWorld(UniWorldConfig.from_json(top, files["preprocessor_config.json"]))
    model.mllm, model.auxiliary.siglip, model.auxiliary.vae = reader, tower, AutoencoderKL.from_pretrained(vae)
    if painter is not None:
        model.denoiser = painter
    else:
        init_flux(model.denoiser)
    if options.text_encoders:
        homes = {part: uniworld_part_folder(options.text_encoders, part) for part in ("text_encoder", "tokenizer")}
        model.auxiliary.load(homes, dtype=torch.float32, device="cpu")
    model.auxiliary.check_widths(model.config)
    return model


def uniworld_part_folder(name: str, part: str) -> Path:
    """The folder of a part of a release: its own, or the one around it."""
    folder = (
        hub.resolve(name, subfolders=(part,)) if name.count("/") == 1 and not Path(name).exists() else hub.resolve(name)
    )
    return folder / part if (folder / part).is_dir() else folder


def freeze_for_stage(model: UniWorld, which: str) -> None:
    """Leave out of training what a stage does not train."""
    freeze(model, (), always=ALWAYS_FROZEN)
    if which == "all":
        return
    for name, parameter in model.named_parameters():
        tail = name.partition(".image.")[2] if ".double_blocks." in name else ""
        attends = which == "stage 2" and ".mmdit." in name
        chosen = name.startswith("mllm_projector.") or (which == "stage 2" and name.startswith("siglip_projector."))
        chosen |= attends and tail.startswith(STAGE_2_SUFFIXES)
        chosen |= attends and ".single_blocks." in name and ".out_proj." not in name
        parameter.requires_grad_(chosen)
    for block in (module for module in model.denoiser.modules() if isinstance(module, SingleStreamBlock)):
        for table in (block.qkv_mlp.weight, block.qkv_mlp.bias):
            if table.requires_grad:
                table.register_hook(_keep_first_rows(block.split_sizes[0]))


def _keep_first_rows(rows: int) -> Any:
    """A gradient of which only the first rows stay: queries, keys and values, which lie above a feed-forward."""

    def kept(gradient: Tensor) -> Tensor:
        return torch.cat((gradient[:rows], torch.zeros_like(gradient[rows:])))

    return kept


def init_flux(denoiser: FluxTransformer) -> None:
    """A painter from scratch: residual branches are gated shut, and the velocity is 0."""
    for module in denoiser.modules():
        if isinstance(module, MMDiTStream | SingleStreamBlock):
            nn.init.zeros_(module.modulation.weight)
            nn.init.zeros_(module.modulation.bias)
    last = denoiser.mmdit.final_layer
    for table in (last.modulation.weight, last.modulation.bias, last.out_proj.weight, last.out_proj.bias):
        nn.init.zeros_(table)
