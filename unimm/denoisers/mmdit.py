"""MMDiT, the transformer of FLUX and Qwen-Image: text and image project apart and attend together.

Esser et al. 2024, arXiv 2403.03206, section 4; docs/originals/blocks.md, "FLUX.1 transformer" and "Qwen-Image
transformer". What depends on the time and on the text alone is computed once: `MMDiT.modulations` for all steps,
`MMDiTCondition` for an image.

Axes: B batch, L tokens of the image, M of the text, J = M + L of both, text first; D model, H heads, K head, S steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from unimm.checkpoint.keymap import KeyMap, equal_slices, renames
from unimm.generation.flow import Velocity
from unimm.generation.step_cache import RowStepCache
from unimm.kernels import adaln_modulate
from unimm.kernels.attention.attention import can_call_by_sample, is_half
from unimm.nn.layers import MLP, RMSNorm
from unimm.nn.rope import apply_complex_rope

TIMESTEP_SCALE = 1000  # a time in [0, 1] is embedded as one in [0, 1000], and so is a guidance
TIMESTEP_EMBED_DIM = 256  # cosines and sines of a time
NORM_EPS = 1e-6  # of every norm, in no config
PATCH_SIZE = 2  # of the patches of latents that make a token


# the attention of a double block in diffusers' words
def _attention_key_map(stream: str, qkv: tuple[str, str, str], out: str, norm: str) -> KeyMap:
    """The key map of one stream's attention in diffusers' layout: released names of its projections and norms."""
    released = "transformer_blocks.{}.attn."
    ours = f"mmdit.double_blocks.{{}}.{stream}."
    names = {f"{out}.{{}}": "out_proj.{}", f"{norm}q.weight": "q_norm.weight", f"{norm}k.weight": "k_norm.weight"}
    slices = equal_slices([f"{name}.{{}}" for name in qkv], "qkv.{}")
    return (renames(names) + slices).prefixed(released=released, ours=ours)


ATTENTION_KEY_MAP = _attention_key_map("image", ("to_q", "to_k", "to_v"), "to_out.0", "norm_")
ATTENTION_KEY_MAP += _attention_key_map("text", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "norm_added_")


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig:
    """Numbers of an MMDiT. rope_axes_dims: dimensions of a head that each axis of a position rotates."""

    in_channels: int
    out_channels: int
    n_double_blocks: int
    n_single_blocks: int
    n_heads: int
    head_dim: int
    text_dim: int
    mlp_dim: int  # of the feed-forwards
    rope_axes_dims: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = {
            name: number
            for name, number in vars(self).items()
            if name not in ("rope_axes_dims", "n_single_blocks", "n_double_blocks")
        }
        wrong = [f"{name} {number}" for name, number in numbers.items() if not number > 0]
        if min(self.n_double_blocks, self.n_single_blocks) < 0 or not self.n_double_blocks + self.n_single_blocks:
            wrong.append(f"n_double_blocks {self.n_double_blocks}, n_single_blocks {self.n_single_blocks}")
        if wrong:
            raise ValueError(f"got {', '.join(wrong)}: expected positive numbers, and a block of either kind")
        if sum(self.rope_axes_dims) != self.head_dim or any(n % 2 or n < 0 for n in self.rope_axes_dims):
            raise ValueError(
                f"got rope_axes_dims {list(self.rope_axes_dims)}: expected even numbers whose sum is head_dim, "
                f"{self.head_dim}"
            )

    @property
    def dim(self) -> int:
        """The width of both streams."""
        return self.n_heads * self.head_dim


class Modulation(NamedTuple):
    """Shifts, scales and gates of one step: [B, 6, D] of each double block's streams, [B, 3, D] of each single block,
    [B, 2, D] of the last layer."""

    image: tuple[Tensor, ...]
    text: tuple[Tensor, ...]
    single: tuple[Tensor, ...]
    final: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in one row."""
        return (*self.image, *self.text, *self.single, self.final)

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Modulation":
        """Others in place of `tensors`, in that order."""
        left = iter(tensors)
        image, text, single = (tuple(next(left) for _ in some) for some in self[:3])
        return Modulation(image, text, single, next(left))

    def select_rows(self, index: Tensor) -> "Modulation":
        """The modulation of rows `index` [N]."""
        image, text, single = (tuple(one[index] for one in some) for some in self[:3])
        return Modulation(image, text, single, self.final[index])


