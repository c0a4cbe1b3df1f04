"""FLUX.1's transformer: packed latents to their velocity, conditioned on a text's states, a pooled vector and a
guidance.

docs/originals/blocks.md, "FLUX.1 transformer": the two layouts differ in the order of shift and scale. Time 0 is data,
1 is noise; velocity = noise - data.

    condition = flux.condition(text, grid(height, width))
    steps = flux.modulations(times[:-1], pooled, guidance=3.5)
    velocity = flux(latents, condition, steps[i])

Axes: B batch, L tokens of the image, M of the text, D model, C channels, S steps, h w grid.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from unimm.checkpoint.component import DIFFUSERS_WEIGHT_FILES, PretrainedComponent, write_component
from unimm.checkpoint.config_io import JsonConfig, JsonLayout, PositiveInt, SameAs
from unimm.checkpoint.json_files import read_json
from unimm.checkpoint.keymap import KeyMap, Slice, SwapHalves, renames
from unimm.checkpoint.load import Shapes
from unimm.denoisers.mmdit import (
    ATTENTION_KEY_MAP,
    TIMESTEP_EMBED_DIM,
    TIMESTEP_SCALE,
    MMDiT,
    MMDiTCondition,
    MMDiTConfig,
    Modulation,
)
from unimm.generation.step_cache import RowStepCache
from unimm.nn.layers import MLP
from unimm.nn.rope import complex_rope
from unimm.nn.timestep import timestep_embedding

BFL_WEIGHT_FILES = ("flux1-dev.safetensors", "flux1-schnell.safetensors")
RELEASED_AXES_DIMS = (16, 56, 56)  # of heads of 128, in every release; the weights do not tell

TOP_KEY_MAP = renames(
    {
        "time_text_embed.timestep_embedder.linear_{}.{}": "time_embed.fc{}.{}",
        "time_text_embed.text_embedder.linear_{}.{}": "pooled_embed.fc{}.{}",
        "context_embedder.{}": "mmdit.text_in.{}",
        "x_embedder.{}": "mmdit.image_in.{}",
        "proj_out.{}": "mmdit.final_layer.out_proj.{}",
    }
)
TOP_KEY_MAP += KeyMap(SwapHalves("norm_out.linear.{}", "mmdit.final_layer.modulation.{}"))
DOUBLE_KEY_MAP = ATTENTION_KEY_MAP + renames(
    {
        "transformer_blocks.{}.norm1.linear.{}": "mmdit.double_blocks.{}.image.modulation.{}",
        "transformer_blocks.{}.norm1_context.linear.{}": "mmdit.double_blocks.{}.text.modulation.{}",
        "transformer_blocks.{}.ff.net.0.proj.{}": "mmdit.double_blocks.{}.image.mlp.fc1.{}",
        "transformer_blocks.{}.ff.net.2.{}": "mmdit.double_blocks.{}.image.mlp.fc2.{}",
        "transformer_blocks.{}.ff_context.net.0.proj.{}": "mmdit.double_blocks.{}.text.mlp.fc1.{}",
        "transformer_blocks.{}.ff_context.net.2.{}": "mmdit.double_blocks.{}.text.mlp.fc2.{}",
    }
)
SINGLE_KEY_MAP = renames(
    {
        "single_transformer_blocks.{}.norm.linear.{}": "mmdit.single_blocks.{}.modulation.{}",
        "single_transformer_blocks.{}.attn.norm_{}.weight": "mmdit.single_blocks.{}.{}_norm.weight",
        "single_transformer_blocks.{}.proj_out.{}": "mmdit.single_blocks.{}.out_proj.{}",
    }
)

# Black Forest Labs' own
BFL_TOP_KEY_MAP = renames(
    {
        "time_in.in_layer.{}": "time_embed.fc1.{}",
        "time_in.out_layer.{}": "time_embed.fc2.{}",
        "vector_in.in_layer.{}": "pooled_embed.fc1.{}",
        "vector_in.out_layer.{}": "pooled_embed.fc2.{}",
        "txt_in.{}": "mmdit.text_in.{}",
        "img_in.{}": "mmdit.image_in.{}",
        "final_layer.adaLN_modulation.1.{}": "mmdit.final_layer.modulation.{}",
        "final_layer.linear.{}": "mmdit.final_layer.out_proj.{}",
    }
)
BFL_DOUBLE_KEY_MAP = renames(
    {
        f"double_blocks.{{}}.{short}_{theirs}": f"mmdit.double_blocks.{{}}.{stream}.{ours}"
        for short, stream in (("img", "image"), ("txt", "text"))
        for theirs, ours in {
            "mod.lin.{}": "modulation.{}",
            "attn.qkv.{}": "qkv.{}",
            "attn.norm.query_norm.scale": "q_norm.weight",
            "attn.norm.key_norm.scale": "k_norm.weight",
            "attn.proj.{}": "out_proj.{}",
            "mlp.0.{}": "mlp.fc1.{}",
            "mlp.2.{}": "mlp.fc2.{}",
        }.items()
    }
)
BFL_SINGLE_KEY_MAP = renames(
    {
        "single_blocks.{}.modulation.lin.{}": "mmdit.single_blocks.{}.modulation.{}",
        "single_blocks.{}.linear1.{}": "mmdit.single_blocks.{}.qkv_mlp.{}",
        "single_blocks.{}.linear2.{}": "mmdit.single_blocks.{}.out_proj.{}",
        "single_blocks.{}.norm.query_norm.scale": "mmdit.single_blocks.{}.q_norm.weight",
        "single_blocks.{}.norm.key_norm.scale": "mmdit.single_blocks.{}.k_norm.weight",
    }
)


@dataclass(frozen=True, kw_only=True)
class FluxConfig(JsonConfig):
    in_channels: PositiveInt  # of a packed token
    out_channels: PositiveInt
    n_double_blocks: Annotated[int, range(10_001)]
    n_single_blocks: Annotated[int, range(10_001)]
    n_heads: PositiveInt
    head_dim: PositiveInt
    text_dim: PositiveInt
    pooled_dim: PositiveInt
    guidance_embeds: bool  # whether a guidance is embedded beside the time; FLUX.1-schnell has none
    rope_axes_dims: tuple[int, ...]
    mlp_ratio: float = 4.0

    JSON: ClassVar = JsonLayout(
        source="the released config.json of a FLUX.1 transformer",
        keys={
            "in_channels": "in_channels",
            "out_channels": "out_channels",
            "n_double_blocks": "num_layers",
            "n_single_blocks": "num_single_layers",
            "n_heads": "num_attention_heads",
            "head_dim": "attention_head_dim",
            "text_dim": "joint_attention_dim",
            "pooled_dim": "pooled_projection_dim",
            "guidance_embeds": "guidance_embeds",
            "rope_axes_dims": "axes_dims_rope",
        },
        defaults={
            "out_channels": SameAs("in_channels"),
            "guidance_embeds": False,
            "axes_dims_rope": RELEASED_AXES_DIMS,
        },
        fixed={"_class_name": "FluxTransformer2DModel", "patch_size": 1},
    )

    def __post_init__(self) -> None:
        if self.pooled_dim < 1 or self.in_channels < 1:
            raise ValueError(f"got {self}: expected positive numbers")
        _ = self.mmdit  # which checks the others

    @property
    def mmdit(self) -> MMDiTConfig:
        """Those of the trunk."""
        return MMDiTConfig(
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            n_double_blocks=self.n_double_blocks,
            n_single_blocks=self.n_single_blocks,
            n_heads=self.n_heads,
            head_dim=self.head_dim,
            text_dim=self.text_dim,
            mlp_dim=int(self.mlp_ratio * self.n_heads * self.head_dim),
            rope_axes_dims=self.rope_axes_dims,
        )

    @classmethod
    def from_shapes(
        cls, shapes: Mapping[str, tuple[int, ...]], rope_axes_dims: tuple[int, ...] = RELEASED_AXES_DIMS
    ) -> Self:
        """Read the shapes of Black Forest Labs' weights, which come without a config; only the axes are not among them.

        Raises ValueError where a tensor that tells a size is missing.
        """

        def depth(name: str) -> int:
            return len({key.split(".")[1] for key in shapes if key.startswith(f"{name}.")})

        norms = [shape for key, shape in shapes.items() if key.endswith("query_norm.scale")]
        matrices = ("img_in.weight", "txt_in.weight", "vector_in.in_layer.weight", "final_layer.linear.weight")
        if (missing := [key for key in matrices if key not in shapes]) or not norms:
            raise ValueError(f"the weights lack {', '.join(missing) or 'norms of queries'}: expected those of FLUX.1")
        wrong = [f"{key} {list(shapes[key])}" for key in matrices if len(shapes[key]) != 2 or min(shapes[key]) < 1]
        if wrong or any(len(shape) != 1 or shape[0] < 1 for shape in norms):
            raise ValueError(f"got shapes {', '.join(wrong) or norms[0]}: expected those of FLUX.1's weights")
        (dim, in_channels) = shapes["img_in.weight"]
        head_dim = norms[0][0]
        wide = [
            _first_length(shapes, "double_blocks.", "img_mlp.0.bias"),
            _first_length(shapes, "single_blocks.", "linear1.bias") - 3 * dim,
        ]
        return cls(
            in_channels=in_channels,
            out_channels=shapes["final_layer.linear.weight"][0],
            n_double_blocks=depth("double_blocks"),
            n_single_blocks=depth("single_blocks"),
            n_heads=dim // head_dim,
            head_dim=head_dim,
            text_dim=shapes["txt_in.weight"][1],
            pooled_dim=shapes["vector_in.in_layer.weight"][1],
            guidance_embeds="guidance_in.in_layer.weight" in shapes,
            rope_axes_dims=rope_axes_dims,
            mlp_ratio=max(wide) / dim,
        )


def _first_length(shapes: Mapping[str, tuple[int, ...]], head: str, tail: str) -> int:
    """The rows of a tensor of the first block that has it; 0 for none."""
    found = (shape for key, shape in shapes.items() if key.startswith(head) and key.endswith(tail) and shape)
    return next(found, (0,))[0]


def in_bfl_layout(names: Collection[str]) -> bool:
    """Whether released tensors have Black Forest Labs' names."""
    return any(name.startswith(("double_blocks.", "single_blocks.")) for name in names)


