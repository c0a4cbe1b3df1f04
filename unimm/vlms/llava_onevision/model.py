"""LLaVA-OneVision: a Qwen2 that reads texts and pictures, which it sees whole and in tiles; a part of MetaQuery.

Li et al. 2024, arXiv 2408.03326. Everything is read causally, at positions that count rows.
facts/metaquery_uniworld.md sections 1.2 and 3.2.

Axes: N packed rows, n rows of a picture, T tiles, D model, F features of a tile.
"""
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unimm.checkpoint.config_io import read_json
from unimm.checkpoint.keymap import Table
from unimm.encoders.siglip import Siglip, SiglipConfig, tower_keys
from unimm.nn.decoder import Decoder, DecoderConfig
from unimm.nn.layers import MLP
from unimm.processing.images.llava_onevision import AnyRes, Size
from unimm.sequence.packing import Tokens
from unimm.vlms.base import STREAM, Reader, given
from unimm.vlms.llama_layout import llama_keys
from unimm.vlms.llava_onevision.processor import PLACEHOLDER, LlavaMarkers, LlavaPrompts

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
        top: dict[str, Any] = {"architectures": ["LlavaOnevisionForConditionalGeneration"], "model_type": "llava_onevision"}
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


class LlavaOneVision(Reader):
    """A decoder, a tower to look with, and what brings its features to the decoder's width."""

    Config = LlavaConfig
    SPECIAL = (PLACEHOLDER, "<video>")

    def __init__(self, cfg: LlavaConfig):
        super().__init__()
        self.cfg = cfg
        self.decoder = Decoder(cfg.decoder)
        self.vision = Siglip(cfg.vision)
        self.projector = MLP(cfg.vision.dim, cfg.decoder.dim, cfg.decoder.dim, cfg.act)
        self.newline = nn.Parameter(torch.randn(cfg.decoder.dim) * cfg.decoder.dim**-0.5)

    def keys(self, shapes: Mapping[str, Any]) -> Table:
        """The key table for files of these names, in either spelling; for none the older one."""
        return llava_keys(self.cfg, shapes)

    @property
    def prompts(self) -> LlavaPrompts:
        """How this model's prompts are made."""
        return LlavaPrompts(tokenizer=self.tokenizer, pixels=self.cfg.pixels, markers=self.cfg.markers)

    def seen(self, tokens: Tokens) -> Tensor:
        """Pictures of a pack -> a row for each of their tokens [n, D]."""
        assert tokens.tiles is not None, "the prompts of this model bring tiles"
        # the tower's last layer, before its norm, as the decoder was trained with
        features = self.projector(self.vision.layers(tokens.tiles.to(self.dtype)))
        first = torch.tensor(tokens.lengths).cumsum(0) - torch.tensor(tokens.lengths)
        sizes = tokens.content[first.to(tokens.content.device)].tolist()
        parts = features.split([n for *_, n in sizes])
        return torch.cat([self.arranged(part, (h, w)) for part, (h, w, _) in zip(parts, sizes, strict=True)])

    def arranged(self, features: Tensor, size: Size) -> Tensor:
        """Features [T, F, D] of a picture of a size: whole and its tiles -> rows [n, D], a newline behind each line.

        The lines are those of the tiles put together, without the padding around the picture.
        """
        if len(features) == 1:
            return torch.cat((features[0], self.newline[None]))
        rule = self.cfg.pixels
        across, frame = rule.grid(*size)[1] // rule.size, rule.frame(*size)
        lines = rearrange(features[1:], "(r c) (h w) d -> d (r h) (c w)", c=across, h=rule.side)
        lines = lines[:, frame.top : frame.top + frame.height, frame.left : frame.left + frame.width]
        if frame.size != (frame.height, frame.width):
            lines = F.interpolate(lines[None], frame.size, mode="bilinear")[0]
        lines = torch.cat((lines, self.newline[:, None, None].expand(-1, len(lines[0]), 1)), 2)
        return torch.cat((features[0], rearrange(lines, "d h w -> (h w) d")))


# ---- released files


def llava_keys(cfg: LlavaConfig, shapes: Mapping[str, Any], *, head: bool = True, prefix: str = "", ours: str = "") -> Table:
    """Released names on the left, ours on the right, in the spelling of files of these names (none: the older one).

    head: the files hold a language head, unless it is the table of embeddings. prefix: what their names begin with where
    the model is a part of another's files; ours: where it is in our model.
    """
    newer = any(key.startswith(f"{prefix}model.") for key in shapes)
    inner = prefix + ("model." if newer else "")
    body = inner + "language_model." + ("" if newer else "model.")
    top = prefix + ("" if newer else "language_model.") + "lm_head"
    rows = llama_keys(body, top, STREAM)
    if cfg.decoder.tied or not head:
        rows = {**rows, top + ".{}": None}
    tower = inner + "vision_tower."
    # what transformers writes today leaves out the name around the tower
    tower += "" if any(key.startswith(f"{tower}embeddings.") for key in shapes) else "vision_model."
    return {
        **{theirs: ours + target if target else None for theirs, target in rows.items()},
        **tower_keys(tower, ours + "vision.", head=cfg.vision.head),
        inner + "multi_modal_projector.linear_1.{}": ours + "projector.fc1.{}",
        inner + "multi_modal_projector.linear_2.{}": ours + "projector.fc2.{}",
        inner + "image_newline": ours + "newline",
    }
