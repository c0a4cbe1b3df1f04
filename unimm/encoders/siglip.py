"""SigLIP2's vision encoder: at one size (UniWorld, LLaVA-OneVision), and over packed images of any size (BAGEL's
NaViT).

Tschannen et al. 2025, arXiv 2502.14786; the fixed-size releases have SigLIP's own architecture (arXiv 2303.15343).
docs/originals/blocks.md, "SigLIP2".

Axes: B images, S pixels a side, n patches of an image in raster order, N packed patches, D model, C channels, p patch.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from typing_extensions import Self

from unimm.checkpoint.component import PretrainedComponent
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
from unimm.checkpoint.json_files import read_json, read_preprocessor_json
from unimm.checkpoint.keymap import Ignore, KeyMap, renames
from unimm.checkpoint.load import Shapes
from unimm.kernels import AttentionMask, KeyRange
from unimm.nn.layers import MLP, Activation, EncoderBlock
from unimm.processing.images.siglip import SiglipImageProcessor

# keys of the fixed-size releases' config and of BAGEL's vit_config.json
SIGLIP_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "patch_size": "patch_size",
    "image_size": "image_size",
    "channels": "num_channels",
    "norm_eps": "layer_norm_eps",
    "act": "hidden_act",
}


@dataclass(frozen=True, kw_only=True)
class SiglipConfig(JsonConfig):
    dim: PositiveInt
    n_layers: LayerCount
    n_heads: PositiveInt
    mlp_dim: PositiveInt
    patch_size: PositiveInt
    image_size: PositiveInt  # pixels a side; what is left of them beside whole patches is not encoded
    channels: PositiveInt
    norm_eps: PositiveFloat
    act: Activation
    has_pooling_head: bool  # whether an image's features can be pooled to one

    JSON: ClassVar = JsonLayout(
        name="the vision encoder's config",
        source=(
            "the fixed-size releases (google/siglip2-so400m-patch16-512 and its siblings; NaFlex ones are not "
            "supported)"
        ),
        keys={**SIGLIP_KEYS, "has_pooling_head": "vision_use_head"},
        # those of SiglipVisionConfig in transformers: the base model at 224 pixels
        defaults={
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "patch_size": 16,
            "image_size": 224,
            "num_channels": 3,
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu_pytorch_tanh",
            "vision_use_head": True,
        },
        fixed={"model_type": "siglip_vision_model"},
        constants={"architectures": ["SiglipVisionModel"]},
        section="vision_config",  # of a whole SigLIP
    )

    def __post_init__(self) -> None:
        sizes = (self.dim, self.n_layers, self.n_heads, self.mlp_dim, self.patch_size, self.channels, self.norm_eps)
        if min(sizes) <= 0 or self.dim % self.n_heads or self.image_size < self.patch_size:
            raise ValueError(
                f"got {self}: expected positive numbers, a width that is a multiple of the heads, and images of a "
                "patch or more; correct config.json"
            )

    @property
    def grid_side(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size


# of BAGEL's vit_config.json; the number of layers is read apart
NAVIT_LAYOUT = JsonLayout(
    name="the vision config",
    source="the released vit_config.json",
    keys=SIGLIP_KEYS,
    defaults={"num_channels": 3, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"},
    constants={"model_type": "siglip_vision_model"},
)


def navit_config_from_json(data: Mapping[str, Any]) -> SiglipConfig:
    """Read BAGEL's vit_config.json. image_size is that of the grid of positions; images may be of any size within it.

    The file counts one layer more than the weights hold: the original drops the last one.
    """
    if read_value(data, "rope", bool, False, layout=NAVIT_LAYOUT):
        raise ValueError(
            "got rope true in the vision config: expected false, a table of positions as the released one has"
        )
    config = read_config(SiglipConfig, data, NAVIT_LAYOUT, given={"has_pooling_head": False})
    return replace(config, n_layers=config.n_layers - 1)


def navit_config_to_json(config: SiglipConfig) -> dict[str, Any]:
    """The vit_config.json that `navit_config_from_json` reads."""
    return write_config(replace(config, n_layers=config.n_layers + 1), NAVIT_LAYOUT)


def siglip_blocks(config: SiglipConfig) -> nn.ModuleList:
    """The transformer blocks of an encoder."""
    width = (config.dim, config.n_heads, config.mlp_dim, config.act, config.norm_eps)
    return nn.ModuleList(EncoderBlock(*width) for _ in range(config.n_layers))


class SiglipNaViT(nn.Module):
    """Packed patches of images of any size, and their position ids, to features. Images do not attend to each other."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.patch_embed = nn.Linear(config.channels * config.patch_size**2, config.dim)
        self.pos_embed = nn.Embedding(config.grid_side**2, config.dim)
        self.blocks = siglip_blocks(config)
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)

    def forward(self, patches: Tensor, position_ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """patches [N, p*p*C] ordered (row in patch, column in patch, channel), position_ids [N], patches an image ->
        [N, D]."""
        mask = AttentionMask([[KeyRange(n, full=True)] for n in lengths], device=patches.device)
        x = self.patch_embed(patches) + self.pos_embed(position_ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


class SiglipPoolingHead(nn.Module):
    """A learned query that attends to all features of an image, then a feed-forward: one feature an image."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.n_heads = config.n_heads
        self.probe = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out_proj = nn.Linear(config.dim, config.dim)
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config.dim, config.mlp_dim, config.dim, config.act)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, n, D] -> [B, D]."""
        d = x.shape[2]
        q = F.linear(repeat(self.probe, "1 1 d -> b 1 d", b=len(x)), self.qkv.weight[:d], self.qkv.bias[:d])
        k, v = F.linear(x, self.qkv.weight[d:], self.qkv.bias[d:]).chunk(2, -1)
        q, k, v = (rearrange(t, "b n (h k) -> b h n k", h=self.n_heads) for t in (q, k, v))
        # not `kernels.attention`: one query an image is no mask of ranges
        y = self.out_proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h 1 k -> b (h k)"))
        return y + self.mlp(self.norm(y))


class SiglipVisionEncoder(PretrainedComponent):
    """Images of one size to a feature for each patch. `image_processor` makes its inputs."""

    def __init__(self, config: SiglipConfig, image_processor: SiglipImageProcessor | None = None):
        super().__init__()
        self.config = config
        self.image_processor = image_processor or SiglipImageProcessor(size=config.image_size)
        self.patch_embed = nn.Conv2d(config.channels, config.dim, config.patch_size, config.patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(config.grid_side**2, config.dim))
        self.blocks = siglip_blocks(config)
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.pooling_head = SiglipPoolingHead(config) if config.has_pooling_head else None

    @classmethod
    def from_configs(cls, folder: Path, shapes: Shapes) -> Self:
        config = SiglipConfig.from_json(read_json(folder / "config.json", required=True))
        processor = read_preprocessor_json(folder)
        return cls(config, SiglipImageProcessor.from_json(processor, size=config.image_size))

    def key_map(self, shapes: Shapes) -> KeyMap:
        return siglip_file_key_map(self.config, shapes)

    def embed_patches(self, images: Tensor) -> Tensor:
        """images [B, C, S, S], normalised -> patches with their positions [B, n, D]. Raises ValueError for another
        size."""
        got = list(images.shape)
        expected = [self.config.channels, self.config.image_size, self.config.image_size]
        if len(got) != 4 or got[1:] != expected:
            raise ValueError(f"got images {got}: expected [B, {str(expected)[1:]}, as `image_processor` makes them")
        return rearrange(self.patch_embed(images), "b d h w -> b (h w) d") + self.pos_embed

    def pre_norm_features(self, images: Tensor) -> Tensor:
        """images [B, C, S, S], normalised -> features of the last layer [B, n, D], before the final norm."""
        x = self.embed_patches(images)
        b, n, _ = x.shape
        mask = AttentionMask([[KeyRange(n, full=True)]] * b, device=x.device)
        x = rearrange(x, "b n d -> (b n) d")
        for block in self.blocks:
            x = block(x, mask)
        return rearrange(x, "(b n) d -> b n d", b=b)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, S, S], normalised -> features after the final norm [B, n, D]."""
        return self.norm(self.pre_norm_features(images))

    def pool_features(self, features: Tensor) -> Tensor:
        """Features of `forward` [B, n, D] -> one an image [B, D]. Raises ValueError for an encoder without a pooling
        head."""
        if self.pooling_head is None:
            raise ValueError("this encoder has no pooling head (vision_use_head false): use its features")
        return self.pooling_head(features)


def siglip_key_map(released_prefix: str, prefix: str, *, pooling_head: bool) -> KeyMap:
    """The key map of an encoder; released names begin with `released_prefix`, ours with `prefix`."""
    names = {
        "embeddings.patch_embedding.{}": "patch_embed.{}",
        "embeddings.position_embedding.weight": "pos_embed",
        "encoder.layers.{}.layer_norm1.{}": "blocks.{}.attn_norm.{}",
        "encoder.layers.{}.layer_norm2.{}": "blocks.{}.mlp_norm.{}",
        **{f"encoder.layers.{{}}.self_attn.{p}_proj.{{}}": f"blocks.{{}}.{p}.{{}}" for p in "qkv"},
        "encoder.layers.{}.self_attn.out_proj.{}": "blocks.{}.out_proj.{}",
        "encoder.layers.{}.mlp.{}.{}": "blocks.{}.mlp.{}.{}",
        "post_layernorm.{}": "norm.{}",
    }
    head_names = {
        "head.probe": "pooling_head.probe",
        "head.attention.in_proj_{}": "pooling_head.qkv.{}",
        "head.attention.out_proj.{}": "pooling_head.out_proj.{}",
        "head.layernorm.{}": "pooling_head.norm.{}",
        "head.mlp.{}.{}": "pooling_head.mlp.{}.{}",
    }
    no_head = KeyMap(Ignore("head.{*}", because="the encoder was built without its pooling head"))
    key_map = renames(names) + (renames(head_names) if pooling_head else no_head)
    key_map += KeyMap(Ignore("embeddings.position_ids", because="a buffer of older files"))
    return key_map.prefixed(released=released_prefix, ours=prefix)


def siglip_file_key_map(config: SiglipConfig, shapes: Collection[str] = ()) -> KeyMap:
    """The key map for files of these names (none: the released ones), which may hold the text encoder, too."""
    beside = [
        Ignore(name, because="a part of the whole SigLIP, beside the image encoder")
        for name in ("text_model.{*}", "logit_scale", "logit_bias")
    ]
    # what transformers writes of an encoder alone today has no name around it
    prefix = "" if any(key.startswith("embeddings.") for key in shapes) else "vision_model."
    return siglip_key_map(prefix, "", pooling_head=config.has_pooling_head) + KeyMap(*beside)
