"""FLUX.1's transformer: packed latents to their velocity, told what to draw by a sequence, a vector and a guidance.

docs/originals/blocks.md, "FLUX.1 transformer": the two layouts differ in the order of shift and scale. Time 0 is data,
1 is noise; velocity = noise - data.

    condition = flux.condition(text, grid(height, width))
    steps = flux.modulations(times[:-1], pooled, guidance=3.5)
    velocity = flux(latents, condition, steps[i])

Axes: B batch, L tokens of the picture, M of the text, D model, C channels, S steps, h w grid.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from unimm.checkpoint.atomic import written_beside
from unimm.checkpoint.keymap import Table
from unimm.checkpoint.load import load_into, read_shapes, weight_files
from unimm.checkpoint.save import released_state, save_state
from unimm.denoisers.mmdit import ATTENTION_KEYS, TIME_FEATURES, TIMESTEPS, Condition, Modulation, Sizes, Trunk, turns
from unimm.nn.layers import MLP
from unimm.nn.timestep import time_features
from unimm.tokenizers.kl_layouts import DIFFUSERS_WEIGHTS

BFL_WEIGHTS = ("flux1-dev.safetensors", "flux1-schnell.safetensors")
RELEASED_AXES = (16, 56, 56)  # of heads of 128, in every release; the weights do not tell

TOP_KEYS: Table = {
    "time_text_embed.timestep_embedder.linear_{}.{}": "time.fc{}.{}",
    "time_text_embed.text_embedder.linear_{}.{}": "pooled.fc{}.{}",
    "context_embedder.{}": "trunk.text.{}",
    "x_embedder.{}": "trunk.image.{}",
    "norm_out.linear.{}": "trunk.last.modulation.{}[swap]",
    "proj_out.{}": "trunk.last.out.{}",
}
DOUBLE_KEYS: Table = {
    **ATTENTION_KEYS,
    "transformer_blocks.{}.norm1.linear.{}": "trunk.doubles.{}.image.modulation.{}",
    "transformer_blocks.{}.norm1_context.linear.{}": "trunk.doubles.{}.text.modulation.{}",
    "transformer_blocks.{}.ff.net.0.proj.{}": "trunk.doubles.{}.image.mlp.fc1.{}",
    "transformer_blocks.{}.ff.net.2.{}": "trunk.doubles.{}.image.mlp.fc2.{}",
    "transformer_blocks.{}.ff_context.net.0.proj.{}": "trunk.doubles.{}.text.mlp.fc1.{}",
    "transformer_blocks.{}.ff_context.net.2.{}": "trunk.doubles.{}.text.mlp.fc2.{}",
}
SINGLE_KEYS: Table = {
    "single_transformer_blocks.{}.norm.linear.{}": "trunk.singles.{}.modulation.{}",
    "single_transformer_blocks.{}.attn.norm_{}.weight": "trunk.singles.{}.{}_norm.weight",
    "single_transformer_blocks.{}.proj_out.{}": "trunk.singles.{}.out.{}",
}

# Black Forest Labs' own
BFL_TOP_KEYS: Table = {
    "time_in.in_layer.{}": "time.fc1.{}",
    "time_in.out_layer.{}": "time.fc2.{}",
    "vector_in.in_layer.{}": "pooled.fc1.{}",
    "vector_in.out_layer.{}": "pooled.fc2.{}",
    "txt_in.{}": "trunk.text.{}",
    "img_in.{}": "trunk.image.{}",
    "final_layer.adaLN_modulation.1.{}": "trunk.last.modulation.{}",
    "final_layer.linear.{}": "trunk.last.out.{}",
}
BFL_DOUBLE_KEYS: Table = {
    f"double_blocks.{{}}.{short}_{theirs}": f"trunk.doubles.{{}}.{stream}.{ours}"
    for short, stream in (("img", "image"), ("txt", "text"))
    for theirs, ours in {
        "mod.lin.{}": "modulation.{}",
        "attn.qkv.{}": "qkv.{}",
        "attn.norm.query_norm.scale": "q_norm.weight",
        "attn.norm.key_norm.scale": "k_norm.weight",
        "attn.proj.{}": "out.{}",
        "mlp.0.{}": "mlp.fc1.{}",
        "mlp.2.{}": "mlp.fc2.{}",
    }.items()
}
BFL_SINGLE_KEYS: Table = {
    "single_blocks.{}.modulation.lin.{}": "trunk.singles.{}.modulation.{}",
    "single_blocks.{}.linear1.{}": "trunk.singles.{}.into.{}",
    "single_blocks.{}.linear2.{}": "trunk.singles.{}.out.{}",
    "single_blocks.{}.norm.query_norm.scale": "trunk.singles.{}.q_norm.weight",
    "single_blocks.{}.norm.key_norm.scale": "trunk.singles.{}.k_norm.weight",
}


@dataclass(frozen=True, kw_only=True)
class FluxConfig:
    in_channels: int  # of a packed token
    out_channels: int
    n_doubles: int
    n_singles: int
    n_heads: int
    head_dim: int
    text_dim: int
    pooled_dim: int
    guided: bool  # whether a guidance is embedded beside the time; FLUX.1-schnell has none
    axes: tuple[int, ...]
    mlp_ratio: float = 4.0

    FILES: ClassVar = {
        "in_channels": "in_channels",
        "out_channels": "out_channels",
        "n_doubles": "num_layers",
        "n_singles": "num_single_layers",
        "n_heads": "num_attention_heads",
        "head_dim": "attention_head_dim",
        "text_dim": "joint_attention_dim",
        "pooled_dim": "pooled_projection_dim",
        "guided": "guidance_embeds",
        "axes": "axes_dims_rope",
    }
    # what a config could say and the released ones do not
    FIXED: ClassVar = {"_class_name": "FluxTransformer2DModel", "patch_size": 1}

    def __post_init__(self) -> None:
        if self.pooled_dim < 1 or self.in_channels < 1:
            raise ValueError(f"got {self}: expected positive numbers")
        _ = self.sizes  # which checks the others

    @property
    def sizes(self) -> Sizes:
        """Those of the trunk."""
        return Sizes(
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            n_doubles=self.n_doubles,
            n_singles=self.n_singles,
            n_heads=self.n_heads,
            head_dim=self.head_dim,
            text_dim=self.text_dim,
            hidden=int(self.mlp_ratio * self.n_heads * self.head_dim),
            axes=self.axes,
        )

    @classmethod
    def from_files(cls, files: Mapping[str, Any]) -> Self:
        """Read diffusers' config.json. Raises ValueError for what is missing, or what no release of FLUX.1 has."""
        for key, expected in cls.FIXED.items():
            if files.get(key, expected) != expected:
                raise ValueError(f"got {key} {files[key]!r}, expected {expected!r}, as in the releases of FLUX.1")
        files = {"guidance_embeds": False, "axes_dims_rope": RELEASED_AXES, **files}
        files = files | {"out_channels": files.get("out_channels") or files.get("in_channels")}
        if lost := [name for name in cls.FILES.values() if files.get(name) is None]:
            raise ValueError(
                f"the config lacks {', '.join(lost)}: expected the released config.json of a FLUX transformer"
            )
        return cls(
            **{ours: files[theirs] for ours, theirs in cls.FILES.items()} | {"axes": tuple(files["axes_dims_rope"])}
        )

    def to_files(self) -> dict[str, Any]:
        """The config.json that `from_files` reads, and that diffusers does."""
        files = {theirs: getattr(self, ours) for ours, theirs in self.FILES.items()}
        return self.FIXED | files | {"axes_dims_rope": [*self.axes]}

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]], axes: tuple[int, ...] = RELEASED_AXES) -> Self:
        """Read the shapes of Black Forest Labs' weights, which come without a config; only the axes are not among them.

        Raises ValueError where a tensor that tells a size is missing.
        """

        def depth(name: str) -> int:
            return len({key.split(".")[1] for key in shapes if key.startswith(f"{name}.")})

        norms = [shape for key, shape in shapes.items() if key.endswith("query_norm.scale")]
        told = ("img_in.weight", "txt_in.weight", "vector_in.in_layer.weight", "final_layer.linear.weight")
        if (lost := [key for key in told if key not in shapes]) or not norms:
            raise ValueError(f"the weights lack {', '.join(lost) or 'norms of queries'}: expected those of FLUX.1")
        (dim, in_channels), head_dim = shapes["img_in.weight"], norms[0][0]
        wide = [
            len_of(shapes, "double_blocks.", "img_mlp.0.bias"),
            len_of(shapes, "single_blocks.", "linear1.bias") - 3 * dim,
        ]
        return cls(
            in_channels=in_channels,
            out_channels=shapes["final_layer.linear.weight"][0],
            n_doubles=depth("double_blocks"),
            n_singles=depth("single_blocks"),
            n_heads=dim // head_dim,
            head_dim=head_dim,
            text_dim=shapes["txt_in.weight"][1],
            pooled_dim=shapes["vector_in.in_layer.weight"][1],
            guided="guidance_in.in_layer.weight" in shapes,
            axes=axes,
            mlp_ratio=max(wide) / dim,
        )


