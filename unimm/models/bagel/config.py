"""BAGEL's config: the released config files to and from numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unimm.checkpoint.config_io import (
    JsonLayout,
    PositiveFloat,
    PositiveInt,
    read_config,
    read_section,
    read_value,
    write_config,
)
from unimm.checkpoint.contents import CheckpointError
from unimm.checkpoint.json_files import naming_place, read_json
from unimm.checkpoint.load import Shapes, read_folder_shapes, read_size
from unimm.encoders.siglip import NAVIT_LAYOUT, SiglipConfig, navit_config_from_json, navit_config_to_json
from unimm.models.bagel.processor import BagelDefaults, BagelImageProcessor, BagelSpecialTokens
from unimm.nn.decoder import DecoderConfig
from unimm.nn.layers import Activation
from unimm.tokenizers.kl import AutoencoderKLConfig
from unimm.vlms.llama_layout import decoder_config_from_json, decoder_config_to_json

EXPERTS = ("und", "gen")


@dataclass(frozen=True, kw_only=True)
class BagelConfig:
    decoder: DecoderConfig
    vision: SiglipConfig | None  # None for a checkpoint that only generates
    visual_gen: bool
    vae: AutoencoderKLConfig
    connector_act: Activation
    latent_patch_size: PositiveInt
    latent_grid: PositiveInt  # the table of latent positions has latent_grid^2 rows
    vit_grid: PositiveInt  # likewise, of the ViT's features
    interpolate_pos_embed: bool
    train_timestep_shift: PositiveFloat
    vae_transform: BagelImageProcessor  # of images for the VAE, and of all images before vit_transform
    vit_transform: BagelImageProcessor  # of images for the ViT
    special_tokens: BagelSpecialTokens | None  # None where the tokenizer has them
    defaults: BagelDefaults

    @property
    def latent_dim(self) -> int:
        return self.latent_patch_size**2 * self.vae.latent_channels

    @property
    def latent_downsample(self) -> int:
        """Pixels a latent token."""
        return self.latent_patch_size * self.vae.stride

    @classmethod
    def from_folder(cls, folder: Path) -> "BagelConfig":
        """Read llm_config.json, vit_config.json and config.json; sizes of tables come from the weights, where there are
        any.

        config.json came later than the weights, may be missing, and says 32 where the latent table has side 64.
        """
        llm: Mapping[str, Any]
        vit: Mapping[str, Any]
        llm, vit, top = (read_json(folder / name) for name in ("llm_config.json", "vit_config.json", "config.json"))
        shapes = read_folder_shapes(folder, WEIGHT_FILES)
        tables = {key.removeprefix("bagel."): key for key in shapes if key.endswith("pos_embed")}
        with naming_place(folder):
            grids = {name: _grid_side(shapes, key) for name, key in tables.items()}
        llm = llm or read_section(top, "llm_config", LAYOUT, required=False)
        vit = vit or read_section(top, "vit_config", LAYOUT, required=False)
        return cls.from_json(llm, vit, top, grids)

    @classmethod
    def from_json(
        cls, llm: Mapping, vit: Mapping, top: Mapping, grids: Mapping[str, int] | None = None
    ) -> "BagelConfig":
        """From the contents of llm_config.json, vit_config.json and config.json.

        Missing values are those that the released code writes into itself. grids: sides of the tables of positions, by
        their names in the weights, which know them better.
        """
        vae, for_vae, for_vit = (
            read_section(top, key, LAYOUT, required=False) for key in ("vae_config", "vae_transform", "vit_transform")
        )
        vae_config = AutoencoderKLConfig.from_json(vae)
        latent_stride = read_value(top, "latent_patch_size", PositiveInt, 2, layout=LAYOUT) * vae_config.stride
        vit_stride = read_value(vit, "patch_size", PositiveInt, 14, layout=NAVIT_LAYOUT)
        understands = read_value(top, "visual_und", bool, True, layout=LAYOUT)
        given: dict[str, Any] = {
            "decoder": decoder_config_from_json(llm, qkv_bias=True, experts=EXPERTS, defaults={"qk_norm": True}),
            "vision": navit_config_from_json(vit) if understands else None,
            "vae": vae_config,
            "vae_transform": BagelImageProcessor.from_json(for_vae, max_size=1024, min_size=512, stride=latent_stride),
            "vit_transform": BagelImageProcessor.from_json(for_vit, max_size=980, min_size=224, stride=vit_stride),
        }
        tables = {"latent_grid": "latent_pos_embed.pos_embed", "vit_grid": "vit_pos_embed.pos_embed"}
        given |= {name: (grids or {})[table] for name, table in tables.items() if table in (grids or {})}
        return read_config(cls, top, LAYOUT, given=given)

    def to_json(self) -> dict[str, dict[str, Any]]:
        """The contents of llm_config.json, vit_config.json and config.json."""
        llm = decoder_config_to_json(self.decoder) | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
        vit = navit_config_to_json(self.vision) if self.vision else {}
        top = write_config(self, LAYOUT) | {"llm_config": llm, "vit_config": vit, "visual_und": self.vision is not None}
        if self.special_tokens is None:
            del top["new_token_ids"]
        return {"llm_config.json": llm, "vit_config.json": vit, "config.json": top}


def _grid_side(shapes: Shapes, key: str) -> int:
    """The side of a square table of positions."""
    rows = read_size(shapes, key, axis=0, n_axes=2)
    side = round(rows**0.5)
    if side**2 != rows:
        raise CheckpointError(f"{key} has {rows} rows in the weights: expected a square of them; fetch them again")
    return side


LAYOUT = JsonLayout(
    name="config.json",
    keys={
        "visual_gen": "visual_gen",
        "vae": "vae_config",
        "connector_act": "connector_act",
        "latent_patch_size": "latent_patch_size",
        "latent_grid": "max_latent_size",
        "vit_grid": "vit_max_num_patch_per_side",
        "interpolate_pos_embed": "interpolate_pos",
        "train_timestep_shift": "timestep_shift",
        "vae_transform": "vae_transform",
        "vit_transform": "vit_transform",
        "special_tokens": "new_token_ids",
        "defaults": "generation",
    },
    defaults={
        "visual_gen": True,
        "connector_act": "gelu_pytorch_tanh",
        "latent_patch_size": 2,
        "max_latent_size": 64,
        "vit_max_num_patch_per_side": 70,
        "interpolate_pos": False,
        "timestep_shift": 1.0,
        "generation": {},
    },
    constants={"architectures": ["BagelForConditionalGeneration"], "model_type": "bagel"},
)
WEIGHT_FILES = ("ema.safetensors", "model.safetensors", "model.safetensors.index.json")
