"""A fixed-size vision encoder from timm: SigLIP as Janus uses it, or any other by name.

Axes: B images, S pixels a side, n features of an image in raster order, D model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from unimm.checkpoint.config_io import (
    JsonConfig,
    JsonLayout,
    LayerCount,
    PositiveFloat,
    PositiveInt,
    read_config,
    read_value,
    write_config,
)


@dataclass(frozen=True, kw_only=True)
class TimmViTConfig(JsonConfig):
    """A SigLIP ViT: erf GELU, biases, LayerNorms with an epsilon of 1e-6, a pooling head that is not used."""

    dim: PositiveInt
    n_layers: LayerCount
    n_heads: PositiveInt
    patch_size: PositiveInt
    mlp_ratio: PositiveFloat = 4.0

    JSON: ClassVar = JsonLayout(
        name="the vision_config",
        keys={
            "dim": "width",
            "n_layers": "layers",
            "n_heads": "heads",
            "patch_size": "patch_size",
            "mlp_ratio": "mlp_ratio",
        },
    )

    def __post_init__(self) -> None:
        if self.dim % self.n_heads:
            raise ValueError(
                f"got a width of {self.dim} for {self.n_heads} heads in a vision_config: expected a multiple"
            )


# the encoders that released values of model_name stand for
RELEASED_VITS = {
    "siglip_large_patch16_384": TimmViTConfig(dim=1024, n_layers=24, n_heads=16, patch_size=16),
    "siglip_large_patch16_256": TimmViTConfig(dim=1024, n_layers=24, n_heads=16, patch_size=16),
    "siglip_so400m_patch14_384": TimmViTConfig(dim=1152, n_layers=27, n_heads=16, patch_size=14, mlp_ratio=3.7362),
    "siglip_so400m_patch14_224": TimmViTConfig(dim=1152, n_layers=27, n_heads=16, patch_size=14, mlp_ratio=3.7362),
}


@dataclass(frozen=True, kw_only=True)
class TimmEncoderConfig:
    """An encoder of images of image_size * image_size pixels. vit: its numbers; None for another encoder of timm's, by
    name."""

    model_name: str
    image_size: PositiveInt
    vit: TimmViTConfig | None
    select_layer: Annotated[int, range(-10_000, 10_001)] = -1  # of negative ones the last is -1

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TimmEncoderConfig":
        """Read the params of a released vision_config; its numbers override those of a released name."""
        released = RELEASED_VITS.get(read_value(data, "model_name", str, "", layout=LAYOUT))
        layout = TimmViTConfig.JSON if released is None else replace(TimmViTConfig.JSON, defaults=released.to_json())
        numbers = {"width", "layers", "heads", "patch_size"} <= data.keys()
        vit = read_config(TimmViTConfig, data, layout) if released or numbers else None
        return read_config(cls, data, LAYOUT, given={"vit": vit})

    def to_json(self) -> dict[str, Any]:
        """The mapping that `from_json` reads."""
        own = self.vit is not None and self.vit != RELEASED_VITS.get(self.model_name)
        return write_config(self, LAYOUT) | (self.vit.to_json() if self.vit and own else {})

    @property
    def depth(self) -> int:
        """Layers that are built: up to the selected one, counted from the end where it is negative."""
        assert self.vit is not None, "only a ViT of ours is cut at a layer"
        total = self.vit.n_layers
        s = self.select_layer
        return min(total, total + s + 1) if s < 0 else min(total, s)


LAYOUT = JsonLayout(
    name="the vision_config",
    source="the released params",
    keys={"model_name": "model_name", "image_size": "image_size", "select_layer": "select_layer"},
    fixed={"select_feature": "same"},
)


class TimmVisionEncoder(nn.Module):
    """Images to features, before the aligner. `trunk` is timm's module; its names are the released ones."""

    def __init__(self, config: TimmEncoderConfig):
        super().__init__()
        self.vit = config.vit
        self.trunk = _build_siglip(config, config.vit) if config.vit else _build_by_name(config)
        # pixels a feature, along each side
        self.patch_size: int = config.vit.patch_size if config.vit else self.trunk.feature_info[-1]["reduction"]
        self.grid_side = config.image_size // self.patch_size
        if not self.grid_side:
            raise ValueError(
                f"got images of {config.image_size} pixels for {config.model_name}: expected "
                f"{self.patch_size} or more, one patch"
            )
        # the axes of an output that is a grid, and the number of tokens of a sequence that are no patches
        self.feature_axes = "b h w d" if getattr(self.trunk, "output_fmt", "NCHW") == "NHWC" else "b d h w"
        self.n_prefix_tokens: int = getattr(self.trunk, "num_prefix_tokens", 0)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S], normalised -> [B, n, D]: after the final norm, without pooling. S: whole patches
        alone."""
        x = self.trunk.forward_features(images)
        return rearrange(x, f"{self.feature_axes} -> b (h w) d") if x.ndim == 4 else x[:, self.n_prefix_tokens :]


def _build_siglip(config: TimmEncoderConfig, vit: TimmViTConfig) -> Any:
    # two seconds to import, and only models with this encoder need it
    from timm.models.vision_transformer import VisionTransformer

    trunk = VisionTransformer(
        img_size=config.image_size // vit.patch_size * vit.patch_size,
        patch_size=vit.patch_size,
        embed_dim=vit.dim,
        depth=config.depth,
        num_heads=vit.n_heads,
        mlp_ratio=vit.mlp_ratio,
        class_token=False,
        global_pool="map",
        num_classes=0,
        weight_init="skip",
    )
    # what timm leaves as it finds it when it skips the rest
    for name in ("pos_embed", "attn_pool.latent"):
        nn.init.normal_(trunk.get_parameter(name), std=0.02)
    return trunk


def _build_by_name(config: TimmEncoderConfig) -> Any:
    import timm

    if not timm.is_model(config.model_name):
        near = ", ".join(timm.list_models(f"*{config.model_name.split('_')[0]}*")[:5]) or "see timm.list_models()"
        raise ValueError(
            f"unknown vision encoder {config.model_name!r}: expected {', '.join(RELEASED_VITS)}, or a name of timm's "
            f"({near})"
        )
    if config.select_layer != -1:
        raise ValueError(
            f"got select_layer {config.select_layer} for {config.model_name}: only -1, the whole encoder, is known "
            "for it"
        )
    known = timm.get_pretrained_cfg(config.model_name)
    fixed = known is not None and known.fixed_input_size  # of a table of positions; others take any size
    make: Any = partial(timm.create_model, config.model_name, num_classes=0, pretrained=False)
    if fixed:
        with torch.device("meta"):
            patch = make().feature_info[-1]["reduction"]
        make = partial(make, img_size=config.image_size // patch * patch)
    trunk = make()
    stored = trunk.state_dict().keys()
    if any(table.is_meta and name not in stored for name, table in trunk.named_buffers()):
        with torch.device("cpu"):  # tables that no file holds are made with the module
            return make()
    return trunk