def len_of(shapes: Mapping[str, tuple[int, ...]], head: str, tail: str) -> int:
    """The rows of a tensor of the first block that has it; 0 for none."""
    return next((shape[0] for key, shape in shapes.items() if key.startswith(head) and key.endswith(tail)), 0)


def keys(config: FluxConfig) -> Table:
    """The table of diffusers' layout; rows that no key would meet are left out."""
    sizes = config.sizes
    unit = gcd(sizes.dim, sizes.hidden)
    one, parts = sizes.dim // unit, (3 * sizes.dim + sizes.hidden) // unit
    named = [*(f"attn.to_{letter}" for letter in "qkv"), "proj_mlp"]
    ends = [0, one, 2 * one, 3 * one, parts]
    into = {
        f"single_transformer_blocks.{{}}.{name}.{{}}": f"trunk.singles.{{}}.into.{{}}[{ends[i]}:{ends[i + 1]}/{parts}]"
        for i, name in enumerate(named)
    }
    guidance = {"time_text_embed.guidance_embedder.linear_{}.{}": "guidance.fc{}.{}"}
    table = {**TOP_KEYS, **(guidance if config.guided else {}), **(DOUBLE_KEYS if config.n_doubles else {})}
    return table | ({**SINGLE_KEYS, **into} if config.n_singles else {})


