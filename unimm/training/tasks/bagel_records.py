"""Training BAGEL on one's own records: text to image, edits, answers, reasoning, interleaved, in packs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from unimm.models.bagel.flops import bagel_flops
from unimm.models.bagel.model import Bagel
from unimm.nn.compiled import compile_experts
from unimm.sequence.packing import PackedBatch
from unimm.tokenizers.kl import AutoencoderKL
from unimm.training.config import TrainConfig, from_mapping
from unimm.training.freezing import freeze, stop_expert_gradients
from unimm.training.losses import LossSum
from unimm.training.pretrained import load_released
from unimm.training.samples import image_grid
from unimm.training.tasks.bagel_samples import BagelRecordBatch, BagelSampleBuilder, BagelSampleConfig
from unimm.training.tasks.bagel_start import build_bagel
from unimm.training.throughput import StepCounts

# pixels that the VAE encodes in one call
VAE_PIXELS = 2**22


@dataclass(frozen=True, kw_only=True)
class BagelRecordConfig(BagelSampleConfig):
    """The recipe's `options` where it has `data`."""

    # prefixes of the names of parameters that are not trained; the VAE never is
    frozen: tuple[str, ...]
    # whether the understanding expert is frozen, too, and no gradient passes through its rows (the released code's
    # freeze_und); answers then train the language head alone, if it is not frozen
    stop_und_gradients: bool = False
    # whether torch.compile fuses the experts' layers around attention
    compile: bool
    # what sample images are generated from
    sample_prompts: tuple[str, ...] = ()


class BagelRecordTask:
    """BAGEL on records."""

    name = "bagel"
    loss_names = ("ce", "mse")

    def __init__(self, model: Bagel, sample_builder: BagelSampleBuilder, sample_prompts: tuple[str, ...] = ()) -> None:
        self.model = model
        self.sample_builder = sample_builder
        self.sample_prompts = sample_prompts

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> BagelRecordTask:
        """Load the release that the recipe names, with its tokenizer, ViT and VAE, or put one together of its parts."""
        options = from_mapping(BagelRecordConfig, recipe.options, where="options")
        is_release = "llm" not in recipe.model
        model = load_released(Bagel, recipe.model) if is_release else build_bagel(recipe.model, seed=recipe.seed)
        model.config = replace(model.config, train_timestep_shift=options.timestep_shift)
        builder = BagelSampleBuilder(
            options=options, config=model.config, processor=model.processor, tokenizer=model.text_tokenizer
        )
        check_limit(builder, recipe)
        if options.compile:
            compile_experts(model.decoder)
        freeze(model, options.frozen, always=("vae.",))
        if options.stop_und_gradients:
            stop_expert_gradients(model.decoder, "und")
        return cls(model, builder, options.sample_prompts)

    def losses(self, batch: BagelRecordBatch) -> dict[str, LossSum]:
        """Cross entropy of labelled ids, and the mean over channels of the squared error of noised latent tokens."""
        device = self.model.device
        losses = self.model(self.encode_images(batch).to(device), batch.noise.to(device))
        return {
            "ce": LossSum(losses.ce.sum(), batch.n_labels),
            "mse": LossSum(losses.mse.mean(-1).sum(), batch.n_noised),
        }

    def loss_counts(self, batch: BagelRecordBatch) -> dict[str, int]:
        """How many ids and latent tokens have a loss."""
        return {"ce": batch.n_labels, "mse": batch.n_noised}

    def step_counts(self, batch: BagelRecordBatch) -> StepCounts:
        """Rows of the pack; images, twice where one is there as latents and as patches; FLOPs."""
        pack = batch.pack
        sizes = [(images.shape[2], images.shape[3]) for images in batch.images for _ in range(len(images))]
        n_seen = 0 if pack.und_images is None else len(pack.und_images.lengths)
        flops = bagel_flops(self.model, pack, sizes).total
        return StepCounts(tokens=len(pack.layout.position_ids), images=len(sizes) + n_seen, flops=flops)

    def encode_images(self, batch: BagelRecordBatch) -> PackedBatch:
        """The pack with its latents and patches in place; images of one size are encoded together, each once."""
        pack = batch.pack
        if pack.und_images is not None:
            pack = replace(pack, und_images=replace(pack.und_images, content=from_uint8(pack.und_images.content)))
        if pack.gen_images is None:
            return pack
        patch = self.model.config.latent_patch_size
        tokens = torch.cat(
            [
                encode_tokens(self.model.vae, *group, patch=patch)
                for group in zip(batch.images, batch.posterior, strict=True)
            ]
        )
        image, token = pack.gen_images.content.unbind(-1)
        return replace(pack, gen_images=replace(pack.gen_images, content=tokens[batch.token_starts[image] + token]))

    def sample_image(self) -> Image.Image | None:
        """Images of the recipe's prompts; None without prompts."""
        if not self.sample_prompts:
            return None
        images = self.model.generate(list(self.sample_prompts), seed=0).images
        return image_grid(images, columns=4, padding=2)

    def save(self, folder: Path) -> None:
        """Write the released layout, in bfloat16; the VAE stays in float32."""
        self.model.save_pretrained(folder, dtype="bfloat16")


@torch.no_grad()
def encode_tokens(vae: AutoencoderKL, images: Tensor, posterior: Tensor, *, patch: int) -> Tensor:
    """Latent tokens [P * n, p * p * C] of uint8 images [P, 3, h, w] of one size, by the posterior's noise [P, C, h', w']."""
    device = next(vae.parameters()).device
    n = max(1, VAE_PIXELS // (images.shape[2] * images.shape[3]))
    latents = [
        vae.encode(from_uint8(some.to(device)), noise=noise.to(device)).float().cpu()
        for some, noise in zip(images.split(n), posterior.split(n), strict=True)
    ]
    return rearrange(torch.cat(latents), "P C (h p) (w q) -> (P h w) (p q C)", p=patch, q=patch)


def from_uint8(x: Tensor) -> Tensor:
    """0 .. 255 -> -1 .. 1"""
    return x.float() / 127.5 - 1


def check_limit(builder: BagelSampleBuilder, recipe: TrainConfig) -> None:
    """Raise ValueError for packs that no image to generate fits into."""
    least = builder.least_image_tokens
    if recipe.packing is not None and builder.config.visual_gen and least > recipe.packing.max_tokens_per_sample:
        raise ValueError(
            f"got packing.max_tokens_per_sample {recipe.packing.max_tokens_per_sample}, and the smallest square image that "
            f"vae_transform makes has {least} tokens: every image to generate would be left out; raise the one or lower "
            "the other's min_image_size"
        )
