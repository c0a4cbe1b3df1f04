"""JanusFlow's config: the released config files to and from numbers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unimm.checkpoint.config_io import read_json
from unimm.encoders.timm_vit import TimmEncoderConfig
from unimm.models.common.deepseek_processor import DeepseekChatConfig
from unimm.models.janusflow.uvit import UViTDecoderConfig, UViTEncoderConfig
from unimm.nn.decoder import DecoderConfig
from unimm.processing.images.deepseek_vl import DeepseekVLImageProcessor
from unimm.tokenizers.kl import AutoencoderKLConfig
from unimm.vlms.llama_layout import decoder_config_to_json, llama_config_from_json

EXPERT = "all"
SDXL_VAE, SDXL_STRIDE = "stabilityai/sdxl-vae", 8
TIME_SCALE = 1000  # the original's time


@dataclass(frozen=True, kw_only=True)
class JanusFlowConfig:
    decoder: DecoderConfig
    vision: TimmEncoderConfig
    gen_encoder: UViTEncoderConfig
    gen_decoder: UViTDecoderConfig
    vae: AutoencoderKLConfig | None  # None: the autoencoder lies elsewhere
    image_processor: DeepseekVLImageProcessor  # the rule for pictures that are looked at
    latent_size: tuple[int, int]  # (height, width) of what is drawn: the one that the model was trained for
    steps: int
    guidance: float
    chat: DeepseekChatConfig

    def __post_init__(self) -> None:
        dim, tokens = self.decoder.dim, [self.gen_encoder.grid_size(side) for side in self.latent_size]
        if (self.gen_encoder.time_dim, self.gen_decoder.time_dim) != (dim, dim):
            raise ValueError(
                f"got hidden_size {self.gen_encoder.time_dim}, {self.gen_decoder.time_dim} in the U-ViTs: expected {dim}"
            )
        if self.gen_encoder.dim != self.gen_decoder.dim or [n * self.latent_patch_size for n in tokens] != list(
            self.latent_size
        ):
            raise ValueError(
                f"got {self.gen_encoder} and {self.gen_decoder} for a latent of {self.latent_size}: expected the same width, and a "
                "decoder that gives back the size that the encoder takes"
            )

    @property
    def latent_patch_size(self) -> int:
        """Latents a token, along each side."""
        return 2**self.gen_decoder.n_upsamples

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of what is drawn."""
        stride = self.vae.stride if self.vae else SDXL_STRIDE
        return self.latent_size[0] * stride, self.latent_size[1] * stride

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
        return cls.from_json(files, look, vae)

    @classmethod
    def from_json(
        cls, files: Mapping[str, Any], preprocessor: Mapping[str, Any], vae: Mapping[str, Any]
    ) -> "JanusFlowConfig":
        """From the contents of the released files; of vae_config.json those of FLUX's layout, or nothing."""
        vision_params, more = files["vision_und_enc_config"]["params"], files.get("generation", {})
        tower = TimmEncoderConfig.from_json(vision_params)
        painter = UViTDecoderConfig.from_json(files["vision_gen_dec_config"]["params"])
        # the release draws as many tokens as it sees: 576
        side = tower.image_size // (tower.vit.patch_size if tower.vit else 16) * 2**painter.n_upsamples
        return cls(
            decoder=llama_config_from_json(files["language_config"], expert=EXPERT),
            vision=tower,
            gen_encoder=UViTEncoderConfig.from_json(files["vision_gen_enc_config"]["params"]),
            gen_decoder=painter,
            vae=AutoencoderKLConfig.from_json(vae) if vae else None,
            image_processor=DeepseekVLImageProcessor.from_json(preprocessor, size=tower.image_size),
            latent_size=tuple(more.get("latent", (side, side))),
            steps=more.get("steps", 30),
            guidance=more.get("guidance", 2.0),
            chat=DeepseekChatConfig(**more.get("talk", {})),
        )

    def to_json(self) -> dict[str, dict[str, Any]]:
        """The contents of the files that `from_folder` reads."""
        top = {
            "architectures": ["MultiModalityCausalLM"],
            "model_type": "multi_modality",
            **_module_json("vision_und_enc", "CLIPVisionTower", self.vision.to_json()),
            **_module_json("vision_gen_enc", "ShallowUViTEncoder", self.gen_encoder.to_json()),
            **_module_json("vision_gen_dec", "ShallowUViTDecoder", self.gen_decoder.to_json()),
            "language_config": decoder_config_to_json(self.decoder) | {"model_type": "llama"},
            "generation": {"latent": list(self.latent_size), "steps": self.steps, "guidance": self.guidance}
            | {"talk": asdict(self.chat)},
        }
        files = {"config.json": top, "preprocessor_config.json": self.image_processor.to_json()}
        return files | ({"vae_config.json": self.vae.to_json()} if self.vae else {})


def _module_json(name: str, kind: str, params: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}_config": {"cls": kind, "model_type": name, "params": params}}


WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