def bfl_keys(config: FluxConfig) -> Table:
    """The table of Black Forest Labs' layout."""
    guidance = {"guidance_in.in_layer.{}": "guidance.fc1.{}", "guidance_in.out_layer.{}": "guidance.fc2.{}"}
    table = {**BFL_TOP_KEYS, **(guidance if config.guided else {}), **(BFL_DOUBLE_KEYS if config.n_doubles else {})}
    return {**table, **(BFL_SINGLE_KEYS if config.n_singles else {})}


def grid(height: int, width: int) -> Tensor:
    """The places of a picture of height x width packed tokens, [h w, 3] float32: (0, row, column)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((torch.zeros_like(rows), rows, columns), -1).flatten(0, 1).float()


class Flux(nn.Module):
    """Noised packed latents, a condition and a step's modulation to the velocity."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config, dim = config, config.sizes.dim
        self.time = MLP(TIME_FEATURES, dim, dim, "silu")
        self.guidance = MLP(TIME_FEATURES, dim, dim, "silu") if config.guided else None
        self.pooled = MLP(config.pooled_dim, dim, dim, "silu")
        self.trunk = Trunk(config.sizes)

    def condition(
        self, text: Tensor, places: Tensor, *, text_places: Tensor | None = None, seen: Tensor | None = None
    ) -> Condition:
        """text [B, M, C], the picture's places [L, 3] (see `grid`), the text's [M, 3], all 0 unless given; seen [B, M]: 0
        where a token is padding.

        Once a picture. Raises ValueError for other shapes.
        """
        if text_places is None:
            text_places = places.new_zeros(text.shape[1], places.shape[-1])
        angles = turns(torch.cat((text_places.to(places), places)), self.config.axes, dtype=torch.float64)
        return self.trunk.condition(text, angles.to(text.device), seen)

    def modulations(self, times: Tensor, pooled: Tensor, *, guidance: float | Tensor | None = None) -> list[Modulation]:
        """times [S] of all steps, or [S, B], in [0, 1]; pooled [B, C]; guidance, or one a row [B] -> a modulation a step.

        Before the loop: `flux(latents, condition, modulations[i])`. In training `modulations(times[None], ...)[0]`, times
        [B]. Raises ValueError for a guidance that the model does not embed, or the lack of one that it does.
        """
        if pooled.ndim != 2 or pooled.shape[1] != self.config.pooled_dim:
            raise ValueError(f"got pooled of shape {list(pooled.shape)}: expected [B, {self.config.pooled_dim}]")
        if times.ndim not in (1, 2) or (times.ndim == 2 and times.shape[1] != len(pooled)):
            raise ValueError(
                f"got times {list(times.shape)} for {len(pooled)} rows: expected [S] or [S, {len(pooled)}]"
            )
        if (guidance is None) == self.config.guided:
            wanted = "a number, 3.5 say" if self.config.guided else "None: this model embeds none"
            raise ValueError(f"got guidance {guidance}: expected {wanted}")
        vectors = self.embed(self.time, times).view(len(times), -1, self.config.sizes.dim) + self.pooled(pooled)
        if self.guidance is not None:
            given = torch.as_tensor(guidance, dtype=torch.float32, device=pooled.device)
            vectors = vectors + self.embed(self.guidance, given.expand(len(pooled)))
        return self.trunk.modulations(vectors)

    def embed(self, mlp: MLP, numbers: Tensor) -> Tensor:
        """Times or guidances of any shape -> [n, D]."""
        return mlp(time_features(TIMESTEPS * numbers.float().flatten(), TIME_FEATURES).to(mlp.fc1.weight.dtype))

    def forward(self, latents: Tensor, condition: Condition, modulation: Modulation) -> Tensor:
        """latents [B, L, C], packed -> velocity [B, L, C]. Raises ValueError where rows or tokens disagree."""
        return self.trunk(latents, condition, modulation)

    def save_pretrained(self, folder: Path, *, layout: str = "diffusers") -> None:
        """Write config.json and the weights; layout "bfl": Black Forest Labs' names, in flux1-dev.safetensors."""
        if layout not in ("diffusers", "bfl"):
            raise ValueError(f"got layout {layout!r}: expected 'diffusers' or 'bfl'")
        table, name = (keys, DIFFUSERS_WEIGHTS[0]) if layout == "diffusers" else (bfl_keys, BFL_WEIGHTS[0])
        with written_beside(folder) as partial:
            # the axes are in no weights, so that the other layout has a config beside it, too
            (partial / "config.json").write_text(json.dumps(self.config.to_files(), indent=2))
            save_state(released_state(self, table(self.config)), partial / name)


def load_flux(path: Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Flux:
    """A transformer from a folder in diffusers' layout or Black Forest Labs', or from a file of the latter's; strictly, in
    evaluation mode.

    Sizes are config.json's; theirs comes without one, and then they are those of the tensors, with the released axes.
    Raises ValueError for another class's config, CheckpointError for weights that do not fit it.
    """
    paths = [path] if path.is_file() else weight_files(path, (*DIFFUSERS_WEIGHTS, *BFL_WEIGHTS))
    shapes = read_shapes(paths)
    theirs = any(key.startswith(("double_blocks.", "single_blocks.")) for key in shapes)
    described = (path.parent if path.is_file() else path) / "config.json"
    files = json.loads(described.read_text()) if described.exists() else None
    if files is None and not theirs:
        raise ValueError(
            f"no config.json in {described.parent}: expected the released one beside weights in diffusers' layout"
        )
    config = FluxConfig.from_shapes(shapes) if files is None else FluxConfig.from_files(files)
    with torch.device("meta"):
        model = Flux(config)
    table = bfl_keys(config) if theirs else keys(config)
    load_into(model, paths, table, dtype=dtype, device=torch.device(device))
    return model.eval()