class MMDiTCondition(NamedTuple):
    """The projected text and the rotary embeddings that the blocks need: computed once an image, the same at every
    step.

    tokens [B, M, D], projected; rotations [J, K/2] complex; attention_mask [B, 1, 1, J] bool, None where nothing is
    masked.
    """

    tokens: Tensor
    rotations: Tensor
    attention_mask: Tensor | None = None

    def select_rows(self, index: Tensor) -> "MMDiTCondition":
        """The condition of rows `index` [N]: several images of one text, or a branch of guidance."""
        return MMDiTCondition(
            self.tokens[index], self.rotations, None if self.attention_mask is None else self.attention_mask[index]
        )


def patchify_latents(latents: Tensor) -> Tensor:
    """latents [B, C, 2h, 2w] -> [B, h w, 4C]: a token is a patch of 2 x 2, row by row; of its numbers the channel is
    first.

    Raises ValueError for odd sides.
    """
    if latents.ndim != 4 or latents.shape[2] % PATCH_SIZE or latents.shape[3] % PATCH_SIZE:
        raise ValueError(
            f"got latents of shape {list(latents.shape)}: expected [B, C, h, w] with even sides; pad or crop them"
        )
    return rearrange(latents, "B C (h y) (w x) -> B (h w) (C y x)", y=PATCH_SIZE, x=PATCH_SIZE)


def unpatchify_latents(tokens: Tensor, *, height: int, width: int) -> Tensor:
    """tokens [B, h w, 4C] -> latents [B, C, 2h, 2w], height and width being those of the latents."""
    if (
        tokens.ndim != 3
        or 4 * tokens.shape[1] != height * width
        or height % PATCH_SIZE
        or tokens.shape[2] % PATCH_SIZE**2
    ):
        raise ValueError(f"got tokens {list(tokens.shape)} for {height} x {width} latents: expected [B, h * w / 4, 4C]")
    return rearrange(tokens, "B (h w) (C y x) -> B C (h y) (w x)", h=height // PATCH_SIZE, y=PATCH_SIZE, x=PATCH_SIZE)


def joint_attention(q: Tensor, k: Tensor, v: Tensor, condition: MMDiTCondition) -> Tensor:
    """q, k, v [B, J, H, K], q and k normalised and not yet rotated -> [B, J, H K]"""
    q, k, v = (
        rearrange(x, "B J H K -> B H J K")
        for x in (apply_complex_rope(q, condition.rotations), apply_complex_rope(k, condition.rotations), v)
    )
    # not `kernels.attention`: all rows of an image attend to the same keys, which needs no mask of ranges
    if is_half(q) and can_call_by_sample(q, k, v):
        y = _attention_by_sample(q, k, v, condition.attention_mask)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=condition.attention_mask)
    return rearrange(y, "B H J K -> B J (H K)")


def _attention_by_sample(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None) -> Tensor:
    """A call for each sample without its padding, where the result is 0: q, k, v [B, H, J, K] -> the same."""
    y = torch.zeros_like(q)
    for i, sample in enumerate(zip(q, k, v, strict=True)):
        rows = slice(None) if attention_mask is None else attention_mask[i, 0, 0].nonzero().squeeze(1)
        y[i, :, rows] = F.scaled_dot_product_attention(*(x[None, :, rows] for x in sample))[0]
    return y


class MMDiTStream(nn.Module):
    """One of a double block's two streams, the text's or the image's: all but the attention itself."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        dim = config.dim
        self.modulation = nn.Linear(dim, 6 * dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.q_norm = RMSNorm(config.head_dim, NORM_EPS)
        self.k_norm = RMSNorm(config.head_dim, NORM_EPS)
        self.mlp = MLP(dim, config.mlp_dim, dim, "gelu_pytorch_tanh")
        self.head_dim = config.head_dim

    def project_qkv(self, x: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, D], shifts [B, 6, D] -> queries and keys, normed, and values, [B, L, H, K] each."""
        x = adaln_modulate(x, shifts[:, 1], shifts[:, 0], NORM_EPS)
        q, k, v = rearrange(self.qkv(x), "B L (three H K) -> three B L H K", three=3, K=self.head_dim)
        return self.q_norm(q), self.k_norm(k), v

    def output_and_mlp(self, x: Tensor, y: Tensor, shifts: Tensor) -> Tensor:
        """x [B, L, D] and what the attention gave for it, y [B, L, D] -> [B, L, D]"""
        _, _, gate, shift, scale, mlp_gate = shifts[:, :, None].unbind(1)
        x = torch.addcmul(x, gate, self.out_proj(y))
        return torch.addcmul(x, mlp_gate, self.mlp(adaln_modulate(x, scale[:, 0], shift[:, 0], NORM_EPS)))


