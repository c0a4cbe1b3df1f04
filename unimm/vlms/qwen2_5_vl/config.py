"""Qwen2.5-VL's config: the released config files to and from numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from unimm.checkpoint.config_io import read_json
from unimm.nn.decoder import DecoderConfig
from unimm.processing.images.qwen2_vl import SmartResize
from unimm.vlms.base import STREAM, given

THETA, AXIAL = 10000.0, "axial"  # of the tower's rotary angles
SECTIONS = (16, 24, 24)
# what transformers takes where a config is silent, which is not what the releases say
SILENT = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 8,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


def with_ends(folder: Path) -> dict[str, Any]:
    """A folder's config.json, in which generation_config.json has its say about the ids that end an answer."""
    files, ends = read_json(folder / "config.json"), read_json(folder / "generation_config.json").get("eos_token_id")
    return files if ends is None else {**files, "generation_ends": ends}


@dataclass(frozen=True, kw_only=True)
class QwenVisionConfig:
    dim: int
    n_layers: int
    n_heads: int
    mlp_dim: int
    out: int
    patch: int
    frames: int  # of a patch
    merge: int  # patches a side of a cell
    channels: int
    window: int  # pixels a side
    full: tuple[int, ...]  # layers that see all of a frame
    ticks: int  # steps of the rotary clock in a second of video
    act: str

    FILES: ClassVar = {
        "dim": "hidden_size",
        "n_layers": "depth",
        "n_heads": "num_heads",
        "mlp_dim": "intermediate_size",
        "out": "out_hidden_size",
        "patch": "patch_size",
        "frames": "temporal_patch_size",
        "merge": "spatial_merge_size",
        "channels": "in_channels",
        "window": "window_size",
        "full": "fullatt_block_indexes",
        "ticks": "tokens_per_second",
        "act": "hidden_act",
    }
    # what transformers takes where a config is silent
    SILENT: ClassVar = {
        "depth": 32,
        "num_heads": 16,
        "intermediate_size": 3420,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": (7, 15, 23, 31),
        "tokens_per_second": 4,
        "hidden_act": "silu",
    }

    def __post_init__(self) -> None:
        if self.dim % self.n_heads or self.dim // self.n_heads % 4:
            raise ValueError(f"got vision width {self.dim}, {self.n_heads} heads: expected heads of a multiple of 4")
        if self.window < self.patch * self.merge or not set(self.full) <= set(range(self.n_layers)):
            raise ValueError(
                f"got windows of {self.window} pixels, full attention in layers {self.full}: expected a cell "
                f"({self.patch * self.merge} pixels) or more, and layers 0 to {self.n_layers - 1}"
            )

    @classmethod
    def from_files(cls, files: Mapping[str, Any]) -> "QwenVisionConfig":
        """Read a released vision_config. Raises ValueError for one that lacks a number, or that turns by another theta."""
        turning = files.get("rope_parameters") or {}
        if turning.get("rope_theta", THETA) != THETA or turning.get("rope_type", AXIAL) not in (AXIAL, "default"):
            raise ValueError(f"got rope_parameters {turning} in the vision_config: expected a rope_theta of {THETA:g}")
        channels = files.get("in_channels", files.get("in_chans", 3))
        files = {**cls.SILENT, **files, "in_channels": channels}
        if lost := [theirs for theirs in cls.FILES.values() if theirs not in files]:
            raise ValueError(f"the vision_config lacks {', '.join(lost)}: expected that of a Qwen2.5-VL")
        fields = {ours: files[theirs] for ours, theirs in cls.FILES.items()}
        return cls(**fields | {"full": tuple(fields["full"])})

    def to_files(self) -> dict[str, Any]:
        """The mapping that `from_files` reads."""
        files = {theirs: getattr(self, ours) for ours, theirs in self.FILES.items()}
        return files | {"fullatt_block_indexes": list(self.full), "in_chans": self.channels, "model_type": "qwen2_5_vl"}

    @property
    def span(self) -> int:
        """Cells a side of a window."""
        return self.window // (self.patch * self.merge)


