"""Qwen2.5-VL's config: the released config files to and from numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from unimm.checkpoint.config_io import (
    JsonLayout,
    LayerCount,
    PositiveInt,
    read_config,
    read_section,
    read_value,
    write_config,
)
from unimm.checkpoint.json_files import at_place_of, read_json, read_preprocessor_json
from unimm.nn.decoder import DecoderConfig
from unimm.nn.layers import Activation
from unimm.processing.images.qwen2_vl import Qwen2VLImageProcessor
from unimm.vlms.llama_layout import (
    EXPERT,
    decoder_config_from_json,
    decoder_config_to_json,
    read_token_ids,
    rope_section,
)

# of the vision encoder's rotary embedding, which no config holds
VISION_ROPE_THETA = 10000.0
VISION_ROPE_TYPE = "axial"
MROPE_SECTION = (16, 24, 24)
# the defaults of Qwen2_5_VLTextConfig in transformers, which are not the numbers of the releases
TEXT_DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 8,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "qk_norm": False,
}
TOP_LAYOUT = JsonLayout(name="config.json", source="a released Qwen2.5-VL")


def read_qwen_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json, with the ids that end an answer of its generation_config.json as "generation_ends"."""
    files = read_json(folder / "config.json")
    eos_ids = read_json(folder / "generation_config.json").get("eos_token_id")
    return files if eos_ids is None else at_place_of(files, {**files, "generation_ends": eos_ids})