class DoubleStreamBlock(nn.Module):
    """Two streams with weights of their own, one attention."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.image = MMDiTStream(config)
        self.text = MMDiTStream(config)

    def forward(
        self, image: Tensor, text: Tensor, image_shifts: Tensor, text_shifts: Tensor, condition: MMDiTCondition
    ) -> tuple[Tensor, Tensor]:
        """image [B, L, D], text [B, M, D], shifts [B, 6, D] of each -> image, text"""
        parts = zip(self.text.project_qkv(text, text_shifts), self.image.project_qkv(image, image_shifts), strict=True)
        q, k, v = (torch.cat(part, 1) for part in parts)
        y = joint_attention(q, k, v, condition)
        of_text, of_image = y.split((text.shape[1], image.shape[1]), 1)
        return self.image.output_and_mlp(image, of_image, image_shifts), self.text.output_and_mlp(
            text, of_text, text_shifts
        )


class SingleStreamBlock(nn.Module):
    """Both streams as one, attention and feed-forward side by side between one linear in and one out."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        dim = config.dim
        self.modulation = nn.Linear(dim, 3 * dim)
        self.qkv_mlp = nn.Linear(dim, 3 * dim + config.mlp_dim)
        self.out_proj = nn.Linear(dim + config.mlp_dim, dim)
        self.q_norm = RMSNorm(config.head_dim, NORM_EPS)
        self.k_norm = RMSNorm(config.head_dim, NORM_EPS)
        self.split_sizes = (3 * dim, config.mlp_dim)
        self.head_dim = config.head_dim

    def forward(self, x: Tensor, shifts: Tensor, condition: MMDiTCondition) -> Tensor:
        """x [B, J, D], shifts [B, 3, D] -> [B, J, D]"""
        shift, scale, gate = shifts.unbind(1)
        qkv, hidden = self.qkv_mlp(adaln_modulate(x, scale, shift, NORM_EPS)).split(self.split_sizes, -1)
        q, k, v = rearrange(qkv, "B J (three H K) -> three B J H K", three=3, K=self.head_dim)
        y = joint_attention(self.q_norm(q), self.k_norm(k), v, condition)
        return torch.addcmul(x, gate[:, None], self.out_proj(torch.cat((y, F.gelu(hidden, approximate="tanh")), -1)))


