"""The floating-point operations of Qwen2.5-VL's vision encoder, counted as in unimm.nn.flops."""

from collections.abc import Sequence
from typing import cast

from unimm.nn.flops import StepFlops, attended_pairs, is_trained, swiglu_flops
from unimm.processing.images.qwen2_vl import PatchGrid
from unimm.vlms.qwen2_5_vl.vision import QwenVisionBlock, QwenVisionEncoder, cell_positions, window_order


def qwen_vision_flops(count: StepFlops, vision: QwenVisionEncoder, grids: Sequence[PatchGrid]) -> bool:
    """Images of these grids of patches. Returns whether their rows of the language model have gradients."""
    config = vision.config
    s = config.spatial_merge_size**2
    rows = sum(t * h * w for t, h, w in grids)
    positions = [cell_positions(grid, config.spatial_merge_size) for grid in grids]
    _, windows = window_order(positions, config.window_cells)
    pairs_in_windows = attended_pairs(n * s for n in windows)
    pairs_in_frames = attended_pairs(h * w for t, h, w in grids for _ in range(t))
    carries = count.chain(rows, False, vision.patch_embed)
    n_heads = config.n_heads
    for layer, block in enumerate(cast("Sequence[QwenVisionBlock]", vision.blocks)):
        pairs = pairs_in_frames if layer in config.full_attention_layers else pairs_in_windows
        qkv = count.chain(rows, carries or is_trained(block.attn_norm), block.qkv)
        y = count.attention(pairs, n_heads, config.dim // n_heads, q=qkv, k=qkv, v=qkv)
        carries = count.chain(rows, y, block.out_proj) or carries
        carries = swiglu_flops(count, block.mlp, rows, carries or is_trained(block.mlp_norm)) or carries
    return count.chain(rows // s, carries or is_trained(vision.merger.norm), vision.merger.mlp)
