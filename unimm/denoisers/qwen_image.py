"""Qwen-Image's transformer: packed latents to their velocity, told what to draw by a text alone.

Wu et al. 2025, arXiv 2508.02324, section 2; docs/originals/blocks.md, "Qwen-Image transformer". Only double blocks, no
vector of the text, no guidance; places are counted from the middle of a picture, and the text's go on along the
diagonal (MSRoPE). Time 0 is data, 1 is noise; velocity = noise - data.

Axes: B batch, L tokens of the pictures, M of the text, D model, C channels, S steps, f h w frames and grid.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from unimm.checkpoint.atomic import written_beside
from unimm.checkpoint.keymap import Table
from unimm.checkpoint.load import load_into, weight_files
from unimm.checkpoint.save import released_state, save_state
from unimm.denoisers.mmdit import (
    ATTENTION_KEYS,
    EPS,
    SIDE,
    TIME_FEATURES,
    TIMESTEPS,
    Condition,
    Modulation,
    Sizes,
    Trunk,
    turns,
)
from unimm.nn.layers import MLP, RMSNorm
from unimm.nn.timestep import time_features
from unimm.tokenizers.kl_layouts import DIFFUSERS_WEIGHTS

MLP_RATIO = 4  # in no config
RELEASED_AXES = (16, 56, 56)
PLACES = 4096  # of text and pictures, along each axis: as many as the original's tables have

KEYS: Table = {
    **ATTENTION_KEYS,
    "time_text_embed.timestep_embedder.linear_{}.{}": "time.fc{}.{}",
    "txt_norm.weight": "text_norm.weight",
    "txt_in.{}": "trunk.text.{}",
    "img_in.{}": "trunk.image.{}",
    "transformer_blocks.{}.img_mod.1.{}": "trunk.doubles.{}.image.modulation.{}",
    "transformer_blocks.{}.txt_mod.1.{}": "trunk.doubles.{}.text.modulation.{}",
    "transformer_blocks.{}.img_mlp.net.0.proj.{}": "trunk.doubles.{}.image.mlp.fc1.{}",
    "transformer_blocks.{}.img_mlp.net.2.{}": "trunk.doubles.{}.image.mlp.fc2.{}",
    "transformer_blocks.{}.txt_mlp.net.0.proj.{}": "trunk.doubles.{}.text.mlp.fc1.{}",
    "transformer_blocks.{}.txt_mlp.net.2.{}": "trunk.doubles.{}.text.mlp.fc2.{}",
    "norm_out.linear.{}": "trunk.last.modulation.{}[swap]",
    "proj_out.{}": "trunk.last.out.{}",
}


@dataclass(frozen=True, kw_only=True)
class QwenImageConfig:
    in_channels: int  # of a packed token
    out_channels: int  # of a latent, a fourth of a packed token's
    n_layers: int
    n_heads: int
    head_dim: int
    text_dim: int
    axes: tuple[int, ...]

    FILES: ClassVar = {
        "in_channels": "in_channels",
        "out_channels": "out_channels",
        "n_layers": "num_layers",
        "n_heads": "num_attention_heads",
        "head_dim": "attention_head_dim",
        "text_dim": "joint_attention_dim",
        "axes": "axes_dims_rope",
    }
    # what a config could say and the release does not
    FIXED: ClassVar = {
        "_class_name": "QwenImageTransformer2DModel",
        "patch_size": SIDE,
        "guidance_embeds": False,
        "zero_cond_t": False,  # the next three are of the later models for editing and for layers
        "use_additional_t_cond": False,
        "use_layer3d_rope": False,
    }

    def __post_init__(self) -> None:
        _ = self.sizes  # which checks the numbers
        if len(self.axes) != 3:
            raise ValueError(f"got axes {list(self.axes)}: expected three, of the frame, the row and the column")

    @property
    def sizes(self) -> Sizes:
        """Those of the trunk."""
        return Sizes(
            in_channels=self.in_channels,
            out_channels=SIDE**2 * self.out_channels,
            n_doubles=self.n_layers,
            n_singles=0,
            n_heads=self.n_heads,
            head_dim=self.head_dim,
            text_dim=self.text_dim,
            hidden=MLP_RATIO * self.n_heads * self.head_dim,
            axes=self.axes,
        )

    @classmethod
    def from_files(cls, files: Mapping[str, Any]) -> Self:
        """Read the released config.json. Raises ValueError for what is missing, or what Qwen-Image does not have."""
        for key, expected in cls.FIXED.items():
            if files.get(key, expected) != expected:
                raise ValueError(f"got {key} {files[key]!r}, expected {expected!r}, as in the release of Qwen-Image")
        files = {"axes_dims_rope": RELEASED_AXES, **files}
        files = files | {"out_channels": files.get("out_channels") or files.get("in_channels")}
        if lost := [name for name in cls.FILES.values() if files.get(name) is None]:
            raise ValueError(f"the config lacks {', '.join(lost)}: expected Qwen-Image's released config.json")
        return cls(
            **{ours: files[theirs] for ours, theirs in cls.FILES.items()} | {"axes": tuple(files["axes_dims_rope"])}
        )

    def to_files(self) -> dict[str, Any]:
        """The config.json that `from_files` reads, and that diffusers does."""
        files = {theirs: getattr(self, ours) for ours, theirs in self.FILES.items()}
        return self.FIXED | files | {"axes_dims_rope": [*self.axes]}


def places(pictures: Sequence[tuple[int, int, int]], n_text: int) -> tuple[Tensor, Tensor]:
    """Places [L, 3] of the tokens of one or more pictures (frames, height, width), and [n_text, 3] of a text's; int64.

    Frames of picture k count from k. Rows and columns count from the middle, so that a larger picture goes on where a
    smaller one ends. The text begins where the largest picture does, at the same number on every axis. Raises ValueError
    for a picture without tokens, and beyond the 4096 places that the original knows.
    """
    if not pictures or any(len(picture) != 3 or min(picture) < 1 for picture in pictures):
        raise ValueError(
            f"got pictures {list(pictures)}: expected one or more of (frames, height, width), in packed tokens"
        )
    grids = [
        torch.cartesian_prod(torch.arange(k, k + f), torch.arange(h) - (h - h // 2), torch.arange(w) - (w - w // 2))
        for k, (f, h, w) in enumerate(pictures)
    ]
    start = max(max(h, w) // 2 for _, h, w in pictures)
    if start + n_text > PLACES:
        raise ValueError(f"got {n_text} tokens of text from place {start} on: expected them to end before {PLACES}")
    return torch.cat(grids), (start + torch.arange(n_text))[:, None].expand(-1, 3)


class QwenImage(nn.Module):
    """Noised packed latents, a condition and a step's modulation to the velocity."""

    def __init__(self, config: QwenImageConfig):
        super().__init__()
        self.config, dim = config, config.sizes.dim
        self.time = MLP(TIME_FEATURES, dim, dim, "silu")
        self.text_norm = RMSNorm(config.text_dim, EPS)
        self.trunk = Trunk(config.sizes)

    def condition(
        self, text: Tensor, pictures: Sequence[tuple[int, int, int]], *, seen: Tensor | None = None
    ) -> Condition:
        """text [B, M, C], the pictures of every row, seen [B, M]: 0 where a token is padding, all seen unless given.

        Once a picture. pictures: as for `places`; the first is drawn, others may follow it in the latents. Raises
        ValueError for other shapes.
        """
        of_pictures, of_text = places(pictures, text.shape[1])
        # the original's tables are of float32, and far places feel it
        angles = turns(torch.cat((of_text, of_pictures)), self.config.axes, dtype=torch.float32)
        return self.trunk.condition(text, angles.to(text.device), seen, norm=self.text_norm)

    def modulations(self, times: Tensor, *, rows: int = 1) -> list[Modulation]:
        """times [S] of all steps, in [0, 1], for batches of so many rows; or [S, B] -> a modulation a step.

        Before the loop: `model(latents, condition, modulations[i])`. In training `modulations(times[None])[0]`, times [B].
        """
        if times.ndim not in (1, 2):
            raise ValueError(f"got times of shape {list(times.shape)}: expected [S] or [S, B]")
        times = times[:, None].expand(-1, rows) if times.ndim == 1 else times
        features = time_features(TIMESTEPS * times.float().flatten(), TIME_FEATURES)
        vectors = self.time(features.to(self.time.fc1.weight.dtype))
        return self.trunk.modulations(vectors.view(*times.shape, -1))

    def forward(self, latents: Tensor, condition: Condition, modulation: Modulation) -> Tensor:
        """latents [B, L, C], packed -> velocity [B, L, C]. Raises ValueError where rows or tokens disagree."""
        return self.trunk(latents, condition, modulation)

    def save_pretrained(self, folder: Path) -> None:
        """Write config.json and the weights in the released layout."""
        with written_beside(folder) as partial:
            (partial / "config.json").write_text(json.dumps(self.config.to_files(), indent=2))
            save_state(released_state(self, KEYS), partial / DIFFUSERS_WEIGHTS[0])


def load_qwen_image(path: Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> QwenImage:
    """A transformer from a released folder (config.json beside the weights), strictly, in evaluation mode.

    Raises ValueError for another class's config, CheckpointError for weights that do not fit it.
    """
    with torch.device("meta"):
        model = QwenImage(QwenImageConfig.from_files(json.loads((path / "config.json").read_text())))
    load_into(model, weight_files(path, DIFFUSERS_WEIGHTS), KEYS, dtype=dtype, device=torch.device(device))
    return model.eval()
