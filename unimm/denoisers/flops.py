"""The floating-point operations of denoisers: Sana, and FLUX's and Qwen-Image's MMDiT, counted as in unimm.nn.flops.

Axes: B images, L tokens of an image, M tokens of its condition, J = L + M.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from unimm.denoisers.flux import FluxTransformer
from unimm.denoisers.mmdit import DoubleStreamBlock, MMDiT, MMDiTStream, SingleStreamBlock
from unimm.denoisers.sana import SanaBlock, SanaTransformer
from unimm.nn.flops import StepFlops, is_trained


@dataclass(frozen=True, kw_only=True)
class MMDiTRows:
    """Sizes of a step: B images of L tokens each beside conditions of M tokens, which differ between images."""

    n_image_tokens: int
    condition_lengths: Sequence[int]

    @property
    def n_images(self) -> int:
        """B."""
        return len(self.condition_lengths)

    @property
    def image(self) -> int:
        """Rows of all images."""
        return self.n_images * self.n_image_tokens

    @property
    def text(self) -> int:
        """Rows of all conditions."""
        return sum(self.condition_lengths)

    @property
    def pairs(self) -> int:
        """Pairs of a row and a key of the same image: all rows attend to each other."""
        return sum((self.n_image_tokens + m) ** 2 for m in self.condition_lengths)


def flux_flops(count: StepFlops, flux: FluxTransformer, rows: MMDiTRows, *, text: bool, pooled: bool = False) -> None:
    """A step of FLUX. text, pooled: whether the conditions, and CLIP's embeddings, have gradients."""
    n = rows.n_images
    embeds = [count.chain(n, False, flux.time_embed), count.chain(n, pooled, flux.pooled_embed)]
    if flux.guidance_embed is not None:
        embeds.append(count.chain(n, False, flux.guidance_embed))
    _mmdit_flops(count, flux.mmdit, rows, text=text, vectors=any(embeds))


def _mmdit_flops(count: StepFlops, mmdit: MMDiT, rows: MMDiTRows, *, text: bool, vectors: bool) -> None:
    """text: whether the conditions have gradients; vectors: whether what is modulated by has."""
    image = count.chain(rows.image, False, mmdit.image_in)
    text = count.chain(rows.text, text, mmdit.text_in)
    doubles = cast("Sequence[DoubleStreamBlock]", mmdit.double_blocks)
    singles = cast("Sequence[SingleStreamBlock]", mmdit.single_blocks)
    for block in doubles:
        # what the text's stream does behind the last attention of all reaches no loss
        used = block is not doubles[-1] or len(singles) > 0
        image, text = _double_block_flops(count, block, rows, (image, text), vectors=vectors, used=used)
    x = image or text
    n = rows.image + rows.text
    for single in singles:
        shifts = count.chain(rows.n_images, vectors, single.modulation)
        qkv_mlp = count.chain(n, x or shifts, single.qkv_mlp)
        qk = qkv_mlp or is_trained(single.q_norm, single.k_norm)
        y = count.attention(rows.pairs, mmdit.config.n_heads, single.head_dim, q=qk, k=qk, v=qkv_mlp)
        x = count.chain(n, y or qkv_mlp, single.out_proj) or x or shifts
    shifts = count.chain(rows.n_images, vectors, mmdit.final_layer.modulation)
    count.chain(rows.image, x or shifts, mmdit.final_layer.out_proj)


def _double_block_flops(
    count: StepFlops,
    block: DoubleStreamBlock,
    rows: MMDiTRows,
    carries: tuple[bool, bool],
    *,
    vectors: bool,
    used: bool,
) -> tuple[bool, bool]:
    """carries: of the image's stream and of the text's; used: whether what the text's stream becomes reaches a loss."""
    streams = ((block.image, rows.image, carries[0]), (block.text, rows.text, carries[1]))
    # a modulation of the text's last stream still shifts its keys and values
    shifts = [count.chain(rows.n_images, vectors, stream.modulation) for stream, _, _ in streams]
    qkv = [count.chain(n, x or s, stream.qkv) for (stream, n, x), s in zip(streams, shifts, strict=True)]
    qk = any(qkv) or is_trained(*(norm for stream, _, _ in streams for norm in (stream.q_norm, stream.k_norm)))
    n_heads = block.image.out_proj.in_features // block.image.head_dim
    y = count.attention(rows.pairs, n_heads, block.image.head_dim, q=qk, k=qk, v=any(qkv))
    unused = StepFlops()
    parts = (count, count if used else unused)
    out = [
        _stream_output_flops(part, stream, n, y=y, x=x or s)
        for part, (stream, n, x), s in zip(parts, streams, shifts, strict=True)
    ]
    count.add_forward(unused)
    return out[0], out[1]


def _stream_output_flops(count: StepFlops, stream: MMDiTStream, n: int, *, y: bool, x: bool) -> bool:
    x = count.chain(n, y, stream.out_proj) or x
    return count.chain(n, x, stream.mlp) or x


def sana_flops(count: StepFlops, sana: SanaTransformer, sizes: tuple[int, int, int, int], *, caption: bool) -> None:
    """A step of Sana. sizes: captions (each may have several noised copies), their tokens M, images B, tokens of an
    image L; caption: whether the captions have gradients."""
    n_captions, m, n_images, n_tokens = sizes
    rows = n_images * n_tokens
    caption = count.chain(n_captions * m, caption, sana.caption_proj, sana.caption_norm)
    x = count.chain(rows, False, sana.patch_embed)
    time = count.chain(n_images, False, sana.time_embed)
    shifts = count.chain(n_images, time, sana.modulation)
    for block in cast("Sequence[SanaBlock]", sana.blocks):
        cross = block.cross_attention
        kv = count.chain(n_captions * m, caption, cross.kv)
        shifted = x or shifts or block.scale_shift_table.requires_grad
        qkv = count.chain(rows, shifted, block.attention.qkv)
        y = count.linear_attention(rows, sana.config.n_heads, sana.config.head_dim, qkv)
        x = count.chain(rows, y, block.attention.out_proj) or shifted
        q = count.chain(rows, x, cross.q)
        y = count.attention(rows * m, sana.config.n_cross_heads, cross.head_dim, q=q, k=kv, v=kv)
        x = count.chain(rows, y, cross.out_proj) or x
        x = count.chain(rows, x, block.mlp) or x
    count.chain(rows, x or time or sana.scale_shift_table.requires_grad, sana.out_proj)
