"""BAGEL's config: the released config files to and from numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unimm.checkpoint.config_io import JsonLayout, read_config, read_json, write_config
from unimm.checkpoint.load import read_shapes, weight_files
from unimm.encoders.siglip import SiglipConfig, navit_config_from_json, navit_config_to_json
from unimm.models.bagel.processor import BagelDefaults, BagelImageProcessor, BagelSpecialTokens
from unimm.nn.decoder import DecoderConfig
from unimm.tokenizers.kl import AutoencoderKLConfig
from unimm.vlms.llama_layout import decoder_config_from_json, decoder_config_to_json

EXPERTS = ("und", "gen")


@dataclass(frozen=True, kw_only=True)
class BagelConfig:
    decoder: DecoderConfig
    vision: SiglipConfig | None  # None for a checkpoint that only generates
    visual_gen: bool
    vae: AutoencoderKLConfig
    connector_act: str
    latent_patch_size: int
    latent_grid: int  # the table of latent positions has latent_grid^2 rows
    vit_grid: int  # likewise, of the ViT's features
    interpolate_pos_embed: bool
    train_timestep_shift: float
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
        llm, vit, top = (read_json(folder / name) for name in ("llm_config.json", "vit_config.json", "config.json"))
        has_weights = any((folder / name).exists() for name in WEIGHT_FILES)
        shapes = read_shapes(weight_files(folder, WEIGHT_FILES)) if has_weights else {}
        table_rows = {
            key.removeprefix("bagel."): shape[0] for key, shape in shapes.items() if key.endswith("pos_embed")
        }
        grids = {key: round(rows**0.5) for key, rows in table_rows.items()}
        return cls.from_json(llm or top.get("llm_config", {}), vit or top.get("vit_config", {}), top, grids)

    @classmethod
    def from_json(
        cls, llm: Mapping, vit: Mapping, top: Mapping, grids: Mapping[str, int] | None = None
    ) -> "BagelConfig":
        """From the contents of llm_config.json, vit_config.json and config.json.

        Missing values are those that the released code writes into itself. grids: sides of the tables of positions, by
        their names in the weights, which know them better.
        """
        vae = AutoencoderKLConfig.from_json(top.get("vae_config", {}))
        latent_stride = top.get("latent_patch_size", 2) * vae.stride
        given: dict[str, Any] = {
            "decoder": decoder_config_from_json({"qk_norm": True, **llm}, qkv_bias=True, experts=EXPERTS),
            "vision": navit_config_from_json(vit) if top.get("visual_und", True) else None,
            "vae": vae,
            "vae_transform": BagelImageProcessor.from_json(
                top.get("vae_transform", {}), max_size=1024, min_size=512, stride=latent_stride
            ),
            "vit_transform": BagelImageProcessor.from_json(
                top.get("vit_transform", {}), max_size=980, min_size=224, stride=vit.get("patch_size", 14)
            ),
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
