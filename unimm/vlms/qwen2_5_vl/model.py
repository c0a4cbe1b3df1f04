"""Qwen2.5-VL: a language model that reads texts and pictures; a part of MetaQuery, UniWorld and Qwen-Image.

Bai et al. 2025, arXiv 2502.13923. Everything is read causally; positions are (time, row, column), which are equal for text.
facts/metaquery_uniworld.md section 3.1.

Axes: N packed rows, n rows or cells, D model, V vocabulary.
"""
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from unimm.checkpoint.config_io import read_json
from unimm.checkpoint.keymap import Table
from unimm.checkpoint.load import HUB_WEIGHTS
from unimm.nn.decoder import Decoder, DecoderConfig
from unimm.processing.images.qwen2_vl import SmartResize
from unimm.sequence.packing import Pack, Tokens
from unimm.vlms.base import STREAM, Reader, given
from unimm.vlms.llama_layout import llama_keys
from unimm.vlms.qwen2_5_vl.processor import QwenMarkers, QwenPrompts
from unimm.vlms.qwen2_5_vl.vision import QwenVision, QwenVisionConfig, vision_keys

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
class QwenVLConfig:
    decoder: DecoderConfig
    vision: QwenVisionConfig
    markers: QwenMarkers
    pixels: SmartResize

    def __post_init__(self) -> None:
        if self.vision.out != self.decoder.dim:
            raise ValueError(f"got out_hidden_size {self.vision.out} in the vision_config: expected {self.decoder.dim}")
        if len(self.decoder.rope_sections) != 3:
            raise ValueError(f"got mrope_section {self.decoder.rope_sections}: expected three numbers: time, rows, columns")

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


class QwenVL(Reader):
    """A decoder and a tower to look with."""

    Config = QwenVLConfig

    def __init__(self, cfg: QwenVLConfig):
        super().__init__()
        self.cfg = cfg
        self.decoder = Decoder(cfg.decoder)
        self.vision = QwenVision(cfg.vision)

    def keys(self, shapes: Mapping[str, Any]) -> Table:
        """The key table for files of these names, in either spelling; for none the older one."""
        return qwen_keys(head=not self.cfg.decoder.tied, nested=nested(shapes))

    @property
    def prompts(self) -> QwenPrompts:
        """How this model's prompts are made."""
        cfg = self.cfg
        return QwenPrompts(tokenizer=self.tokenizer, pixels=cfg.pixels, vision=cfg.vision, markers=cfg.markers)

    def seen(self, tokens: Tokens) -> Tensor:
        """Pictures of a pack -> a row for each of their cells [n, D]."""
        m, grids = self.cfg.vision.merge, []
        for places in tokens.places.split(tokens.lengths):
            h, w = (places[:, 1:].amax(0) + 1).tolist()
            grids.append((len(places) // (h * w), h * m, w * m))
        return self.vision(rearrange(tokens.content, "n (s f) -> (n s) f", s=m * m).to(self.dtype), grids)

    def positions(self, batch: Pack) -> Tensor:
        """Rotary positions of a pack: [N] without pictures, else (time, row, column) [N, 3], equal at texts."""
        at, look = batch.layout.positions, batch.look
        if look is None:
            return at
        first = torch.tensor(look.lengths).cumsum(0) - torch.tensor(look.lengths)
        begin = at[look.rows[first.to(at.device)]].repeat_interleave(torch.tensor(look.lengths, device=at.device))
        return at[:, None].repeat(1, 3).index_copy(0, look.rows, begin[:, None] + look.places)


# ---- released files

WEIGHTS = HUB_WEIGHTS


def nested(keys: Mapping[str, Any], *, prefix: str = "") -> bool:
    """Whether released names are in the newer spelling, the language model's and the tower's below `model`."""
    return any(key.startswith((f"{prefix}model.language_model.", f"{prefix}model.visual.")) for key in keys)


def qwen_keys(*, head: bool, nested: bool = False, prefix: str = "", ours: str = "") -> Table:
    """Released names on the left, ours on the right. head: the files hold a language head; else one may be there, unread.

    nested: the newer spelling. prefix: what their names begin with where the model is a part of another's files; ours:
    where it is in our model.
    """
    text, sight = ("model.language_model.", "model.visual.") if nested else ("model.", "visual.")
    rows = llama_keys(prefix + text, prefix + "lm_head", STREAM)
    rows = {theirs: ours + target if target else None for theirs, target in rows.items()}
    unread = {} if head else {prefix + "lm_head.{}": None}
    return {**rows, **unread, **vision_keys(prefix + sight, ours + "vision.")}