def flux_key_map(config: FluxConfig) -> KeyMap:
    """The key map of diffusers' layout, without the entries of parts that the config lacks."""
    key_map = TOP_KEY_MAP
    if config.guidance_embeds:
        key_map += renames({"time_text_embed.guidance_embedder.linear_{}.{}": "guidance_embed.fc{}.{}"})
    if config.n_double_blocks:
        key_map += DOUBLE_KEY_MAP
    if config.n_single_blocks:
        key_map += SINGLE_KEY_MAP + _qkv_mlp_slices(config.mmdit.dim, config.mmdit.mlp_dim)
    return key_map


def _qkv_mlp_slices(dim: int, mlp_dim: int) -> KeyMap:
    """The released q, k, v and proj_mlp of a single block, which are parts of the rows of one of our linears."""
    unit = gcd(dim, mlp_dim)
    one = dim // unit
    shares = (3 * dim + mlp_dim) // unit
    lengths = {"attn.to_q": one, "attn.to_k": one, "attn.to_v": one, "proj_mlp": shares - 3 * one}
    return KeyMap(
        *(
            Slice(
                f"single_transformer_blocks.{{}}.{name}.{{}}",
                "mmdit.single_blocks.{}.qkv_mlp.{}",
                first=i * one,
                of=shares,
                length=length,
            )
            for i, (name, length) in enumerate(lengths.items())
        )
    )


