"""UniWorld's auxiliary encoders, from repositories of their own: SigLIP2, and FLUX.1-dev's VAE, CLIP and T5.

A checkpoint may hold them in folders below its own, or lack those that no call needs. docs/originals/uniworld.md,
"Composition" and "Condition".

Axes: B texts, P images, M tokens of a text, C channels, h w latent grid.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from unimm.checkpoint import hub
from unimm.checkpoint.keymap import KeyMap, Rename
from unimm.checkpoint.load import HUB_WEIGHT_FILES
from unimm.encoders import clip_text, siglip, t5
from unimm.encoders.clip_text import CLIPTextEncoder
from unimm.encoders.siglip import SiglipVisionEncoder
from unimm.encoders.t5 import T5Encoder
from unimm.models.uniworld.config import FLUX_FOLDERS, SIGLIP_FOLDER, UniWorldConfig
from unimm.processing.images.io import pil_to_tensor, resize
from unimm.tokenizers.captions import CaptionTokenizer, load_clip_captions, load_t5_captions
from unimm.tokenizers.kl import AutoencoderKL
from unimm.tokenizers.text import TextTokenizer

T = TypeVar("T")

SIGLIP_HUB_ID = "google/siglip2-so400m-patch16-512"
FLUX_HUB_ID = "black-forest-labs/FLUX.1-dev"


class AuxiliaryEncoders(nn.Module):
    """The encoders that were found, None for the rest; a method whose encoder is missing raises ValueError with the
    remedy."""

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
        """Load the encoders and tokenizers whose folders are given; the VAE stays in float32."""
        if (folder := folders.get("siglip")) is not None:
            self.siglip = SiglipVisionEncoder.from_pretrained(folder, dtype=dtype, device=device)
        if (folder := folders.get("vae")) is not None:
            self.vae = AutoencoderKL.from_pretrained(folder, device=device)
        if (folder := folders.get("text_encoder")) is not None:
            self.clip = CLIPTextEncoder.from_pretrained(folder, dtype=dtype, device=device)
        if (folder := folders.get("text_encoder_2")) is not None:
            self.t5 = T5Encoder.from_pretrained(folder, dtype=dtype, device=device)
        if (folder := folders.get("tokenizer")) is not None:
            self.clip_tokenizer = load_clip_captions(
                folder, vocab_size=None if self.clip is None else self.clip.config.vocab_size
            )
        if (folder := folders.get("tokenizer_2")) is not None:
            self.t5_tokenizer = load_t5_captions(
                folder, vocab_size=None if self.t5 is None else self.t5.config.vocab_size
            )

    def check_widths(self, config: UniWorldConfig) -> None:
        """Raise ValueError for encoders of other widths than the checkpoint's."""
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
                f"got {'; '.join(wrong)}: give from_pretrained the encoders that the checkpoint was trained with"
            )

    def key_maps(self, prefix: str) -> dict[tuple[str, ...], KeyMap]:
        """The key map of each file of weights, by its path below a checkpoint. prefix: of our names."""
        key_maps: dict[str, KeyMap] = {}
        if self.siglip is not None:
            key_maps[f"siglip/{HUB_WEIGHT_FILES[0]}"] = siglip.siglip_key_map(
                "vision_model.", f"{prefix}siglip.", pooling_head=self.siglip.config.has_pooling_head
            )
        if self.clip is not None:
            key_maps[f"text_encoder/{HUB_WEIGHT_FILES[0]}"] = clip_text.clip_text_key_map().prefixed(
                ours=f"{prefix}clip."
            )
        if self.t5 is not None:
            key_maps[f"text_encoder_2/{HUB_WEIGHT_FILES[0]}"] = t5.KEY_MAP.prefixed(ours=f"{prefix}t5.")
        if self.vae is not None:
            key_maps["vae/ae.safetensors"] = KeyMap(Rename("{*}", f"{prefix}vae.{{*}}"))
        return {(path,): key_map for path, key_map in key_maps.items()}

    def to_json(self) -> dict[str, dict[str, Any]]:
        """The contents of every config file, by its path below a checkpoint."""
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
        """CLIP's and T5's tokenizers, by their folders."""
        tokenizers = {"tokenizer": self.clip_tokenizer, "tokenizer_2": self.t5_tokenizer}
        return {name: captions.tokenizer for name, captions in tokenizers.items() if captions is not None}

    # ---- encoding and decoding

    def encode_siglip(self, images: Sequence[Image.Image]) -> Tensor:
        """SigLIP2's patch features of images [P, patches, C]."""
        siglip = require_part(self.siglip, "SigLIP2", f'components={{"siglip": "{SIGLIP_HUB_ID}"}}')
        pixel_values = torch.stack([siglip.image_processor.preprocess(image) for image in images])
        return siglip(pixel_values.to(siglip.pos_embed))

    def encode_vae(self, images: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
        """The VAE's latents of images resized to (height, width) [P, C, h, w]."""
        resized = [resize(image, size[::-1]) for image in images]
        return self.required_vae.encode(self._to_vae(torch.stack([pil_to_tensor(one) for one in resized])))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [P, C, h, w] -> pixels [P, 3, height, width], about [-1, 1]."""
        return self.required_vae.decode(self._to_vae(latents)).float()

    @property
    def required_vae(self) -> AutoencoderKL:
        """The VAE. Raises ValueError where it was not found."""
        return require_part(self.vae, "VAE", f'components={{"flux": "{FLUX_HUB_ID}"}}')

    def _to_vae(self, x: Tensor) -> Tensor:
        return x.to(next(self.required_vae.parameters()))

    def encode_clip(self, texts: Sequence[str]) -> Tensor:
        """CLIP's pooled embedding of each text [B, C]."""
        remedy = f'components={{"flux": "{FLUX_HUB_ID}"}}, or generate with clip=False'
        model = require_part(self.clip, "text encoder (CLIP)", remedy)
        tokenizer = require_part(self.clip_tokenizer, "CLIP tokenizer", remedy)
        return model.pool(tokenizer(texts).to(model.pos_embed.device))

    def encode_t5(self, texts: Sequence[str], length: int) -> Tensor:
        """T5's last hidden states of each text, padded to `length` tokens [B, M, C]."""
        remedy = f'components={{"flux": "{FLUX_HUB_ID}"}}, or generate with t5=False'
        model = require_part(self.t5, "second text encoder (T5)", remedy)
        tokenizer = require_part(self.t5_tokenizer, "T5 tokenizer", remedy)
        return model(tokenizer(texts, max_length=length).to(model.embed.weight.device))


def require_part(part: T | None, name: str, remedy: str) -> T:
    """The part. Raises ValueError, with what to give `from_pretrained`, where it is None."""
    if part is None:
        raise ValueError(f"this checkpoint was loaded without its {name}: give from_pretrained {remedy}")
    return part


def find_auxiliary_folders(
    folder: Path,
    components: Mapping[str, str | Path | None],
    *,
    is_hub_id: bool,
    part_sources: Mapping[str, str],
    non_commercial: Mapping[str, str],
) -> dict[str, Path]:
    """The folders of the encoders and tokenizers that exist, by the names of the folders below a checkpoint.

    components: "siglip" and "flux", folders or hub ids; "t5": None leaves T5 out. Unless given, they lie below the
    checkpoint's folder; those of a hub id come from the original's repositories. part_sources: where else, by folder.
    """
    siglip = components.get("siglip")
    flux = components.get("flux")
    given = {name for name in ("siglip", "flux") if components.get(name) is not None}
    if is_hub_id:
        siglip = siglip or SIGLIP_HUB_ID
        flux = flux or FLUX_HUB_ID
    with_t5 = components.get("t5", True) is not None
    wanted = tuple(part for part in FLUX_FOLDERS if with_t5 or not part.endswith("_2"))
    flux_folder = folder if flux is None else hub.resolve(flux, subfolders=wanted, non_commercial=non_commercial)
    folders = {part: flux_folder / part for part in wanted}
    folders[SIGLIP_FOLDER] = folder / SIGLIP_FOLDER if siglip is None else hub.resolve(siglip)
    for part, source in part_sources.items():
        if part in folders and not folders[part].is_dir():
            folders[part] = hub.resolve(source)
    if "flux" in given and (lost := [part for part in wanted if not folders[part].is_dir()]):
        raise ValueError(
            f"got the component flux {flux}, which lacks {', '.join(lost)}: expected the folders of FLUX.1-dev as "
            'diffusers keeps them; components={"t5": None} leaves text_encoder_2 and tokenizer_2 out'
        )
    if "siglip" in given and not (folders[SIGLIP_FOLDER] / "config.json").is_file():
        raise ValueError(
            f"got the component siglip {siglip}, which lacks config.json: expected a folder of SigLIP2's, as {SIGLIP_HUB_ID}"
        )
    return {part: path for part, path in folders.items() if path.is_dir()}
