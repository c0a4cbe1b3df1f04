"""Qwen-Image's transformer: packed latents to their velocity, conditioned on a text alone.

Wu et al. 2025, arXiv 2508.02324, section 2; docs/originals/blocks.md, "Qwen-Image transformer". Only double blocks, no
vector of the text, no guidance; positions are counted from the middle of an image, and the text's go on along the
diagonal (MSRoPE). Time 0 is data, 1 is noise; velocity = noise - data.

Axes: B batch, L tokens of the images, M of the text, D model, C channels, S steps, f h w frames and grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from unimm.checkpoint.component import DIFFUSERS_WEIGHT_FILES, PretrainedComponent, write_component
from unimm.checkpoint.config_io import JsonConfig, JsonLayout, LayerCount, PositiveInt, SameAs
from unimm.checkpoint.json_files import read_json
from unimm.checkpoint.keymap import KeyMap, SwapHalves, renames
from unimm.checkpoint.load import Shapes
from unimm.denoisers.mmdit import (
    ATTENTION_KEY_MAP,
    NORM_EPS,
    PATCH_SIZE,
    TIMESTEP_EMBED_DIM,
    TIMESTEP_SCALE,
    MMDiT,
    MMDiTCondition,
    MMDiTConfig,
    Modulation,
)
from unimm.nn.layers import MLP, RMSNorm
from unimm.nn.rope import complex_rope
from unimm.nn.timestep import timestep_embedding

MLP_RATIO = 4  # in no config
RELEASED_AXES_DIMS = (16, 56, 56)
MAX_POSITIONS = 4096  # of text and images, along each axis: as many as the original's tables have

KEY_MAP = ATTENTION_KEY_MAP + renames(
    {
        "time_text_embed.timestep_embedder.linear_{}.{}": "time_embed.fc{}.{}",
        "txt_norm.weight": "text_norm.weight",
        "txt_in.{}": "mmdit.text_in.{}",
        "img_in.{}": "mmdit.image_in.{}",
        "transformer_blocks.{}.img_mod.1.{}": "mmdit.double_blocks.{}.image.modulation.{}",
        "transformer_blocks.{}.txt_mod.1.{}": "mmdit.double_blocks.{}.text.modulation.{}",
        "transformer_blocks.{}.img_mlp.net.0.proj.{}": "mmdit.double_blocks.{}.image.mlp.fc1.{}",
        "transformer_blocks.{}.img_mlp.net.2.{}": "mmdit.double_blocks.{}.image.mlp.fc2.{}",
        "transformer_blocks.{}.txt_mlp.net.0.proj.{}": "mmdit.double_blocks.{}.text.mlp.fc1.{}",
        "transformer_blocks.{}.txt_mlp.net.2.{}": "mmdit.double_blocks.{}.text.mlp.fc2.{}",
        "proj_out.{}": "mmdit.final_layer.out_proj.{}",
    }
)
KEY_MAP += KeyMap(SwapHalves("norm_out.linear.{}", "mmdit.final_layer.modulation.{}"))


@dataclass(frozen=True, kw_only=True)
class QwenImageConfig(JsonConfig):
    in_channels: PositiveInt  # of a packed token
    out_channels: PositiveInt  # of a latent, a fourth of a packed token's
    n_layers: LayerCount
    n_heads: PositiveInt
    head_dim: PositiveInt
    text_dim: PositiveInt
    rope_axes_dims: tuple[int, ...]

    JSON: ClassVar = JsonLayout(
        source="the released config.json of Qwen-Image's transformer",
        keys={
            "in_channels": "in_channels",
            "out_channels": "out_channels",
            "n_layers": "num_layers",
            "n_heads": "num_attention_heads",
            "head_dim": "attention_head_dim",
            "text_dim": "joint_attention_dim",
            "rope_axes_dims": "axes_dims_rope",
        },
        defaults={"out_channels": SameAs("in_channels"), "axes_dims_rope": RELEASED_AXES_DIMS},
        fixed={
            "_class_name": "QwenImageTransformer2DModel",
            "patch_size": PATCH_SIZE,
            "guidance_embeds": False,
            # the next three are those of the later models for editing and for layers
            "zero_cond_t": False,
            "use_additional_t_cond": False,
            "use_layer3d_rope": False,
        },
    )

    def __post_init__(self) -> None:
        _ = self.mmdit  # which checks the numbers
        if len(self.rope_axes_dims) != 3:
            raise ValueError(
                f"got axes {list(self.rope_axes_dims)}: expected three, of the frame, the row and the column"
            )

    @property
    def mmdit(self) -> MMDiTConfig:
        """Those of the trunk."""
        return MMDiTConfig(
            in_channels=self.in_channels,
            out_channels=PATCH_SIZE**2 * self.out_channels,
            n_double_blocks=self.n_layers,
            n_single_blocks=0,
            n_heads=self.n_heads,
            head_dim=self.head_dim,
            text_dim=self.text_dim,
            mlp_dim=MLP_RATIO * self.n_heads * self.head_dim,
            rope_axes_dims=self.rope_axes_dims,
        )


def msrope_position_ids(images: Sequence[tuple[int, int, int]], n_text_tokens: int) -> tuple[Tensor, Tensor]:
    """Position ids [L, 3] of images of (frames, height, width) tokens, and [n_text_tokens, 3] of a text; int64.

    Frames of image k count from k. Rows and columns count from the middle, so that a larger image goes on where a
    smaller one ends. The text begins where the largest image ends, at the same number on every axis. Raises ValueError
    for an image without tokens, and beyond the 4096 positions of the original.
    """
    if not images or any(len(image) != 3 or min(image) < 1 for image in images):
        raise ValueError(
            f"got images {list(images)}: expected one or more of (frames, height, width), in packed tokens"
        )
    grids = [
        torch.cartesian_prod(torch.arange(k, k + f), torch.arange(h) - (h - h // 2), torch.arange(w) - (w - w // 2))
        for k, (f, h, w) in enumerate(images)
    ]
    start = max(max(h, w) // 2 for _, h, w in images)
    if start + n_text_tokens > MAX_POSITIONS:
        raise ValueError(
            f"got {n_text_tokens} tokens of text from position {start} on: expected them to end before {MAX_POSITIONS}"
        )
    return torch.cat(grids), (start + torch.arange(n_text_tokens))[:, None].expand(-1, 3)


class QwenImageTransformer(PretrainedComponent):
    """Noised packed latents, a condition and a step's modulation to the velocity."""

    WEIGHT_FILES = DIFFUSERS_WEIGHT_FILES

    def __init__(self, config: QwenImageConfig):
        super().__init__()
        self.config = config
        dim = config.mmdit.dim
        self.time_embed = MLP(TIMESTEP_EMBED_DIM, dim, dim, "silu")
        self.text_norm = RMSNorm(config.text_dim, NORM_EPS)
        self.mmdit = MMDiT(config.mmdit)

    @classmethod
    def from_configs(cls, folder: Path, shapes: Shapes) -> Self:
        return cls(QwenImageConfig.from_json(read_json(folder / "config.json", required=True)))

    def key_map(self, shapes: Shapes) -> KeyMap:
        return KEY_MAP

    def condition(
        self, text: Tensor, images: Sequence[tuple[int, int, int]], *, key_padding_mask: Tensor | None = None
    ) -> MMDiTCondition:
        """text [B, M, C] and the images of every row -> the condition, computed once. Raises ValueError for other
        shapes.

        images: as for `msrope_position_ids`; the first is generated, others may follow it in the latents.
        key_padding_mask [B, M]: 0 where a token is padding; none is by default.
        """
        image_ids, text_ids = msrope_position_ids(images, text.shape[1])
        # the original's tables are of float32, which shows at large positions
        angles = complex_rope(torch.cat((text_ids, image_ids)), self.config.rope_axes_dims, dtype=torch.float32)
        return self.mmdit.condition(text, angles.to(text.device), key_padding_mask, norm=self.text_norm)

    def modulations(self, timesteps: Tensor, *, batch_size: int = 1) -> list[Modulation]:
        """times [S] of all steps, in [0, 1], for batches of so many rows; or [S, B] -> a modulation a step.

        Before the loop: `model(latents, condition, modulations[i])`. In training `modulations(times[None])[0]`, times
        [B].
        """
        if timesteps.ndim not in (1, 2):
            raise ValueError(f"got times of shape {list(timesteps.shape)}: expected [S] or [S, B]")
        timesteps = timesteps[:, None].expand(-1, batch_size) if timesteps.ndim == 1 else timesteps
        features = timestep_embedding(TIMESTEP_SCALE * timesteps.float().flatten(), TIMESTEP_EMBED_DIM)
        vectors = self.time_embed(features.to(self.time_embed.fc1.weight.dtype))
        return self.mmdit.modulations(vectors.view(*timesteps.shape, -1))

    def forward(self, latents: Tensor, condition: MMDiTCondition, modulation: Modulation) -> Tensor:
        """latents [B, L, C], packed -> velocity [B, L, C]. Raises ValueError where rows or tokens disagree."""
        return self.mmdit(latents, condition, modulation)

    def save_pretrained(self, folder: Path) -> None:
        """Write config.json and the weights in the released layout."""
        write_component(self, folder, DIFFUSERS_WEIGHT_FILES, KEY_MAP, self.config.to_json())
