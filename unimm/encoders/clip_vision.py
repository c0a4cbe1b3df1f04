"""CLIP's vision encoder, whose patch features before the last layer LLaVA-like models read: Show-o with CLIP.

Radford et al. 2021, arXiv 2103.00020, section 2.4; docs/originals/show_o.md, "CLIP".

Axes: B images, S pixels a side, n patches of an image in raster order, D model.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from typing_extensions import Self

from unimm.checkpoint.component import PretrainedComponent
from unimm.checkpoint.config_io import JsonConfig, JsonLayout, LayerCount, PositiveFloat, PositiveInt
from unimm.checkpoint.json_files import read_json, read_preprocessor_json
from unimm.checkpoint.keymap import KeyMap
from unimm.checkpoint.load import Shapes
from unimm.encoders.clip_keys import clip_key_map
from unimm.kernels import AttentionMask, KeyRange
from unimm.nn.layers import Activation, EncoderBlock
from unimm.processing.images.clip import CLIPImageProcessor


@dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig(JsonConfig):
    dim: PositiveInt
    n_layers: LayerCount
    n_heads: PositiveInt
    mlp_dim: PositiveInt
    patch_size: PositiveInt
    image_size: PositiveInt
    channels: PositiveInt
    norm_eps: PositiveFloat
    act: Activation

    JSON: ClassVar = JsonLayout(
        name="the vision encoder's config",
        source="openai/clip-vit-large-patch14-336",
        keys={
            "dim": "hidden_size",
            "n_layers": "num_hidden_layers",
            "n_heads": "num_attention_heads",
            "mlp_dim": "intermediate_size",
            "patch_size": "patch_size",
            "image_size": "image_size",
            "channels": "num_channels",
            "norm_eps": "layer_norm_eps",
            "act": "hidden_act",
        },
        # those of CLIPVisionConfig in transformers: the base model at 224 pixels
        defaults={
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "patch_size": 32,
            "image_size": 224,
            "num_channels": 3,
            "layer_norm_eps": 1e-5,
            "hidden_act": "quick_gelu",
        },
        fixed={"model_type": "clip_vision_model"},
        constants={"architectures": ["CLIPVisionModel"]},
        section="vision_config",  # of a whole CLIP
    )

    def __post_init__(self) -> None:
        if self.dim % self.n_heads or self.image_size < self.patch_size:
            raise ValueError(
                f"got {self}: expected a width that is a multiple of the heads, and images of a patch or more; correct "
                "config.json"
            )

    @property
    def grid_side(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size


class CLIPVisionEncoder(PretrainedComponent):
    """Images of one size to a feature for each patch. `image_processor` makes its inputs."""

    def __init__(self, config: CLIPVisionConfig, image_processor: CLIPImageProcessor | None = None):
        super().__init__()
        self.config = config
        self.image_processor = image_processor or CLIPImageProcessor(size=config.image_size)
        self.patch_embed = nn.Conv2d(config.channels, config.dim, config.patch_size, config.patch_size, bias=False)
        self.class_embed = nn.Parameter(torch.zeros(config.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1 + config.grid_side**2, config.dim))
        self.pre_norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.blocks = nn.ModuleList(
            EncoderBlock(config.dim, config.n_heads, config.mlp_dim, config.act, config.norm_eps)
            for _ in range(config.n_layers)
        )
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)

    @classmethod
    def from_configs(cls, folder: Path, shapes: Shapes) -> Self:
        config = CLIPVisionConfig.from_json(read_json(folder / "config.json", required=True))
        return cls(config, CLIPImageProcessor.from_json(read_preprocessor_json(folder), size=config.image_size))

    def key_map(self, shapes: Shapes) -> KeyMap:
        return clip_vision_key_map(shapes)

    def embed_patches(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S], normalised -> the class row and the patches, with positions, normed [B, 1 + n, D].

        Raises ValueError for another size.
        """
        got = list(images.shape)
        expected = [self.config.channels, self.config.image_size, self.config.image_size]
        if len(got) != 4 or got[1:] != expected:
            raise ValueError(f"got images {got}: expected [B, {str(expected)[1:]}, as `image_processor` makes them")
        patches = rearrange(self.patch_embed(images), "b d h w -> b (h w) d")
        rows = torch.cat((repeat(self.class_embed, "d -> b 1 d", b=len(patches)), patches), 1)
        return self.pre_norm(rows + self.pos_embed)

    def hidden_states(self, images: Tensor, n_layers: int) -> Tensor:
        """images [B, 3, S, S], normalised -> all rows after so many layers [B, 1 + n, D], without the final norm."""
        x = self.embed_patches(images)
        b, n, _ = x.shape
        mask = AttentionMask([[KeyRange(n, full=True)]] * b, device=x.device)
        x = rearrange(x, "b n d -> (b n) d")
        for block in self.blocks[:n_layers]:
            x = block(x, mask)
        return rearrange(x, "(b n) d -> b n d", b=b)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S], normalised -> patch features of the last layer but one, without a final norm [B, n, D].

        The last layer is not run: LLaVA (arXiv 2304.08485, section 4.1) found its features worse.
        """
        return self.hidden_states(images, self.config.n_layers - 1)[:, 1:]


def clip_vision_key_map(shapes: Collection[str] = ()) -> KeyMap:
    """The key map for files of these names (none: the released ones), which may hold the rest of a CLIP, too."""
    rows = {
        "embeddings.class_embedding": "class_embed",
        "embeddings.patch_embedding.weight": "patch_embed.weight",
        "embeddings.position_embedding.weight": "pos_embed",
        "pre_layrnorm.{}": "pre_norm.{}",
        "post_layernorm.{}": "norm.{}",
    }
    return clip_key_map("vision", rows, shapes)


KEY_MAP = clip_vision_key_map()  # of the released names
