"""Janus's config: the released config files to and from numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from unimm.checkpoint.config_io import JsonLayout, PositiveInt, read_config, read_section, read_value, write_config
from unimm.checkpoint.json_files import read_json, read_preprocessor_json
from unimm.encoders.timm_vit import TimmEncoderConfig
from unimm.generation.image_tokens import ImageTokenSampling
from unimm.models.common.deepseek_processor import DeepseekChatConfig, check_image_size
from unimm.models.janus.transformers_layout import original_from_transformers
from unimm.nn.decoder import DecoderConfig
from unimm.processing.images.deepseek_vl import DeepseekVLImageProcessor
from unimm.tokenizers.vq import VQConfig
from unimm.vlms.llama_layout import EXPERT, decoder_config_to_json, llama_config_from_json


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """The numbers of a projector: `depth` linears with exact GELU between them; 0 for the identity."""

    depth: Annotated[int, range(101)]
    dim_in: PositiveInt
    dim_out: PositiveInt

    DEPTH_BY_TYPE: ClassVar = {"identity": 0, "linear": 1, "mlp_gelu": 2}

    JSON: ClassVar = JsonLayout(
        name="the config of a projector",
        source="the released params",
        keys={"depth": "depth", "dim_in": "input_dim", "dim_out": "n_embed"},
        defaults={"depth": 2},
    )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ProjectorConfig":
        """Read the params of a released aligner_config."""
        kinds = Annotated[str, tuple(cls.DEPTH_BY_TYPE)]
        projector_type = read_value(data, "projector_type", kinds, "mlp_gelu", layout=cls.JSON)
        given = {}
        if projector_type != "mlp_gelu":
            given["depth"] = cls.DEPTH_BY_TYPE[projector_type]
        return read_config(cls, data, cls.JSON, given=given)

    def to_json(self) -> dict[str, Any]:
        """The mapping that `from_json` reads."""
        types = {depth: name for name, depth in self.DEPTH_BY_TYPE.items()}
        projector_type = types.get(self.depth, "mlp_gelu")
        return {"projector_type": projector_type} | write_config(self, self.JSON) | {"depth": self.depth or 1}


@dataclass(frozen=True, kw_only=True)
class JanusConfig:
    """The configs of the parts, and the defaults of generation."""

    decoder: DecoderConfig
    vision: TimmEncoderConfig
    aligner: ProjectorConfig
    gen_aligner: ProjectorConfig
    gen_head_dim: PositiveInt  # width inside the head that predicts image tokens
    vq: VQConfig
    image_processor: DeepseekVLImageProcessor  # of the images to understand
    image_size: tuple[
        PositiveInt, PositiveInt
    ]  # (height, width) of generated images, the one that the model was trained for
    guidance: float
    image_sampling: ImageTokenSampling
    chat: DeepseekChatConfig

    def __post_init__(self) -> None:
        stride = self.vq.stride
        dim = self.decoder.dim
        if len(self.image_size) != 2 or min(self.image_size) < 1 or any(side % stride for side in self.image_size):
            raise ValueError(
                f"got the size {self.image_size} to generate: expected (height, width) in multiples of {stride}"
            )
        check_image_size(self.image_processor, self.vision)
        for name, got, expected in (
            ("aligner", self.aligner.dim_out, dim),
            ("gen_aligner", self.gen_aligner.dim_out, dim),
            ("gen_aligner's input", self.gen_aligner.dim_in, self.vq.code_dim),
        ):
            if got != expected:
                raise ValueError(
                    f"got a width of {got} in the config of the {name}: expected {expected}, as the part that it "
                    "adjoins has"
                )

    @property
    def token_grid(self) -> tuple[int, int]:
        """(rows, columns) of an image's tokens."""
        return self.image_size[0] // self.vq.stride, self.image_size[1] // self.vq.stride

    @classmethod
    def from_folder(cls, folder: Path) -> "JanusConfig":
        """Read config.json, of either layout, and preprocessor_config.json, if it is there."""
        files = read_json(folder / "config.json")
        if "vision_config" not in files:
            raise ValueError(
                f"{folder}/config.json describes no Janus: expected a vision_config; found {', '.join(files)}"
            )
        if "text_config" in files:
            return cls.from_json(original_from_transformers(files), read_preprocessor_json(folder))
        return cls.from_json(files, read_preprocessor_json(folder))

    @classmethod
    def from_json(cls, data: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> "JanusConfig":
        """Read the contents of the original layout's files. Raises ValueError for missing keys."""
        language = read_section(data, "language_config", LAYOUT)
        vision = TimmEncoderConfig.from_json(read_section(data, "vision_config.params", LAYOUT))
        size = vision.image_size
        given = {
            "decoder": llama_config_from_json(language, expert=EXPERT),
            "vision": vision,
            "image_processor": DeepseekVLImageProcessor.from_json(preprocessor, size=size),
        }
        layout = replace(LAYOUT, defaults={**LAYOUT.defaults, "generation.size": [size, size]})
        return read_config(cls, data, layout, given=given)

    def to_json(self) -> dict[str, dict[str, Any]]:
        """The contents of the original layout's config.json and preprocessor_config.json."""
        language = decoder_config_to_json(self.decoder) | {"model_type": "llama"}
        data = write_config(self, LAYOUT) | {"language_config": language}
        return {"config.json": data, "preprocessor_config.json": self.image_processor.to_json()}


LAYOUT = JsonLayout(
    name="config.json",
    source="a released Janus, fetch it again",
    keys={
        "vision": "vision_config.params",
        "aligner": "aligner_config.params",
        "gen_aligner": "gen_aligner_config.params",
        "gen_head_dim": "gen_head_config.params.image_token_embed",
        "vq": "gen_vision_config.params",
        "image_size": "generation.size",
        "guidance": "generation.guidance",
        "image_sampling": "generation.sampling",
        "chat": "generation.talk",
    },
    # of our own making: no released config has the section
    defaults={"generation.guidance": 5.0, "generation.sampling": {}, "generation.talk": {}},
    fixed={"gen_vision_config.cls": "VQ-16"},
    derived={"gen_head_config.params.image_token_size": "vq.n_codes", "gen_head_config.params.n_embed": "decoder.dim"},
    constants={
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "vision_config.cls": "CLIPVisionTower",
        "vision_config.model_type": "vision",
        "aligner_config.cls": "MlpProjector",
        "aligner_config.model_type": "aligner",
        "gen_vision_config.model_type": "gen_vision",
        "gen_aligner_config.cls": "MlpProjector",
        "gen_aligner_config.model_type": "gen_aligner",
        "gen_head_config.cls": "vision_head",
        "gen_head_config.model_type": "gen_head",
    },
)
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
