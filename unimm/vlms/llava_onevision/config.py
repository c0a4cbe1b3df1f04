"""LLaVA-OneVision's config: the released config files to and from numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from unimm.checkpoint.config_io import JsonLayout, read_config, read_section, read_value, write_config
from unimm.checkpoint.json_files import read_json, read_preprocessor_json
from unimm.encoders.siglip import SiglipConfig
from unimm.nn.decoder import DecoderConfig
from unimm.nn.layers import Activation
from unimm.processing.images.llava_onevision import LlavaOnevisionImageProcessor, Size
from unimm.vlms.llama_layout import EXPERT, decoder_config_from_json, decoder_config_to_json, read_token_ids

# the defaults of Qwen2Config in transformers
TEXT_DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "qk_norm": False,
}
GRID_PINPOINTS = tuple((384 * h, 384 * w) for h in range(1, 7) for w in range(1, 7))  # of every release
ASPECT_RATIO_PREFIX = "anyres_max_"


@dataclass(frozen=True, kw_only=True)
class LlavaSpecialTokens:
    """The ids of special tokens, by default the released ones."""

    im_end: int = 151645
    image: int = 151646
    video: int = 151647

    JSON: ClassVar = JsonLayout(
        name="config.json",
        source="every release",
        keys={name: (f"{name}_token_index", f"{name}_token_id") for name in ("image", "video")},
    )

    @classmethod
    def from_json(cls, files: Mapping[str, Any], text: Mapping[str, Any]) -> "LlavaSpecialTokens":
        """Read a released config.json and its text_config."""
        keys = ("eos_token_id",)
        eos = [one for part in (text, files) for key in keys for one in read_token_ids(part, key, layout=cls.JSON)]
        return read_config(cls, files, cls.JSON, given={"im_end": eos[0] if eos else cls.im_end})

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return (self.im_end,)


@dataclass(frozen=True, kw_only=True)
class LlavaConfig:
    """The configs of the parts, and the activation of the projector."""

    decoder: DecoderConfig
    vision: SiglipConfig
    special_tokens: LlavaSpecialTokens
    image_processor: LlavaOnevisionImageProcessor
    projector_act: Activation

    # of config.json, but for the parts
    JSON: ClassVar = JsonLayout(
        name="config.json",
        source="every release",
        keys={"projector_act": "projector_hidden_act"},
        defaults={"projector_hidden_act": "gelu"},
        fixed={
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "multimodal_projector_bias": True,
            "use_image_newline_parameter": True,
        },
        constants={"architectures": ["LlavaOnevisionForConditionalGeneration"], "model_type": "llava_onevision"},
    )

    @classmethod
    def from_folder(cls, folder: Path) -> "LlavaConfig":
        """Read config.json, and preprocessor_config.json, if it is there."""
        return cls.from_json(read_json(folder / "config.json"), read_preprocessor_json(folder))

    @classmethod
    def from_json(cls, files: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> "LlavaConfig":
        """Read the contents of the released files. Raises ValueError for what no release has."""
        model_type = files.get("model_type") or "llava_onevision"
        if model_type != "llava_onevision" or not {"vision_config", "text_config"} <= files.keys():
            raise ValueError(
                f"config.json describes no LLaVA-OneVision: expected model_type 'llava_onevision', a text_config and a "
                f"vision_config; got {model_type!r} and {', '.join(files)}"
            )
        aspect = str(files.get("vision_aspect_ratio", ASPECT_RATIO_PREFIX + "9"))
        if not aspect.startswith(ASPECT_RATIO_PREFIX) or not aspect.removeprefix(ASPECT_RATIO_PREFIX).isdigit():
            raise ValueError(
                f"got vision_aspect_ratio {aspect!r}: expected '{ASPECT_RATIO_PREFIX}9', as in every release"
            )
        text, vision_section = (read_section(files, f"{name}_config", cls.JSON) for name in ("text", "vision"))
        vision = SiglipConfig.from_json(vision_section)
        grids = read_value(files, "image_grid_pinpoints", tuple[Size, ...], (), layout=cls.JSON) or GRID_PINPOINTS
        # older files have the key in the text_config, newer ones at the top
        tied = any(read_value(one, "tie_word_embeddings", bool, False, layout=cls.JSON) for one in (files, text))
        if text.get("model_type", "qwen2") != "qwen2":
            raise ValueError(
                f"the text_config asks for model_type {text['model_type']!r:.80}: expected a plain Qwen2, as every "
                "release up to 72B has"
            )
        given = {
            "decoder": decoder_config_from_json(
                text, qkv_bias=True, experts=(EXPERT,), tie_word_embeddings=tied, defaults=TEXT_DEFAULTS
            ),
            "vision": vision,
            "special_tokens": LlavaSpecialTokens.from_json(files, text),
            "image_processor": LlavaOnevisionImageProcessor.from_json(
                preprocessor,
                tile_size=vision.image_size,
                tile_side=vision.grid_side,
                grid_pinpoints=grids,
                max_tiles=int(aspect.removeprefix(ASPECT_RATIO_PREFIX)),
            ),
        }
        return read_config(cls, files, cls.JSON, given=given)

    def to_json(self) -> dict[str, dict[str, Any]]:
        """The contents of config.json and preprocessor_config.json."""
        text = decoder_config_to_json(self.decoder) | {
            "model_type": "qwen2",
            "eos_token_id": self.special_tokens.im_end,
        }
        del text["qk_norm"]
        parts: dict[str, Any] = {
            "image_token_index": self.special_tokens.image,
            "video_token_index": self.special_tokens.video,
            "vision_aspect_ratio": f"{ASPECT_RATIO_PREFIX}{self.image_processor.max_tiles}",
            "image_grid_pinpoints": [list(grid) for grid in self.image_processor.grid_pinpoints],
            "text_config": text,
            "vision_config": self.vision.to_json(),
            "tie_word_embeddings": self.decoder.tie_word_embeddings,
        }
        top = write_config(self, self.JSON) | parts
        return {"config.json": top, "preprocessor_config.json": self.image_processor.to_json()}
