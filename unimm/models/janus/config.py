"""Janus's config: the released config files to and from numbers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from unimm.checkpoint.config_io import read_json
from unimm.encoders.timm_vit import TowerConfig
from unimm.generation.image_tokens import CodeSampling
from unimm.models.common.deepseek_processor import Talk
from unimm.models.janus.transformers_layout import original_config
from unimm.nn.decoder import DecoderConfig
from unimm.processing.images.deepseek_vl import PadSquare
from unimm.tokenizers.vq import VQConfig

STREAM = "all"


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """`depth` linears with erf GELU between them; 0: nothing at all."""

    depth: int
    dim_in: int
    dim_out: int

    DEPTHS: ClassVar = {"identity": 0, "linear": 1, "mlp_gelu": 2}

    @classmethod
    def from_files(cls, files: Mapping[str, Any]) -> "ProjectorConfig":
        """Read the params of a released aligner_config."""
        kind = files.get("projector_type", "mlp_gelu")
        if kind not in cls.DEPTHS:
            raise ValueError(f"got projector_type {kind!r} in the config: expected one of {', '.join(cls.DEPTHS)}")
        depth = files.get("depth", 2) if kind == "mlp_gelu" else cls.DEPTHS[kind]
        return cls(depth=depth, dim_in=files["input_dim"], dim_out=files["n_embed"])

    def to_files(self) -> dict[str, Any]:
        """The mapping that `from_files` reads."""
        kind = next((name for name, depth in self.DEPTHS.items() if depth == self.depth), "mlp_gelu")
        return {"projector_type": kind, "depth": self.depth or 1, "input_dim": self.dim_in, "n_embed": self.dim_out}


@dataclass(frozen=True, kw_only=True)
class JanusConfig:
    decoder: DecoderConfig
    tower: TowerConfig
    aligner: ProjectorConfig
    code_aligner: ProjectorConfig
    code_head: int  # width inside the head that predicts codes
    vq: VQConfig
    pixels: PadSquare  # the rule for pictures that are looked at
    size: tuple[int, int]  # (height, width) of what is drawn: the one that the model was trained for
    guidance: float
    sampling: CodeSampling
    talk: Talk

    def __post_init__(self) -> None:
        stride, d = self.vq.stride, self.decoder.dim
        if len(self.size) != 2 or min(self.size) < 1 or any(side % stride for side in self.size):
            raise ValueError(f"got the size {self.size} to draw: expected (height, width) in multiples of {stride}")
        if self.pixels.size != self.tower.size:
            raise ValueError(
                f"got pictures of {self.pixels.size} pixels a side for a tower of {self.tower.size}: expected the same; "
                "correct image_size in preprocessor_config.json or in the vision_config"
            )
        for name, got, expected in (
            ("aligner", self.aligner.dim_out, d),
            ("gen_aligner", self.code_aligner.dim_out, d),
            ("gen_aligner's input", self.code_aligner.dim_in, self.vq.code_dim),
        ):
            if got != expected:
                raise ValueError(
                    f"got a width of {got} in the config of the {name}: expected {expected}, as what it meets has"
                )

    @property
    def grid(self) -> tuple[int, int]:
        """Codes of a picture, (rows, columns)."""
        return self.size[0] // self.vq.stride, self.size[1] // self.vq.stride

    @classmethod
    def from_folder(cls, folder: Path) -> "JanusConfig":
        """Read config.json, of either layout, and preprocessor_config.json, if it is there."""
        files, look = (read_json(folder / name) for name in ("config.json", "preprocessor_config.json"))
        if "vision_config" not in files:
            raise ValueError(
                f"{folder}/config.json describes no Janus: expected a vision_config; found {', '.join(files)}"
            )
        files = original_config(files) if "text_config" in files else files
        if lost := [part for part in PARTS if part not in files]:
            raise ValueError(f"{folder}/config.json lacks {', '.join(lost)}: fetch it again")
        return cls.from_files(files, look)

    @classmethod
    def from_files(cls, files: Mapping[str, Any], look: Mapping[str, Any]) -> "JanusConfig":
        """From the contents of the original layout's files."""
        vision, vq = files["vision_config"]["params"], files["gen_vision_config"]
        size = vision["image_size"]
        head, more = files["gen_head_config"]["params"], files.get("generation", {})
        return cls(
            decoder=DecoderConfig.from_llama(files["language_config"], stream=STREAM),
            tower=TowerConfig.from_files(vision),
            aligner=ProjectorConfig.from_files(files["aligner_config"]["params"]),
            code_aligner=ProjectorConfig.from_files(files["gen_aligner_config"]["params"]),
            code_head=head["image_token_embed"],
            vq=VQConfig.from_files(vq["params"], vq["cls"]),
            pixels=PadSquare.from_files(look, size=size),
            size=tuple(more.get("size", (size, size))),
            guidance=more.get("guidance", 5.0),
            sampling=CodeSampling(**more.get("sampling", {})),
            talk=Talk(**more.get("talk", {})),
        )

    def to_files(self) -> dict[str, dict[str, Any]]:
        """The contents of the original layout's config.json and preprocessor_config.json."""
        d, vq = self.decoder.dim, self.vq.to_files()
        head = {"image_token_embed": self.code_head, "image_token_size": self.vq.n_codes, "n_embed": d}
        top = {
            "architectures": ["MultiModalityCausalLM"],
            "model_type": "multi_modality",
            "vision_config": {"cls": "CLIPVisionTower", "model_type": "vision", "params": self.tower.to_files()},
            "aligner_config": {"cls": "MlpProjector", "model_type": "aligner", "params": self.aligner.to_files()},
            "gen_vision_config": {"cls": "VQ-16", "model_type": "gen_vision", "params": vq},
            "gen_aligner_config": {
                "cls": "MlpProjector",
                "model_type": "gen_aligner",
                "params": self.code_aligner.to_files(),
            },
            "gen_head_config": {"cls": "vision_head", "model_type": "gen_head", "params": head},
            "language_config": self.decoder.to_files() | {"model_type": "llama"},
            "generation": {"size": list(self.size), "guidance": self.guidance}
            | {"sampling": asdict(self.sampling), "talk": asdict(self.talk)},
        }
        return {"config.json": top, "preprocessor_config.json": self.pixels.to_files()}


WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


PARTS = ("aligner_config", "gen_vision_config", "gen_aligner_config", "gen_head_config", "language_config")
