"""JanusFlow's config: the released config files to and from numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unimm.checkpoint.config_io import JsonLayout, PositiveInt, read_config, read_section, write_config
from unimm.checkpoint.json_files import read_json, read_preprocessor_json
from unimm.encoders.timm_vit import TimmEncoderConfig
from unimm.models.common.deepseek_processor import DeepseekChatConfig, check_image_size
from unimm.models.janusflow.uvit import UViTDecoderConfig, UViTEncoderConfig
from unimm.nn.decoder import DecoderConfig
from unimm.processing.images.deepseek_vl import DeepseekVLImageProcessor
from unimm.tokenizers.kl import AutoencoderKLConfig
from unimm.vlms.llama_layout import EXPERT, decoder_config_to_json, llama_config_from_json

SDXL_VAE = "stabilityai/sdxl-vae"
SDXL_STRIDE = 8
TIME_SCALE = 1000  # the original's time is in thousandths


@dataclass(frozen=True, kw_only=True)
class JanusFlowConfig:
    """The configs of the parts, and the defaults of generation."""

    decoder: DecoderConfig
    vision: TimmEncoderConfig
    gen_encoder: UViTEncoderConfig
    gen_decoder: UViTDecoderConfig
    vae: AutoencoderKLConfig | None  # None where the autoencoder lies elsewhere
    image_processor: DeepseekVLImageProcessor  # of the images to understand
    latent_size: tuple[
        PositiveInt, PositiveInt
    ]  # (height, width) of generated latents, the one that the model was trained for
    steps: PositiveInt
    guidance: float
    chat: DeepseekChatConfig

    def __post_init__(self) -> None:
        dim = self.decoder.dim
        check_image_size(self.image_processor, self.vision)
        if (self.gen_encoder.time_dim, self.gen_decoder.time_dim) != (dim, dim):
            raise ValueError(
                f"got hidden_size {self.gen_encoder.time_dim}, {self.gen_decoder.time_dim} in the U-ViTs: expected "
                f"{dim}"
            )
        decoded = tuple(self.gen_encoder.grid_size(side) * self.latent_patch_size for side in self.latent_size)
        if self.gen_encoder.dim != self.gen_decoder.dim or decoded != tuple(self.latent_size):
            raise ValueError(
                f"got {self.gen_encoder} and {self.gen_decoder} for a latent of {self.latent_size}: expected the same "
                "width, "
                "and a decoder that gives back the size that the encoder takes"
            )

    @property
    def latent_patch_size(self) -> int:
        """The latents of a token along each side."""
        return 2**self.gen_decoder.n_upsamples

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of generated images in pixels."""
        stride = self.vae.stride if self.vae else SDXL_STRIDE
        return self.latent_size[0] * stride, self.latent_size[1] * stride

    @classmethod
    def from_folder(cls, folder: Path) -> "JanusFlowConfig":
        """Read config.json, and preprocessor_config.json and vae_config.json where they are there."""
        files = read_json(folder / "config.json")
        if "vision_gen_enc_config" not in files:
            found = ", ".join(files) or "nothing"
            raise ValueError(
                f"{folder}/config.json describes no JanusFlow: expected a vision_gen_enc_config; found {found}"
            )
        return cls.from_json(files, read_preprocessor_json(folder), read_json(folder / "vae_config.json"))

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], preprocessor: Mapping[str, Any], vae: Mapping[str, Any]
    ) -> "JanusFlowConfig":
        """Read the contents of the released files; of vae_config.json, in FLUX's layout, they may be empty."""
        language = read_section(data, "language_config", LAYOUT)
        vision = TimmEncoderConfig.from_json(read_section(data, "vision_und_enc_config.params", LAYOUT))
        gen_decoder = UViTDecoderConfig.from_json(read_section(data, "vision_gen_dec_config.params", LAYOUT))
        # the release generates as many tokens as it encodes: 576
        side = vision.image_size // (vision.vit.patch_size if vision.vit else 16) * 2**gen_decoder.n_upsamples
        given = {
            "decoder": llama_config_from_json(language, expert=EXPERT),
            "vision": vision,
            "gen_decoder": gen_decoder,
            "vae": AutoencoderKLConfig.from_json(vae) if vae else None,
            "image_processor": DeepseekVLImageProcessor.from_json(preprocessor, size=vision.image_size),
        }
        layout = replace(LAYOUT, defaults={**LAYOUT.defaults, "generation.latent": [side, side]})
        return read_config(cls, data, layout, given=given)

    def to_json(self) -> dict[str, dict[str, Any]]:
        """The contents of the files that `from_folder` reads."""
        language = decoder_config_to_json(self.decoder) | {"model_type": "llama"}
        data = write_config(self, LAYOUT) | {"language_config": language}
        files = {"config.json": data, "preprocessor_config.json": self.image_processor.to_json()}
        return files | ({"vae_config.json": self.vae.to_json()} if self.vae else {})


LAYOUT = JsonLayout(
    name="config.json",
    source="a released JanusFlow, fetch it again",
    keys={
        "vision": "vision_und_enc_config.params",
        "gen_encoder": "vision_gen_enc_config.params",
        "gen_decoder": "vision_gen_dec_config.params",
        "latent_size": "generation.latent",
        "steps": "generation.steps",
        "guidance": "generation.guidance",
        "chat": "generation.talk",
    },
    # of our own making: no released config has the section
    defaults={"generation.steps": 30, "generation.guidance": 2.0, "generation.talk": {}},
    constants={
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "vision_und_enc_config.cls": "CLIPVisionTower",
        "vision_und_enc_config.model_type": "vision_und_enc",
        "vision_gen_enc_config.cls": "ShallowUViTEncoder",
        "vision_gen_enc_config.model_type": "vision_gen_enc",
        "vision_gen_dec_config.cls": "ShallowUViTDecoder",
        "vision_gen_dec_config.model_type": "vision_gen_dec",
    },
)
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