@dataclass(frozen=True, kw_only=True)
class QwenMarkers:
    """Ids that the format needs; the released ones where a config is silent."""

    end: int = 151645  # behind every turn
    look: int = 151652
    looked: int = 151653
    image: int = 151655
    video: int = 151656
    others: tuple[int, ...] = ()  # that end an answer, too

    FILES: ClassVar = {
        "end": "eos_token_id",
        "look": "vision_start_token_id",
        "looked": "vision_end_token_id",
        "image": "image_token_id",
        "video": "video_token_id",
    }

    @classmethod
    def from_files(cls, files: Mapping[str, Any]) -> "QwenMarkers":
        """Read a released config.json; "generation_ends" are those that generation_config.json names."""
        found = {ours: files[theirs] for ours, theirs in cls.FILES.items() if files.get(theirs) is not None}
        ends = [one for key in ("eos_token_id", "generation_ends") for one in _listed(files.get(key))]
        found |= {"end": ends[0]} if ends else {}
        return cls(**found, others=tuple(dict.fromkeys(one for one in ends if one != ends[0])))

    def to_files(self) -> dict[str, Any]:
        """The mapping that `from_files` reads."""
        files: dict[str, Any] = {theirs: getattr(self, ours) for ours, theirs in self.FILES.items()}
        return files | ({"eos_token_id": [self.end, *self.others]} if self.others else {})

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return self.end, *self.others


def _listed(ids: int | Sequence[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


@dataclass(frozen=True, kw_only=True)
class QwenVLConfig:
    decoder: DecoderConfig
    vision: QwenVisionConfig
    markers: QwenMarkers
    pixels: SmartResize

    def __post_init__(self) -> None:
        if self.vision.out != self.decoder.dim:
            raise ValueError(f"got out_hidden_size {self.vision.out} in the vision_config: expected {self.decoder.dim}")
        if len(self.decoder.rope_sections) != 3:
            raise ValueError(
                f"got mrope_section {self.decoder.rope_sections}: expected three numbers: time, rows, columns"
            )

    @classmethod
    def from_folder(cls, folder: Path) -> "QwenVLConfig":
        """Read config.json, and preprocessor_config.json and generation_config.json, if they are there."""
        return cls.from_files(with_ends(folder), read_json(folder / "preprocessor_config.json"))

    @classmethod
    def from_files(cls, files: Mapping[str, Any], look: Mapping[str, Any]) -> "QwenVLConfig":
        """From the contents of the released files, the text's numbers at the top of config.json or in its text_config."""
        if "vision_config" not in files:
            raise ValueError(f"config.json describes no Qwen2.5-VL: expected a vision_config; found {', '.join(files)}")
        text = {**SILENT, **given(files), **given(files.get("text_config", {}))}
        turning = {**text.get("rope_scaling", {}), **text.get("rope_parameters", {})}
        kinds = {turning.get(name, "default") for name in ("type", "rope_type")} - {"default", "mrope"}
        if kinds or text.get("use_sliding_window"):
            asked = f"rope_scaling of type {', '.join(kinds)}" if kinds else "use_sliding_window"
            raise ValueError(f"the config asks for {asked}, which no release does and is not built")
        text = {"qk_norm": False, **text}
        text |= {"rope_theta": turning.get("rope_theta", text["rope_theta"])}
        vision = QwenVisionConfig.from_files(files["vision_config"])
        return cls(
            decoder=DecoderConfig.from_files(
                text,
                qkv_bias=True,
                streams=(STREAM,),
                rope_sections=tuple(turning.get("mrope_section", SECTIONS)),
                # the text_config's own word is that of a model without this one around it
                tied=files.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
            ),
            vision=vision,
            markers=QwenMarkers.from_files(text),
            pixels=SmartResize.from_files(look, patch=vision.patch, merge=vision.merge, frames=vision.frames),
        )

    def to_files(self) -> dict[str, dict[str, Any]]:
        """The contents of config.json and preprocessor_config.json."""
        top: dict[str, Any] = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
        text = self.decoder.to_files()
        del text["qk_norm"]
        turning = {"type": "mrope", "mrope_section": list(self.decoder.rope_sections)}
        top |= {**text, "rope_scaling": turning, "use_sliding_window": False, **self.markers.to_files()}
        return {
            "config.json": top | {"vision_config": self.vision.to_files()},
            "preprocessor_config.json": self.pixels.to_files(),
        }
