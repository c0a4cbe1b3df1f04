"""BAGEL's config: the released config files to and from numbers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unimm.checkpoint.config_io import read_json
from unimm.checkpoint.load import read_shapes, weight_files
from unimm.encoders.siglip_navit import VisionConfig
from unimm.models.bagel.processor import Defaults, Markers, Resize
from unimm.nn.decoder import DecoderConfig
from unimm.tokenizers.kl import VAEConfig

STREAMS = ("und", "gen")


@dataclass(frozen=True, kw_only=True)
class BagelConfig:
    decoder: DecoderConfig
    vision: VisionConfig | None  # None: a checkpoint trained to draw only
    draws: bool
    vae: VAEConfig
    connector_act: str
    latent_patch: int
    latent_side: int  # the table of latent positions is a grid of side * side
    look_side: int  # likewise the connector's
    interpolate_places: bool
    train_shift: float
    draw: Resize  # the rule for pictures that enter the VAE, and, before `look`, for all
    look: Resize  # the rule for pictures that enter the ViT
    markers: Markers | None  # None: looked up in the tokenizer
    defaults: Defaults

    @property
    def latent_dim(self) -> int:
        return self.latent_patch**2 * self.vae.latent_channels

    @property
    def stride(self) -> int:
        """Pixels a latent token."""
        return self.latent_patch * self.vae.stride

    @classmethod
    def from_folder(cls, folder: Path) -> "BagelConfig":
        """Read llm_config.json, vit_config.json and config.json; sizes of tables come from the weights, where there are any.

        config.json came later than the weights, may be missing, and says 32 where the latent table has side 64.
        """
        llm, vit, top = (read_json(folder / name) for name in ("llm_config.json", "vit_config.json", "config.json"))
        held = any((folder / name).exists() for name in WEIGHTS)
        shapes = read_shapes(weight_files(folder, WEIGHTS)) if held else {}
        tables = {key.removeprefix("bagel."): shape[0] for key, shape in shapes.items() if key.endswith("pos_embed")}
        sides = {key: round(rows**0.5) for key, rows in tables.items()}
        return cls.from_files(llm or top.get("llm_config", {}), vit or top.get("vit_config", {}), top, sides)

    @classmethod
    def from_files(
        cls, llm: Mapping, vit: Mapping, top: Mapping, sides: Mapping[str, int] | None = None
    ) -> "BagelConfig":
        """From the released files' contents. Missing values are those that the released code writes into itself.

        sides: of the tables of positions, by their names in the weights, where these are known better.
        """
        sides, special = sides or {}, top.get("new_token_ids")
        patch, look_patch = top.get("latent_patch_size", 2), vit.get("patch_size", 14)
        vae = VAEConfig.from_files(top.get("vae_config", {}))
        vision = VisionConfig.from_files(vit, drop_last=True) if top.get("visual_und", True) else None
        return cls(
            decoder=DecoderConfig.from_files({"qk_norm": True, **llm}, qkv_bias=True, streams=STREAMS),
            vision=vision,
            draws=top.get("visual_gen", True),
            vae=vae,
            connector_act=top.get("connector_act", "gelu_pytorch_tanh"),
            latent_patch=patch,
            latent_side=sides.get("latent_pos_embed.pos_embed", top.get("max_latent_size", 64)),
            look_side=sides.get("vit_pos_embed.pos_embed", top.get("vit_max_num_patch_per_side", 70)),
            interpolate_places=top.get("interpolate_pos", False),
            train_shift=top.get("timestep_shift", 1.0),
            draw=Resize.from_files(top.get("vae_transform", {}), longest=1024, shortest=512, stride=patch * vae.stride),
            look=Resize.from_files(top.get("vit_transform", {}), longest=980, shortest=224, stride=look_patch),
            markers=Markers.from_files(special) if special else None,
            defaults=Defaults.from_files(top.get("generation", {})),
        )

    def to_files(self) -> dict[str, dict[str, Any]]:
        """The contents of llm_config.json, vit_config.json and config.json."""
        llm = self.decoder.to_files() | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
        vit = self.vision.to_files(drop_last=True) if self.vision else {}
        top: dict[str, Any] = {"architectures": ["BagelForConditionalGeneration"], "model_type": "bagel"}
        top |= {"llm_config": llm, "vit_config": vit, "vae_config": self.vae.to_files()}
        top |= {"visual_gen": self.draws, "visual_und": self.vision is not None}
        top |= {"latent_patch_size": self.latent_patch, "max_latent_size": self.latent_side}
        top |= {"vit_max_num_patch_per_side": self.look_side, "interpolate_pos": self.interpolate_places}
        top |= {"connector_act": self.connector_act, "timestep_shift": self.train_shift}
        top |= {"vae_transform": self.draw.to_files(), "vit_transform": self.look.to_files()}
        top |= {"generation": asdict(self.defaults)}
        if self.markers:
            top["new_token_ids"] = self.markers.to_files()
        return {"llm_config.json": llm, "vit_config.json": vit, "config.json": top}


WEIGHTS = ("ema.safetensors", "model.safetensors", "model.safetensors.index.json")