def flux_bfl_key_map(config: FluxConfig) -> KeyMap:
    """The key map of Black Forest Labs' layout, without the entries of parts that the config lacks."""
    key_map = BFL_TOP_KEY_MAP
    if config.guidance_embeds:
        key_map += renames(
            {"guidance_in.in_layer.{}": "guidance_embed.fc1.{}", "guidance_in.out_layer.{}": "guidance_embed.fc2.{}"}
        )
    if config.n_double_blocks:
        key_map += BFL_DOUBLE_KEY_MAP
    if config.n_single_blocks:
        key_map += BFL_SINGLE_KEY_MAP
    return key_map


def flux_position_ids(height: int, width: int) -> Tensor:
    """Position ids of an image of height x width packed tokens, [h w, 3] float32: (0, row, column)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((torch.zeros_like(rows), rows, columns), -1).flatten(0, 1).float()


class FluxTransformer(PretrainedComponent):
    """Noised packed latents, a condition and a step's modulation to the velocity."""

    WEIGHT_FILES = (*DIFFUSERS_WEIGHT_FILES, *BFL_WEIGHT_FILES)

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        dim = config.mmdit.dim
        self.time_embed = MLP(TIMESTEP_EMBED_DIM, dim, dim, "silu")
        self.guidance_embed = MLP(TIMESTEP_EMBED_DIM, dim, dim, "silu") if config.guidance_embeds else None
        self.pooled_embed = MLP(config.pooled_dim, dim, dim, "silu")
        self.mmdit = MMDiT(config.mmdit)

    @classmethod
    def from_configs(cls, folder: Path, shapes: Shapes) -> Self:
        # Black Forest Labs' files come without a config: then sizes are those of the tensors, with the released axes
        if in_bfl_layout(shapes) and not (folder / "config.json").exists():
            return cls(FluxConfig.from_shapes(shapes))
        return cls(FluxConfig.from_json(read_json(folder / "config.json", required=True)))

    def key_map(self, shapes: Shapes) -> KeyMap:
        return flux_bfl_key_map(self.config) if in_bfl_layout(shapes) else flux_key_map(self.config)

    def condition(
        self,
        text: Tensor,
        position_ids: Tensor,
        *,
        text_position_ids: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> MMDiTCondition:
        """text [B, M, C], position_ids of the image [L, 3] (see `flux_position_ids`), text_position_ids [M, 3], 0 by
        default; key_padding_mask [B, M]: 0 where a token is padding.

        Computed once an image. Raises ValueError for other shapes.
        """
        if text_position_ids is None:
            text_position_ids = position_ids.new_zeros(text.shape[1], position_ids.shape[-1])
        angles = complex_rope(
            torch.cat((text_position_ids.to(position_ids), position_ids)),
            self.config.rope_axes_dims,
            dtype=torch.float64,
        )
        return self.mmdit.condition(text, angles.to(text.device), key_padding_mask)

    def modulations(
        self, timesteps: Tensor, pooled: Tensor, *, guidance: float | Tensor | None = None
    ) -> list[Modulation]:
        """times [S] of all steps, or [S, B], in [0, 1]; pooled [B, C]; guidance, or one a row [B] -> a modulation a
        step.

        Before the loop: `flux(latents, condition, modulations[i])`. In training `modulations(times[None], ...)[0]`,
        times [B]. Raises ValueError for a guidance that the model does not embed, or the lack of one that it does.
        """
        if pooled.ndim != 2 or pooled.shape[1] != self.config.pooled_dim:
            raise ValueError(f"got pooled of shape {list(pooled.shape)}: expected [B, {self.config.pooled_dim}]")
        if timesteps.ndim not in (1, 2) or (timesteps.ndim == 2 and timesteps.shape[1] != len(pooled)):
            raise ValueError(
                f"got times {list(timesteps.shape)} for {len(pooled)} rows: expected [S] or [S, {len(pooled)}]"
            )
        if (guidance is None) == self.config.guidance_embeds:
            wanted = "a number, 3.5 say" if self.config.guidance_embeds else "None: this model embeds none"
            raise ValueError(f"got guidance {guidance}: expected {wanted}")
        vectors = self.embed_scalars(self.time_embed, timesteps).view(
            len(timesteps), -1, self.config.mmdit.dim
        ) + self.pooled_embed(pooled)
        if self.guidance_embed is not None:
            given = torch.as_tensor(guidance, dtype=torch.float32, device=pooled.device)
            vectors = vectors + self.embed_scalars(self.guidance_embed, given.expand(len(pooled)))
        return self.mmdit.modulations(vectors)

    def embed_scalars(self, mlp: MLP, numbers: Tensor) -> Tensor:
        """Times or guidances of any shape -> [n, D]."""
        return mlp(
            timestep_embedding(TIMESTEP_SCALE * numbers.float().flatten(), TIMESTEP_EMBED_DIM).to(mlp.fc1.weight.dtype)
        )

    def forward(
        self,
        latents: Tensor,
        condition: MMDiTCondition,
        modulation: Modulation,
        *,
        step_cache: RowStepCache | None = None,
    ) -> Tensor:
        """latents [B, L, C], packed -> velocity [B, L, C]. Raises ValueError where rows or tokens disagree."""
        return self.mmdit(latents, condition, modulation, step_cache=step_cache)

    def save_pretrained(self, folder: Path, *, layout: str = "diffusers") -> None:
        """Write config.json and the weights; layout "bfl": Black Forest Labs' names, in flux1-dev.safetensors."""
        if layout not in ("diffusers", "bfl"):
            raise ValueError(f"got layout {layout!r}: expected 'diffusers' or 'bfl'")
        table, names = (
            (flux_key_map, DIFFUSERS_WEIGHT_FILES) if layout == "diffusers" else (flux_bfl_key_map, BFL_WEIGHT_FILES)
        )
        # the axes are in no weights, so that the other layout has a config beside it, too
        write_component(self, folder, names, table(self.config), self.config.to_json())
