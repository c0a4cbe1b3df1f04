"""JanusFlow's config: the released config files to and from numbers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unimm.checkpoint.config_io import read_json
from unimm.encoders.timm_vit import TowerConfig
from unimm.models.common.deepseek_processor import Talk
from unimm.models.janusflow.uvit import UViTDecoderConfig, UViTEncoderConfig
from unimm.nn.decoder import DecoderConfig
from unimm.processing.images.deepseek_vl import PadSquare
from unimm.tokenizers.kl import VAEConfig

STREAM = "all"
SDXL_VAE, SDXL_STRIDE = "stabilityai/sdxl-vae", 8
THOUSAND = 1000  # the original's time


@dataclass(frozen=True, kw_only=True)
class JanusFlowConfig:
    decoder: DecoderConfig
    tower: TowerConfig
    encoder: UViTEncoderConfig
    painter: UViTDecoderConfig
    vae: VAEConfig | None  # None: the autoencoder lies elsewhere
    pixels: PadSquare  # the rule for pictures that are looked at
    latent: tuple[int, int]  # (height, width) of what is drawn: the one that the model was trained for
    steps: int
    guidance: float
    talk: Talk

    def __post_init__(self) -> None:
        dim, tokens = self.decoder.dim, [self.encoder.grid(side) for side in self.latent]
        if (self.encoder.time_dim, self.painter.time_dim) != (dim, dim):
            raise ValueError(
                f"got hidden_size {self.encoder.time_dim}, {self.painter.time_dim} in the U-ViTs: expected {dim}"
            )
        if self.encoder.width != self.painter.width or [n * self.patch for n in tokens] != list(self.latent):
            raise ValueError(
                f"got {self.encoder} and {self.painter} for a latent of {self.latent}: expected the same width, and a "
                "decoder that gives back the size that the encoder takes"
            )

    @property
    def patch(self) -> int:
        """Latents a token, along each side."""
        return 2**self.painter.upsamples

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of what is drawn."""
        stride = self.vae.stride if self.vae else SDXL_STRIDE
        return self.latent[0] * stride, self.latent[1] * stride

    @classmethod
    def from_folder(cls, folder: Path) -> "JanusFlowConfig":
        """Read config.json, and preprocessor_config.json and vae_config.json where they are there."""
        files, look, vae = (
            read_json(folder / f"{name}.json") for name in ("config", "preprocessor_config", "vae_config")
        )
        if "vision_gen_enc_config" not in files:
            found = ", ".join(files) or "nothing"
            raise ValueError(
                f"{folder}/config.json describes no JanusFlow: expected a vision_gen_enc_config; found {found}"
            )
        return cls.from_files(files, look, vae)

    @classmethod
    def from_files(cls, files: Mapping[str, Any], look: Mapping[str, Any], vae: Mapping[str, Any]) -> "JanusFlowConfig":
        """From the contents of the released files; of vae_config.json those of FLUX's layout, or nothing."""
        vision, more = files["vision_und_enc_config"]["params"], files.get("generation", {})
        tower = TowerConfig.from_files(vision)
        painter = UViTDecoderConfig.from_files(files["vision_gen_dec_config"]["params"])
        # the release draws as many tokens as it sees: 576
        side = tower.size // (tower.vit.patch if tower.vit else 16) * 2**painter.upsamples
        return cls(
            decoder=DecoderConfig.from_llama(files["language_config"], stream=STREAM),
            tower=tower,
            encoder=UViTEncoderConfig.from_files(files["vision_gen_enc_config"]["params"]),
            painter=painter,
            vae=VAEConfig.from_files(vae) if vae else None,
            pixels=PadSquare.from_files(look, size=tower.size),
            latent=tuple(more.get("latent", (side, side))),
            steps=more.get("steps", 30),
            guidance=more.get("guidance", 2.0),
            talk=Talk(**more.get("talk", {})),
        )

    def to_files(self) -> dict[str, dict[str, Any]]:
        """The contents of the files that `from_folder` reads."""
        top = {
            "architectures": ["MultiModalityCausalLM"],
            "model_type": "multi_modality",
            **_part("vision_und_enc", "CLIPVisionTower", self.tower.to_files()),
            **_part("vision_gen_enc", "ShallowUViTEncoder", self.encoder.to_files()),
            **_part("vision_gen_dec", "ShallowUViTDecoder", self.painter.to_files()),
            "language_config": self.decoder.to_files() | {"model_type": "llama"},
            "generation": {"latent": list(self.latent), "steps": self.steps, "guidance": self.guidance}
            | {"talk": asdict(self.talk)},
        }
        files = {"config.json": top, "preprocessor_config.json": self.pixels.to_files()}
        return files | ({"vae_config.json": self.vae.to_files()} if self.vae else {})


def _part(name: str, kind: str, params: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}_config": {"cls": kind, "model_type": name, "params": params}}


WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
