"""A fixed-size vision encoder from timm: SigLIP as Janus uses it, or any other by name.

Axes: B pictures, S pixels a side, n features of a picture in raster order, D model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class ViTNumbers:
    """A SigLIP ViT: erf GELU, biases everywhere, LayerNorms of 1e-6, a pooling head that nothing reads."""

    dim: int
    n_layers: int
    n_heads: int
    patch: int
    mlp_ratio: float = 4.0

    FILES: ClassVar = {
        "dim": "width",
        "n_layers": "layers",
        "n_heads": "heads",
        "patch": "patch_size",
        "mlp_ratio": "mlp_ratio",
    }


# what a released model_name means
RELEASED = {
    "siglip_large_patch16_384": ViTNumbers(dim=1024, n_layers=24, n_heads=16, patch=16),
    "siglip_large_patch16_256": ViTNumbers(dim=1024, n_layers=24, n_heads=16, patch=16),
    "siglip_so400m_patch14_384": ViTNumbers(dim=1152, n_layers=27, n_heads=16, patch=14, mlp_ratio=3.7362),
    "siglip_so400m_patch14_224": ViTNumbers(dim=1152, n_layers=27, n_heads=16, patch=14, mlp_ratio=3.7362),
}


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """Which encoder, for pictures of size * size pixels. vit: its numbers; None for another encoder of timm's, by name."""

    name: str
    size: int
    vit: ViTNumbers | None
    select_layer: int = -1

    @classmethod
    def from_files(cls, files: Mapping[str, Any]) -> "TowerConfig":
        """Read the params of a released vision_config; numbers that stand in it go before those that its name means."""
        known = {ours: files[theirs] for ours, theirs in ViTNumbers.FILES.items() if theirs in files}
        vit = RELEASED.get(files["model_name"])
        if vit is None and {"dim", "n_layers", "n_heads", "patch"} <= known.keys():
            vit = ViTNumbers(**known)
        elif vit is not None:
            vit = replace(vit, **known)
        if files.get("select_feature", "same") != "same":
            raise ValueError(f"got select_feature {files['select_feature']!r}: expected 'same', as in every release")
        return cls(
            name=files["model_name"], size=files["image_size"], vit=vit, select_layer=files.get("select_layer", -1)
        )

    def to_files(self) -> dict[str, Any]:
        """The mapping that `from_files` reads."""
        files: dict[str, Any] = {"model_name": self.name, "image_size": self.size}
        files |= {"select_layer": self.select_layer, "select_feature": "same"}
        if self.vit is not None and self.vit != RELEASED.get(self.name):
            files |= {theirs: getattr(self.vit, ours) for ours, theirs in ViTNumbers.FILES.items()}
        return files

    @property
    def depth(self) -> int:
        """Layers that are built: up to the selected one, counted from the end where it is negative."""
        assert self.vit is not None, "another encoder is built whole"
        total, s = self.vit.n_layers, self.select_layer
        return min(total, total + s + 1) if s < 0 else min(total, s)


class Tower(nn.Module):
    """Pictures to features, before the aligner. `trunk` is timm's module; its names are the released ones."""

    def __init__(self, cfg: TowerConfig):
        super().__init__()
        self.trunk = _siglip(cfg, cfg.vit) if cfg.vit else _named(cfg)
        # pixels a feature, along each side
        self.patch: int = cfg.vit.patch if cfg.vit else self.trunk.feature_info[-1]["reduction"]
        self.side = cfg.size // self.patch
        if not self.side:
            raise ValueError(
                f"got pictures of {cfg.size} pixels for {cfg.name}: expected {self.patch} or more, one feature's"
            )
        # where an encoder that gives a grid has its features, and how many of a sequence belong to no place
        self.grid = "b h w d" if getattr(self.trunk, "output_fmt", "NCHW") == "NHWC" else "b d h w"
        self.prefix: int = getattr(self.trunk, "num_prefix_tokens", 0)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S], normalised -> [B, n, D]: after the final norm, without pooling. S: whole patches alone."""
        x = self.trunk.forward_features(images)
        return rearrange(x, f"{self.grid} -> b (h w) d") if x.ndim == 4 else x[:, self.prefix :]


def _siglip(cfg: TowerConfig, vit: ViTNumbers) -> Any:
    # two seconds to import, and only models that look through it need it
    from timm.models.vision_transformer import VisionTransformer

    trunk = VisionTransformer(
        img_size=cfg.size // vit.patch * vit.patch,
        patch_size=vit.patch,
        embed_dim=vit.dim,
        depth=cfg.depth,
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


def _named(cfg: TowerConfig) -> Any:
    import timm

    if not timm.is_model(cfg.name):
        near = ", ".join(timm.list_models(f"*{cfg.name.split('_')[0]}*")[:5]) or "see timm.list_models()"
        raise ValueError(
            f"unknown vision encoder {cfg.name!r}: expected {', '.join(RELEASED)}, or a name of timm's ({near})"
        )
    if cfg.select_layer != -1:
        raise ValueError(
            f"got select_layer {cfg.select_layer} for {cfg.name}: only -1, the whole encoder, is known for it"
        )
    known = timm.get_pretrained_cfg(cfg.name)
    fixed = known is not None and known.fixed_input_size  # of a table of positions; others take any size
    make: Any = partial(timm.create_model, cfg.name, num_classes=0, pretrained=False)
    if fixed:
        with torch.device("meta"):
            patch = make().feature_info[-1]["reduction"]
        make = partial(make, img_size=cfg.size // patch * patch)
    trunk = make()
    stored = trunk.state_dict().keys()
    if any(table.is_meta and name not in stored for name, table in trunk.named_buffers()):
        with torch.device("cpu"):  # tables that no file holds are made with the module
            return make()
    return trunk
