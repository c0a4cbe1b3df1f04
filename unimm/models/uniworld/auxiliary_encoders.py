"""The parts of UniWorld that lie in repositories of their own: SigLIP2, and of FLUX.1-dev the VAE, CLIP and T5.

A checkpoint may hold them in folders of these names below its own, or lack those that no call asks for.
docs/originals/uniworld.md, "Composition" and "Condition".

Axes: B texts, k pictures, M ids of a caption, C channels, h w latents.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from unimm.checkpoint.keymap import Table
from unimm.checkpoint.load import HUB_WEIGHTS
from unimm.encoders import clip_text, siglip, t5
from unimm.encoders.clip_text import ClipText, load_clip_text
from unimm.encoders.siglip import Siglip, load_siglip
from unimm.encoders.t5 import T5Encoder, load_t5
from unimm.models.uniworld.config import UniWorldConfig
from unimm.processing.images.io import to_tensor
from unimm.tokenizers.captions import Captions, clip_captions, t5_captions
from unimm.tokenizers.kl import VAE
from unimm.tokenizers.kl_layouts import load_vae
from unimm.tokenizers.text import TextTokenizer

T = TypeVar("T")

SIGLIP, FLUX = "google/siglip2-so400m-patch16-512", "black-forest-labs/FLUX.1-dev"


class Parts(nn.Module):
    """What was found, and None for the rest; a method that needs what is not there says how to have it."""

    def __init__(self) -> None:
        super().__init__()
        self.tower: Siglip | None = None
        self.vae: VAE | None = None
        self.clip: ClipText | None = None
        self.t5: T5Encoder | None = None
        self.clip_captions: Captions | None = None
        self.t5_captions: Captions | None = None

    # ---- files

    def take(self, homes: Mapping[str, Path], *, dtype: torch.dtype, device: str | torch.device) -> None:
        """Load the parts that there are folders for; the VAE stays in float32."""
        if (at := homes.get("siglip")) is not None:
            self.tower = load_siglip(at, dtype=dtype, device=device)
        if (at := homes.get("vae")) is not None:
            self.vae = load_vae(at, device=device)
        if (at := homes.get("text_encoder")) is not None:
            self.clip = load_clip_text(at, dtype=dtype, device=device)
        if (at := homes.get("text_encoder_2")) is not None:
            self.t5 = load_t5(at, dtype=dtype, device=device)
        if (at := homes.get("tokenizer")) is not None:
            self.clip_captions = clip_captions(at)
        if (at := homes.get("tokenizer_2")) is not None:
            self.t5_captions = t5_captions(at)

    def check(self, cfg: UniWorldConfig) -> None:
        """Raise ValueError for parts of other widths than the checkpoint's."""
        widths = {
            "SigLIP2": (self.tower and self.tower.cfg.dim, cfg.look_dim),
            "a VAE": (self.vae and self.vae.config.latent_channels, cfg.latent_channels),
            "CLIP": (self.clip and self.clip.cfg.dim, cfg.painter.pooled_dim),
            "T5": (self.t5 and self.t5.cfg.dim, cfg.painter.text_dim),
        }
        if wrong := [
            f"{part} of width {got}, expected {n}" for part, (got, n) in widths.items() if got not in (None, n)
        ]:
            raise ValueError(
                f"got {'; '.join(wrong)}: give from_pretrained the parts that the checkpoint was trained with"
            )

    def weights(self, ours: str) -> dict[tuple[str, ...], Table]:
        """The key table of each file that is written; ours: what our names begin with."""
        tables: dict[str, Table] = {}
        if self.tower is not None:
            tables["siglip"] = siglip.tower_keys("vision_model.", f"{ours}tower.", head=self.tower.cfg.head)
        if self.clip is not None:
            tables["text_encoder"] = _within(clip_text.keys(), f"{ours}clip.")
        if self.t5 is not None:
            tables["text_encoder_2"] = _within(t5.KEYS, f"{ours}t5.")
        found: dict[tuple[str, ...], Table] = {(f"{name}/{HUB_WEIGHTS[0]}",): table for name, table in tables.items()}
        return found | ({("vae/ae.safetensors",): {"{*}": f"{ours}vae.{{*}}"}} if self.vae is not None else {})

    def to_files(self) -> dict[str, dict[str, Any]]:
        """The contents of every config, by its path below a checkpoint's folder."""
        files: dict[str, dict[str, Any]] = {}
        if self.tower is not None:
            files["siglip/config.json"] = self.tower.cfg.to_files()
            files["siglip/preprocessor_config.json"] = self.tower.pixels.to_files()
        if self.vae is not None:
            files["vae/config.json"] = self.vae.config.to_files()
        if self.clip is not None:
            files["text_encoder/config.json"] = self.clip.cfg.to_files()
        if self.t5 is not None:
            files["text_encoder_2/config.json"] = self.t5.cfg.to_files()
        return files

    def tokenizers(self) -> dict[str, TextTokenizer]:
        """The tokenizers of captions, by their folders."""
        found = {"tokenizer": self.clip_captions, "tokenizer_2": self.t5_captions}
        return {name: captions.tokenizer for name, captions in found.items() if captions is not None}

    # ---- what they give

    def look(self, pictures: Sequence[Image.Image]) -> Tensor:
        """SigLIP2's features of pictures [k, patches, C]."""
        tower = needed(self.tower, "SigLIP2", f'siglip="{SIGLIP}"')
        seen = torch.stack([tower.pixels.pixels(picture) for picture in pictures])
        return tower(seen.to(tower.positions))

    def latents(self, pictures: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
        """The VAE's latents of pictures stretched to (height, width) [k, C, h, w]."""
        fit = [picture.resize(size[::-1], Image.Resampling.BICUBIC) for picture in pictures]
        return self.autoencoder.encode(self._pixels(torch.stack([to_tensor(one) for one in fit])))

    def paint(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> pixels [B, 3, height, width], about [-1, 1]."""
        return self.autoencoder.decode(self._pixels(latents)).float()

    @property
    def autoencoder(self) -> VAE:
        """The VAE. Raises ValueError without one."""
        return needed(self.vae, "VAE", f'flux="{FLUX}"')

    def _pixels(self, x: Tensor) -> Tensor:
        return x.to(next(self.autoencoder.parameters()))

    def pooled(self, texts: Sequence[str]) -> Tensor:
        """CLIP's vector of each text [B, C]."""
        how = f'flux="{FLUX}", or draw with clip=False'
        model, captions = (
            needed(self.clip, "text encoder (CLIP)", how),
            needed(self.clip_captions, "CLIP tokenizer", how),
        )
        return model.pooled(captions(texts).to(model.positions.device))

    def captions(self, texts: Sequence[str], length: int) -> Tensor:
        """T5's states of each text, padded to `length` [B, M, C]."""
        how = f'flux="{FLUX}" and t5=True, or draw with t5=False'
        model, captions = (
            needed(self.t5, "second text encoder (T5)", how),
            needed(self.t5_captions, "T5 tokenizer", how),
        )
        return model(captions(texts, length=length).to(model.embed.weight.device))


def needed(part: T | None, what: str, how: str) -> T:
    """A part. Raises ValueError, with what to give `from_pretrained`, where it was not found."""
    if part is None:
        raise ValueError(f"this checkpoint was loaded without its {what}: give from_pretrained {how}")
    return part


def _within(table: Table, ours: str) -> Table:
    return {theirs: ours + target for theirs, target in table.items() if target is not None}
