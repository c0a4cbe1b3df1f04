"""LLaVA-OneVision's config: the released config files to and from numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from unimm.checkpoint.config_io import read_json
from unimm.encoders.siglip import SiglipConfig
from unimm.nn.decoder import DecoderConfig
from unimm.processing.images.llava_onevision import AnyRes, Size
from unimm.vlms.base import STREAM, given

# what Qwen2Config says where a text_config is silent
SILENT = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
GRIDS = tuple((384 * h, 384 * w) for h in range(1, 7) for w in range(1, 7))  # of every release
ASPECT = "anyres_max_"


@dataclass(frozen=True, kw_only=True)
class LlavaMarkers:
    """Ids that the format needs; the released ones where a config is silent."""

    end: int = 151645
    image: int = 151646
    video: int = 151647

    @classmethod
    def from_files(cls, files: Mapping[str, Any], text: Mapping[str, Any]) -> "LlavaMarkers":
        """Read a released config.json and its text_config."""
        end = text.get("eos_token_id") or files.get("eos_token_id") or cls.end
        found = {ours: files.get(f"{ours}_token_index", files.get(f"{ours}_token_id")) for ours in ("image", "video")}
        known = {name: value for name, value in found.items() if value is not None}
        return cls(end=end[0] if isinstance(end, list) else end, **known)

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return (self.end,)


@dataclass(frozen=True, kw_only=True)
class LlavaConfig:
    decoder: DecoderConfig
    vision: SiglipConfig
    markers: LlavaMarkers
    pixels: AnyRes
    act: str  # of the projector

    # what a config could say and the released ones do not
    FIXED: ClassVar = {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "multimodal_projector_bias": True,
        "use_image_newline_parameter": True,
    }

    @classmethod
    def from_folder(cls, folder: Path) -> "LlavaConfig":
        """Read config.json, and preprocessor_config.json, if it is there."""
        return cls.from_files(*(read_json(folder / name) for name in ("config.json", "preprocessor_config.json")))

    @classmethod
    def from_files(cls, files: Mapping[str, Any], look: Mapping[str, Any]) -> "LlavaConfig":
        """From the contents of the released files. Raises ValueError for what no release has."""
        kind = files.get("model_type", "llava_onevision")
        if kind != "llava_onevision" or not {"vision_config", "text_config"} <= files.keys():
            raise ValueError(
                f"config.json describes no LLaVA-OneVision: expected model_type 'llava_onevision', a text_config and a "
                f"vision_config; got {kind!r} and {', '.join(files)}"
            )
        for key, expected in cls.FIXED.items():
            if files.get(key, expected) != expected:
                raise ValueError(f"got {key} {files[key]!r}, expected {expected!r}, as in every release")
        aspect = str(files.get("vision_aspect_ratio", ASPECT + "9"))
        if not aspect.startswith(ASPECT) or not aspect.removeprefix(ASPECT).isdigit():
            raise ValueError(f"got vision_aspect_ratio {aspect!r}: expected '{ASPECT}9', as in every release")
        vision = SiglipConfig.from_files(files["vision_config"])
        grids: tuple[Size, ...] = tuple((h, w) for h, w in files.get("image_grid_pinpoints") or GRIDS)
        return cls(
            decoder=_decoder(given(files["text_config"]), tied=files.get("tie_word_embeddings") or False),
            vision=vision,
            markers=LlavaMarkers.from_files(given(files), given(files["text_config"])),
            pixels=AnyRes.from_files(
                look, size=vision.size, side=vision.side, grids=grids, most=int(aspect.removeprefix(ASPECT))
            ),
            act=files.get("projector_hidden_act", "gelu"),
        )

    def to_files(self) -> dict[str, dict[str, Any]]:
        """The contents of config.json and preprocessor_config.json."""
        text = self.decoder.to_files() | {"model_type": "qwen2", "eos_token_id": self.markers.end}
        del text["qk_norm"]
        top: dict[str, Any] = {
            "architectures": ["LlavaOnevisionForConditionalGeneration"],
            "model_type": "llava_onevision",
        }
        top |= {"image_token_index": self.markers.image, "video_token_index": self.markers.video}
        top |= {"projector_hidden_act": self.act, "vision_aspect_ratio": f"{ASPECT}{self.pixels.most}"}
        top |= {"image_grid_pinpoints": [list(grid) for grid in self.pixels.grids]} | self.FIXED
        top |= {"text_config": text, "vision_config": self.vision.to_files(), "tie_word_embeddings": self.decoder.tied}
        return {"config.json": top, "preprocessor_config.json": self.pixels.to_files()}


def _decoder(text: Mapping[str, Any], *, tied: bool) -> DecoderConfig:
    turning = {**text.get("rope_scaling", {}), **text.get("rope_parameters", {})}
    kinds = {turning.get(name, "default") for name in ("type", "rope_type")} - {"default"}
    if kinds or text.get("use_sliding_window") or text.get("model_type", "qwen2") != "qwen2":
        asked = {name: text.get(name) for name in ("model_type", "rope_scaling", "use_sliding_window") if name in text}
        raise ValueError(f"the text_config asks for {asked}: expected a plain Qwen2, as every release up to 72B has")
    files = {"qk_norm": False, **SILENT, **text}
    files |= {"rope_theta": turning.get("rope_theta", files["rope_theta"])}
    # older files tie by the text_config's word, newer ones by that of the whole
    return DecoderConfig.from_files(
        files, qkv_bias=True, streams=(STREAM,), tied=tied or bool(text.get("tie_word_embeddings", False))
    )
