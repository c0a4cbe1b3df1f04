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

from unimm.checkpoint.keymap import KeyMap, Rename
from unimm.checkpoint.load import HUB_WEIGHT_FILES
from unimm.encoders import clip_text, siglip, t5
from unimm.encoders.clip_text import CLIPTextEncoder
from unimm.encoders.siglip import SiglipVisionEncoder
from unimm.encoders.t5 import T5Encoder
from unimm.models.uniworld.config import UniWorldConfig
from unimm.processing.images.io import pil_to_tensor
from unimm.tokenizers.captions import CaptionTokenizer, load_clip_captions, load_t5_captions
from unimm.tokenizers.kl import AutoencoderKL
from unimm.tokenizers.text import TextTokenizer

T = TypeVar("T")

SIGLIP_HUB_ID, FLUX_HUB_ID = "google/siglip2-so400m-patch16-512", "black-forest-labs/FLUX.1-dev"


class AuxiliaryEncoders(nn.Module):
    """What was found, and None for the rest; a method that needs what is not there says how to have it."""

    def __init__(self) -> None:
        super().__init__()
        self.siglip: SiglipVisionEncoder | None = None
        self.vae: AutoencoderKL | None = None
        self.clip: CLIPTextEncoder | None = None
        self.t5: T5Encoder | None = None
        self.clip_tokenizer: CaptionTokenizer | None = None
        self.t5_tokenizer: CaptionTokenizer | None = None

    # ---- files

    def load(self, folders: Mapping[str, Path], *, dtype: torch.dtype, device: str | torch.device) -> None:
        """Load the parts that there are folders for; the VAE stays in float32."""
        if (folder := folders.get("siglip")) is not None:
            self.siglip = SiglipVisionEncoder.from_pretrained(folder, dtype=dtype, device=device)
        if (folder := folders.get("vae")) is not None:
            self.vae = AutoencoderKL.from_pretrained(folder, device=device)
        if (folder := folders.get("text_encoder")) is not None:
            self.clip = CLIPTextEncoder.from_pretrained(folder, dtype=dtype, device=device)
        if (folder := folders.get("text_encoder_2")) is not None:
            self.t5 = T5Encoder.from_pretrained(folder, dtype=dtype, device=device)
        if (folder := folders.get("tokenizer")) is not None:
            self.clip_tokenizer = load_clip_captions(folder)
        if (folder := folders.get("tokenizer_2")) is not None:
            self.t5_tokenizer = load_t5_captions(folder)

    def check_widths(self, config: UniWorldConfig) -> None:
        """Raise ValueError for parts of other widths than the checkpoint's."""
        widths = {
            "SigLIP2": (self.siglip and self.siglip.config.dim, config.siglip_dim),
            "a VAE": (self.vae and self.vae.config.latent_channels, config.latent_channels),
            "CLIP": (self.clip and self.clip.config.dim, config.denoiser.pooled_dim),
            "T5": (self.t5 and self.t5.config.dim, config.denoiser.text_dim),
        }
        if wrong := [
            f"{part} of width {got}, expected {n}" for part, (got, n) in widths.items() if got not in (None, n)
        ]:
            raise ValueError(
                f"got {'; '.join(wrong)}: give from_pretrained the parts that the checkpoint was trained with"
            )

    def key_maps(self, prefix: str) -> dict[tuple[str, ...], KeyMap]:
        """The key table of each file that is written; ours: what our names begin with."""
        tables: dict[str, KeyMap] = {}
        if self.siglip is not None:
            tables["siglip"] = siglip.siglip_key_map(
                "vision_model.", f"{prefix}siglip.", pooling_head=self.siglip.config.has_pooling_head
            )
        if self.clip is not None:
            tables["text_encoder"] = clip_text.clip_text_key_map().prefixed(ours=f"{prefix}clip.")
        if self.t5 is not None:
            tables["text_encoder_2"] = t5.KEY_MAP.prefixed(ours=f"{prefix}t5.")
        key_maps: dict[tuple[str, ...], KeyMap] = {
            (f"{name}/{HUB_WEIGHT_FILES[0]}",): table for name, table in tables.items()
        }
        return key_maps | (
            {("vae/ae.safetensors",): KeyMap(Rename("{*}", f"{prefix}vae.{{*}}"))} if self.vae is not None else {}
        )

    def to_json(self) -> dict[str, dict[str, Any]]:
        """The contents of every config, by its path below a checkpoint's folder."""
        files: dict[str, dict[str, Any]] = {}
        if self.siglip is not None:
            files["siglip/config.json"] = self.siglip.config.to_json()
            files["siglip/preprocessor_config.json"] = self.siglip.image_processor.to_json()
        if self.vae is not None:
            files["vae/config.json"] = self.vae.config.to_json()
        if self.clip is not None:
            files["text_encoder/config.json"] = self.clip.config.to_json()
        if self.t5 is not None:
            files["text_encoder_2/config.json"] = self.t5.config.to_json()
        return files

    def tokenizers(self) -> dict[str, TextTokenizer]:
        """The tokenizers of captions, by their folders."""
        found = {"tokenizer": self.clip_tokenizer, "tokenizer_2": self.t5_tokenizer}
        return {name: captions.tokenizer for name, captions in found.items() if captions is not None}

    # ---- what they give

    def encode_siglip(self, images: Sequence[Image.Image]) -> Tensor:
        """SigLIP2's features of pictures [k, patches, C]."""
        siglip = require_part(self.siglip, "SigLIP2", f'siglip="{SIGLIP_HUB_ID}"')
        pixel_values = torch.stack([siglip.image_processor.preprocess(picture) for picture in images])
        return siglip(pixel_values.to(siglip.pos_embed))

    def encode_vae(self, images: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
        """The VAE's latents of pictures stretched to (height, width) [k, C, h, w]."""
        resized = [picture.resize(size[::-1], Image.Resampling.BICUBIC) for picture in images]
        return self.required_vae.encode(self._to_vae(torch.stack([pil_to_tensor(one) for one in resized])))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> pixels [B, 3, height, width], about [-1, 1]."""
        return self.required_vae.decode(self._to_vae(latents)).float()

    @property
    def required_vae(self) -> AutoencoderKL:
        """The VAE. Raises ValueError without one."""
        return require_part(self.vae, "VAE", f'flux="{FLUX_HUB_ID}"')

    def _to_vae(self, x: Tensor) -> Tensor:
        return x.to(next(self.required_vae.parameters()))

    def encode_clip(self, texts: Sequence[str]) -> Tensor:
        """CLIP's vector of each text [B, C]."""
        remedy = f'flux="{FLUX_HUB_ID}", or draw with clip=False'
        model, tokenizer = (
            require_part(self.clip, "text encoder (CLIP)", remedy),
            require_part(self.clip_tokenizer, "CLIP tokenizer", remedy),
        )
        return model.pool(tokenizer(texts).to(model.pos_embed.device))

    def encode_t5(self, texts: Sequence[str], length: int) -> Tensor:
        """T5's states of each text, padded to `length` [B, M, C]."""
        remedy = f'flux="{FLUX_HUB_ID}" and t5=True, or draw with t5=False'
        model, tokenizer = (
            require_part(self.t5, "second text encoder (T5)", remedy),
            require_part(self.t5_tokenizer, "T5 tokenizer", remedy),
        )
        return model(tokenizer(texts, max_length=length).to(model.embed.weight.device))


def require_part(part: T | None, name: str, remedy: str) -> T:
    """A part. Raises ValueError, with what to give `from_pretrained`, where it was not found."""
    if part is None:
        raise ValueError(f"this checkpoint was loaded without its {name}: give from_pretrained {remedy}")
    return part