class MMDiTFinalLayer(nn.Module):
    """The adaptive norm and the projection to the velocity."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.modulation = nn.Linear(config.dim, 2 * config.dim)
        self.out_proj = nn.Linear(config.dim, config.out_channels)

    def forward(self, x: Tensor, shifts: Tensor) -> Tensor:
        """x [B, L, D], shifts [B, 2, D] -> [B, L, C]"""
        return self.out_proj(adaln_modulate(x, shifts[:, 1], shifts[:, 0], NORM_EPS))


class MMDiT(nn.Module):
    """Packed latents beside a text, through double blocks, then single ones, to the velocity."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = config
        self.image_in = nn.Linear(config.in_channels, config.dim)
        self.text_in = nn.Linear(config.text_dim, config.dim)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.n_double_blocks))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(config) for _ in range(config.n_single_blocks))
        self.final_layer = MMDiTFinalLayer(config)

    def condition(
        self, text: Tensor, rotations: Tensor, key_padding_mask: Tensor | None = None, *, norm: nn.Module | None = None
    ) -> MMDiTCondition:
        """text [B, M, C], rotations [J, K/2] complex of text and image -> the condition. Raises ValueError for other
        shapes.

        key_padding_mask [B, M]: 0 where a token is padding. norm: of the text, before it is projected.
        """
        if text.ndim != 3 or text.shape[2] != self.config.text_dim:
            raise ValueError(f"got a text of shape {list(text.shape)}: expected [B, M, {self.config.text_dim}]")
        if key_padding_mask is not None:
            if key_padding_mask.shape != text.shape[:2]:
                raise ValueError(
                    f"got key_padding_mask {list(key_padding_mask.shape)} for a text {list(text.shape)}: expected "
                    f"{list(text.shape[:2])}"
                )
            key_padding_mask = F.pad(key_padding_mask.bool(), (0, len(rotations) - text.shape[1]), value=True)[
                :, None, None
            ]
        return MMDiTCondition(self.text_in(norm(text) if norm is not None else text), rotations, key_padding_mask)

    def modulations(self, vectors: Tensor) -> list[Modulation]:
        """vectors [S, B, D], of every step and row -> what `forward` takes, one a step.

        These linears are more than a quarter of FLUX's weights and are applied to one row an image: for all steps at
        once, their weights are read once.
        """
        vectors = F.silu(vectors)

        def of(linear: nn.Linear) -> tuple[Tensor, ...]:
            return rearrange(linear(vectors), "S B (n D) -> S B n D", D=self.config.dim).unbind()

        doubles = cast("list[DoubleStreamBlock]", self.double_blocks)
        singles = cast("list[SingleStreamBlock]", self.single_blocks)
        streams = (of(x.modulation) for block in doubles for x in (block.image, block.text))
        both = [*zip(*streams, strict=True)] or [()] * len(vectors)
        single = [*zip(*(of(block.modulation) for block in singles), strict=True)] or [()] * len(vectors)
        last = of(self.final_layer.modulation)
        return [Modulation(x[::2], x[1::2], y, z) for x, y, z in zip(both, single, last, strict=True)]

    def forward(
        self,
        latents: Tensor,
        condition: MMDiTCondition,
        modulation: Modulation,
        *,
        step_cache: RowStepCache | None = None,
    ) -> Tensor:
        """latents [B, L, C], packed -> velocity [B, L, C]. Raises ValueError where rows or tokens disagree.

        step_cache: spares the blocks of some rows.
        """
        text = condition.tokens
        shape = list(latents.shape)
        tokens = len(condition.rotations) - text.shape[1]
        if len(shape) != 3 or shape[1:] != [tokens, self.config.in_channels]:
            raise ValueError(
                f"got latents {shape}: expected [B, {tokens}, {self.config.in_channels}], packed, as many tokens as "
                "the condition has positions for"
            )
        if not shape[0] == len(text) == len(modulation.final):
            raise ValueError(
                f"got {shape[0]} latents, a condition of {len(text)} rows, a modulation of {len(modulation.final)}: "
                "expected as many; condition.select_rows(index) repeats and picks rows"
            )
        x = self.image_in(latents)

        def run_blocks(rows: list[int]) -> Tensor:
            index = torch.tensor(rows, device=x.device)
            return self.run_blocks(x[index], condition.select_rows(index), modulation.select_rows(index))

        x = self.run_blocks(x, condition, modulation) if step_cache is None else step_cache.run(x, run_blocks)
        return self.final_layer(x, modulation.final)

    def run_blocks(self, image: Tensor, condition: MMDiTCondition, modulation: Modulation) -> Tensor:
        """image [B, L, D] through all blocks beside the condition's text -> [B, L, D]."""
        text = condition.tokens
        for block, of_image, of_text in zip(self.double_blocks, modulation.image, modulation.text, strict=True):
            image, text = block(image, text, of_image, of_text, condition)
        x = torch.cat((text, image), 1)
        n_text = text.shape[1]
        for block, shifts in zip(self.single_blocks, modulation.single, strict=True):
            x = block(x, shifts, condition)
        return x[:, n_text:]


def modulation_per_step(model: nn.Module, condition: MMDiTCondition, modulations: Sequence[Modulation]) -> Velocity:
    """A velocity for `flow.euler`: call i takes the modulation of step i, and the time is in it already."""
    steps = iter(modulations)
    return lambda x, timestep: model(x, condition, next(steps))
