"""NaViT: a SigLIP2 vision transformer over images of any size, packed.

Axes: N packed patches, D model, H heads, K head, p patch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from unimm.kernels import AttentionMask, KeyRange
from unimm.nn.layers import EncoderBlock


@dataclass(frozen=True, kw_only=True)
class SiglipNaViTConfig:
    dim: int
    n_layers: int
    n_heads: int
    mlp_dim: int
    patch_size: int
    grid_side: int  # the table of positions is a grid of side * side
    channels: int
    norm_eps: float
    act: str

    FILES: ClassVar = {
        "dim": "hidden_size",
        "n_heads": "num_attention_heads",
        "mlp_dim": "intermediate_size",
        "patch_size": "patch_size",
        "channels": "num_channels",
        "norm_eps": "layer_norm_eps",
        "act": "hidden_act",
    }

    @classmethod
    def from_json(cls, files: Mapping[str, Any], *, drop_last: bool = False) -> "SiglipNaViTConfig":
        """Read a SigLIP vision config; its class defaults for what is missing. drop_last: the file counts a layer too many."""
        if files.get("rope"):
            raise ValueError(
                "the vision config asks for rope: true; this NaViT has a table of positions, as the released one"
            )
        files = {"num_channels": 3, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh", **files}
        if lost := [name for name in (*cls.FILES.values(), "num_hidden_layers", "image_size") if name not in files]:
            raise ValueError(f"the vision config lacks {', '.join(lost)}: expected the released vit_config.json")
        fields = {ours: files[theirs] for ours, theirs in cls.FILES.items()}
        return cls(
            **fields,
            n_layers=files["num_hidden_layers"] - drop_last,
            grid_side=files["image_size"] // files["patch_size"],
        )

    def to_json(self, *, drop_last: bool = False) -> dict[str, Any]:
        """The mapping that `from_json` reads."""
        files = {theirs: getattr(self, ours) for ours, theirs in self.FILES.items()} | {
            "model_type": "siglip_vision_model"
        }
        return files | {"num_hidden_layers": self.n_layers + drop_last, "image_size": self.grid_side * self.patch_size}

    def __post_init__(self) -> None:
        if self.dim % self.n_heads:
            raise ValueError(f"vision dim {self.dim} must be a multiple of its heads {self.n_heads}")


class SiglipNaViT(nn.Module):
    """Patches and their places in the table of positions -> features; images in a pack do not see each other."""

    def __init__(self, config: SiglipNaViTConfig):
        super().__init__()
        self.patch_embed = nn.Linear(config.channels * config.patch_size**2, config.dim)
        self.pos_embed = nn.Embedding(config.grid_side**2, config.dim)
        self.blocks = nn.ModuleList(
            EncoderBlock(config.dim, config.n_heads, config.mlp_dim, config.act, config.norm_eps)
            for _ in range(config.n_layers)
        )
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)

    def forward(self, patches: Tensor, position_ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """patches [N, p*p*3] ordered (row in patch, column in patch, channel), places [N], patches an image -> [N, D]."""
        mask = AttentionMask([[KeyRange(n, full=True)] for n in lengths], device=patches.device)
        x = self.patch_embed(patches) + self.pos_embed(position_ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)
