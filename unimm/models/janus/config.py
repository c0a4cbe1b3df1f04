"""Janus's config: the released config files to and from numbers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from unimm.checkpoint.config_io import read_json
from unimm.encoders.timm_vit import TimmEncoderConfig
from unimm.generation.image_tokens import ImageTokenSampling
from unimm.models.common.deepseek_processor import DeepseekChatConfig
from unimm.models.janus.transformers_layout import original_from_transformers
from unimm.nn.decoder import DecoderConfig
from unimm.processing.images.deepseek_vl import DeepseekVLImageProcessor
from unimm.tokenizers.vq import VQConfig
from unimm.vlms.llama_layout import decoder_config_to_json, llama_config_from_json

EXPERT = "all"


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """`depth` linears with erf GELU between them; 0: nothing at all."""

    depth: int
    dim_in: int
    dim_out: int

    DEPTH_BY_TYPE: ClassVar = {"identity": 0, "linear": 1, "mlp_gelu": 2}

    @classmethod
    def from_json(cls, files: Mapping[str, Any]) -> "ProjectorConfig":
        """Read the params of a released aligner_config."""
        kind = files.get("projector_type", "mlp_gelu")
        if kind not in cls.DEPTH_BY_TYPE:
            raise ValueError(
                f"got projector_type {kind!r} in the config: expected one of {', '.join(cls.DEPTH_BY_TYPE)}"
            )
        depth = files.get("depth", 2) if kind == "mlp_gelu" else cls.DEPTH_BY_TYPE[kind]
        return cls(depth=depth, dim_in=files["input_dim"], dim_out=files["n_embed"])

    def to_json(self) -> dict[str, Any]:
        """The mapping that `from_json` reads."""
        kind = next((name for name, depth in self.DEPTH_BY_TYPE.items() if depth == self.depth), "mlp_gelu")
        return {"projector_type": kind, "depth": self.depth or 1, "input_dim": self.dim_in, "n_embed": self.dim_out}


@dataclass(frozen=True, kw_only=True)
class JanusConfig:
    decoder: DecoderConfig
    vision: TimmEncoderConfig
    aligner: ProjectorConfig
    gen_aligner: ProjectorConfig
    gen_head_dim: int  # width inside the head that predicts codes
    vq: VQConfig
    image_processor: DeepseekVLImageProcessor  # the rule for pictures that are looked at
    image_size: tuple[int, int]  # (height, width) of what is drawn: the one that the model was trained for
    guidance: float
    image_sampling: ImageTokenSampling
    chat: DeepseekChatConfig

    def __post_init__(self) -> None:
        stride, d = self.vq.stride, self.decoder.dim
        if len(self.image_size) != 2 or min(self.image_size) < 1 or any(side % stride for side in self.image_size):
            raise ValueError(
                f"got the size {self.image_size} to draw: expected (height, width) in multiples of {stride}"
            )
        if self.image_processor.size != self.vision.image_size:
            raise ValueError(
                f"got pictures of {self.image_processor.size} pixels a side for a tower of {self.vision.image_size}: expected the same; "
                "correct image_size in preprocessor_config.json or in the vision_config"
            )
        for name, got, expected in (
            ("aligner", self.aligner.dim_out, d),
            ("gen_aligner", self.gen_aligner.dim_out, d),
            ("gen_aligner's input", self.gen_aligner.dim_in, self.vq.code_dim),
        ):
            if got != expected:
                raise ValueError(
                    f"got a width of {got} in the config of the {name}: expected {expected}, as what it meets has"
                )

    @property
    def token_grid(self) -> tuple[int, int]:
        """Codes of a picture, (rows, columns)."""
        return self.image_size[0] // self.vq.stride, self.image_size[1] // self.vq.stride

    @classmethod
    def from_folder(cls, folder: Path) -> "JanusConfig":
        """Read config.json, of either layout, and preprocessor_config.json, if it is there."""
        files, look = (read_json(folder / name) for name in ("config.json", "preprocessor_config.json"))
        if "vision_config" not in files:
            raise ValueError(
                f"{folder}/config.json describes no Janus: expected a vision_config; found {', '.join(files)}"
            )
        files = original_from_transformers(files) if "text_config" in files else files
        if lost := [part for part in REQUIRED_PARTS if part not in files]:
            raise ValueError(f"{folder}/config.json lacks {', '.join(lost)}: fetch it again")
        return cls.from_json(files, look)

    @classmethod
    def from_json(cls, files: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> "JanusConfig":
        """From the contents of the original layout's files."""
        vision_params, vq = files["vision_config"]["params"], files["gen_vision_config"]
        size = vision_params["image_size"]
        head, more = files["gen_head_config"]["params"], files.get("generation", {})
        return cls(
            decoder=llama_config_from_json(files["language_config"], expert=EXPERT),
            vision=TimmEncoderConfig.from_json(vision_params),
            aligner=ProjectorConfig.from_json(files["aligner_config"]["params"]),
            gen_aligner=ProjectorConfig.from_json(files["gen_aligner_config"]["params"]),
            gen_head_dim=head["image_token_embed"],
            vq=VQConfig.from_json(vq["params"], vq["cls"]),
            image_processor=DeepseekVLImageProcessor.from_json(preprocessor, size=size),
            image_size=tuple(more.get("size", (size, size))),
            guidance=more.get("guidance", 5.0),
            image_sampling=ImageTokenSampling(**more.get("sampling", {})),
            chat=DeepseekChatConfig(**more.get("talk", {})),
        )

    def to_json(self) -> dict[str, dict[str, Any]]:
        """The contents of the original layout's config.json and preprocessor_config.json."""
        d, vq = self.decoder.dim, self.vq.to_json()
        head = {"image_token_embed": self.gen_head_dim, "image_token_size": self.vq.n_codes, "n_embed": d}
        top = {
            "architectures": ["MultiModalityCausalLM"],
            "model_type": "multi_modality",
            "vision_config": {"cls": "CLIPVisionTower", "model_type": "vision", "params": self.vision.to_json()},
            "aligner_config": {"cls": "MlpProjector", "model_type": "aligner", "params": self.aligner.to_json()},
            "gen_vision_config": {"cls": "VQ-16", "model_type": "gen_vision", "params": vq},
            "gen_aligner_config": {
                "cls": "MlpProjector",
                "model_type": "gen_aligner",
                "params": self.gen_aligner.to_json(),
            },
            "gen_head_config": {"cls": "vision_head", "model_type": "gen_head", "params": head},
            "language_config": decoder_config_to_json(self.decoder) | {"model_type": "llama"},
            "generation": {"size": list(self.image_size), "guidance": self.guidance}
            | {"sampling": asdict(self.image_sampling), "talk": asdict(self.chat)},
        }
        return {"config.json": top, "preprocessor_config.json": self.image_processor.to_json()}


WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


REQUIRED_PARTS = ("aligner_config", "gen_vision_config", "gen_aligner_config", "gen_head_config", "language_config")