@dataclass(frozen=True, kw_only=True)
class QwenVisionConfig:
    """The numbers of the vision encoder."""

    dim: PositiveInt
    n_layers: LayerCount
    n_heads: PositiveInt
    mlp_dim: PositiveInt
    out_dim: PositiveInt
    patch_size: PositiveInt
    temporal_patch_size: PositiveInt  # frames of a patch
    spatial_merge_size: PositiveInt  # patches a side of a cell
    channels: PositiveInt
    window_size: PositiveInt  # pixels a side
    full_attention_layers: tuple[int, ...]  # whose attention is over whole frames, not windows
    tokens_per_second: PositiveInt  # rotary positions of a second of video
    act: Activation

    JSON: ClassVar = JsonLayout(
        name="the vision_config",
        source="that of a Qwen2.5-VL",
        keys={
            "dim": "hidden_size",
            "n_layers": "depth",
            "n_heads": "num_heads",
            "mlp_dim": "intermediate_size",
            "out_dim": "out_hidden_size",
            "patch_size": "patch_size",
            "temporal_patch_size": "temporal_patch_size",
            "spatial_merge_size": "spatial_merge_size",
            "channels": ("in_channels", "in_chans"),
            "window_size": "window_size",
            "full_attention_layers": "fullatt_block_indexes",
            "tokens_per_second": "tokens_per_second",
            "act": "hidden_act",
        },
        # those of Qwen2_5_VLVisionConfig in transformers
        defaults={
            "depth": 32,
            "num_heads": 16,
            "intermediate_size": 3420,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "in_channels": 3,
            "window_size": 112,
            "fullatt_block_indexes": (7, 15, 23, 31),
            "tokens_per_second": 4,
            "hidden_act": "silu",
        },
        constants={"model_type": "qwen2_5_vl"},
    )

    def __post_init__(self) -> None:
        if self.dim % self.n_heads or self.dim // self.n_heads % 4:
            raise ValueError(f"got vision width {self.dim}, {self.n_heads} heads: expected heads of a multiple of 4")
        cell_size = self.patch_size * self.spatial_merge_size
        if self.window_size < cell_size or not all(
            layer in range(self.n_layers) for layer in self.full_attention_layers
        ):
            raise ValueError(
                f"got windows of {self.window_size} pixels, full attention in layers {self.full_attention_layers}: "
                "expected "
                f"a cell ({cell_size} pixels) or more, and layers 0 to {self.n_layers - 1}"
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "QwenVisionConfig":
        """Read a released vision_config. Raises ValueError for missing keys, and for another rotary embedding."""
        rope = rope_section(data, cls.JSON, types=("default", VISION_ROPE_TYPE))
        if rope.get("rope_theta", VISION_ROPE_THETA) != VISION_ROPE_THETA:
            raise ValueError(
                f"got rope_parameters {dict(rope)} in the vision_config: expected a rope_theta of {VISION_ROPE_THETA:g}"
            )
        return read_config(cls, data, cls.JSON)

    def to_json(self) -> dict[str, Any]:
        """The mapping that `from_json` reads."""
        return write_config(self, self.JSON) | {"in_chans": self.channels}

    @property
    def window_cells(self) -> int:
        """Cells a side of a window."""
        return self.window_size // (self.patch_size * self.spatial_merge_size)


@dataclass(frozen=True, kw_only=True)
class QwenSpecialTokens:
    """The ids of special tokens, by default the released ones."""

    im_end: int = 151645  # ends every message
    vision_start: int = 151652
    vision_end: int = 151653
    image_pad: int = 151655
    video_pad: int = 151656
    other_eos: tuple[int, ...] = ()  # other ids that end an answer

    JSON: ClassVar = JsonLayout(
        keys={
            "im_end": "eos_token_id",
            "vision_start": "vision_start_token_id",
            "vision_end": "vision_end_token_id",
            "image_pad": "image_token_id",
            "video_pad": "video_token_id",
        },
    )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "QwenSpecialTokens":
        """Read a released config.json; "generation_ends" are those that generation_config.json names."""
        keys = ("eos_token_id", "generation_ends")
        eos = [one for key in keys for one in read_token_ids(data, key, layout=cls.JSON)]
        given: dict[str, Any] = {"other_eos": tuple(dict.fromkeys(one for one in eos if one != eos[0]))}
        return read_config(cls, data, cls.JSON, given=given | ({"im_end": eos[0]} if eos else {}))

    def to_json(self) -> dict[str, Any]:
        """The mapping that `from_json` reads."""
        eos = {"eos_token_id": [self.im_end, *self.other_eos]} if self.other_eos else {}
        return write_config(self, self.JSON) | eos

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return self.im_end, *self.other_eos


@dataclass(frozen=True, kw_only=True)
class QwenVLConfig:
    """The configs of the parts."""

    decoder: DecoderConfig
    vision: QwenVisionConfig
    special_tokens: QwenSpecialTokens
    image_processor: Qwen2VLImageProcessor

    def __post_init__(self) -> None:
        if self.vision.out_dim != self.decoder.dim:
            raise ValueError(
                f"got out_hidden_size {self.vision.out_dim} in the vision_config: expected {self.decoder.dim}"
            )
        if len(self.decoder.rope_sections) != 3:
            raise ValueError(
                f"got mrope_section {self.decoder.rope_sections}: expected three numbers: time, rows, columns"
            )

    @classmethod
    def from_folder(cls, folder: Path) -> "QwenVLConfig":
        """Read config.json, and preprocessor_config.json and generation_config.json, if they are there."""
        return cls.from_json(read_qwen_config(folder), read_preprocessor_json(folder))

    @classmethod
    def from_json(cls, files: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> "QwenVLConfig":
        """Read the contents of the released files; the text's numbers are at the top of config.json or in its
        text_config.
        """
        if "vision_config" not in files:
            raise ValueError(f"config.json describes no Qwen2.5-VL: expected a vision_config; found {', '.join(files)}")
        inner = read_section(files, "text_config", TOP_LAYOUT, required=False)
        text = at_place_of(inner or files, {**files, **inner})
        vision = QwenVisionConfig.from_json(read_section(files, "vision_config", TOP_LAYOUT))
        tied = read_value(text, "tie_word_embeddings", bool, False, layout=TOP_LAYOUT)
        return cls(
            decoder=decoder_config_from_json(
                text,
                qkv_bias=True,
                experts=(EXPERT,),
                rope_sections=MROPE_SECTION,
                # the top of config.json counts: the text_config's key describes the language model on its own
                tie_word_embeddings=read_value(files, "tie_word_embeddings", bool, tied, layout=TOP_LAYOUT),
                defaults=TEXT_DEFAULTS,
            ),
            vision=vision,
            special_tokens=QwenSpecialTokens.from_json(text),
            image_processor=Qwen2VLImageProcessor.from_json(
                preprocessor,
                patch_size=vision.patch_size,
                merge_size=vision.spatial_merge_size,
                temporal_patch_size=vision.temporal_patch_size,
            ),
        )

    def to_json(self) -> dict[str, dict[str, Any]]:
        """The contents of config.json and preprocessor_config.json."""
        top: dict[str, Any] = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
        text = decoder_config_to_json(self.decoder)
        del text["qk_norm"]
        rope = {"type": "mrope", "mrope_section": list(self.decoder.rope_sections)}
        top |= {**text, "rope_scaling": rope, "use_sliding_window": False, **self.special_tokens.to_json()}
        return {
            "config.json": top | {"vision_config": self.vision.to_json()},
            "preprocessor_config.json": self.image_processor.to_json(),
        }
