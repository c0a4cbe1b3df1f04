"""The floating-point operations of vision encoders and text encoders, counted as in unimm.nn.flops.

Axes: P images, n patches of an image, N patches of all, L ids of a text.
"""

from collections.abc import Sequence

from torch import nn

from unimm.encoders.clip_text import CLIPTextEncoder
from unimm.encoders.siglip import SiglipNaViT, SiglipVisionEncoder
from unimm.encoders.timm_vit import TimmVisionEncoder
from unimm.nn.flops import StepFlops, attended_pairs, encoder_block_flops, is_trained
from unimm.nn.layers import EncoderBlock


def _blocks_flops(count: StepFlops, blocks: nn.ModuleList, rows: int, pairs: int, carries: bool) -> bool:
    for block in blocks:
        assert isinstance(block, EncoderBlock), "an encoder is made of its blocks"
        carries = encoder_block_flops(count, block, rows, pairs, carries)
    return carries


def navit_flops(count: StepFlops, vision: SiglipNaViT, lengths: Sequence[int]) -> bool:
    """Packed images of so many patches each."""
    carries = count.chain(sum(lengths), False, vision.patch_embed, vision.pos_embed)
    carries = _blocks_flops(count, vision.blocks, sum(lengths), attended_pairs(lengths), carries)
    return carries or is_trained(vision.norm)


def siglip_flops(count: StepFlops, vision: SiglipVisionEncoder, n_images: int) -> bool:
    """Features of P images, before or after the final norm; the pooling head is not run."""
    n = vision.config.grid_side**2
    carries = count.chain(n_images * n, False, vision.patch_embed) or vision.pos_embed.requires_grad
    carries = _blocks_flops(count, vision.blocks, n_images * n, attended_pairs([n] * n_images), carries)
    return carries or is_trained(vision.norm)


def clip_text_flops(count: StepFlops, clip: CLIPTextEncoder, n_texts: int, length: int) -> bool:
    """Texts of L ids, padding and all, with causal attention."""
    carries = clip.embed.weight.requires_grad or clip.pos_embed.requires_grad
    pairs = n_texts * length * (length + 1) // 2
    return _blocks_flops(count, clip.blocks, n_texts * length, pairs, carries) or is_trained(clip.norm)


def timm_vit_flops(count: StepFlops, vision: TimmVisionEncoder, n_images: int) -> bool:
    """Features of P images. Of an encoder of timm's that is no SigLIP ViT, the matrices of linears alone, as if each
    met every feature: an estimate."""
    trunk = vision.trunk
    n = vision.grid_side**2
    if vision.vit is None:
        return count.chain(n_images * n, False, trunk)
    carries = count.chain(n_images * n, False, trunk.patch_embed) or trunk.pos_embed.requires_grad
    for block in trunk.blocks:
        qkv = count.chain(n_images * n, carries, block.norm1, block.attn.qkv)
        n_heads = vision.vit.n_heads
        y = count.attention(n_images * n * n, n_heads, vision.vit.dim // n_heads, q=qkv, k=qkv, v=qkv)
        carries = count.chain(n_images * n, y, block.attn.proj) or carries
        carries = count.chain(n_images * n, carries, block.norm2, block.mlp) or carries
    return carries or is_trained(trunk.norm)
