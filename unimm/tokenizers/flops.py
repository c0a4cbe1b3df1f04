"""The floating-point operations of image tokenizers: to latents or image tokens, and back to pixels.

Counts as in unimm.nn.flops. Axes: P images, h w grid.
"""

from collections.abc import Iterable
from itertools import chain
from typing import cast

from torch import nn

from unimm.nn.flops import StepFlops
from unimm.tokenizers.dc_ae import DCAE, DCAEDownsample, DCAEUpsample, EfficientViTBlock, MultiscaleLinearAttention
from unimm.tokenizers.emu3_vq import Emu3VQModel
from unimm.tokenizers.emu3_vq_layers import StyledSpatialAttention
from unimm.tokenizers.kl import AutoencoderKL, Downsample, SpatialAttention, Upsample
from unimm.tokenizers.vq import VQLevel, VQModel

# layers behind which the grid has half the sides, and twice
HALVING = (Downsample, DCAEDownsample)
DOUBLING = (Upsample, DCAEUpsample)
ATTENDING = (SpatialAttention, StyledSpatialAttention)


def _layers(modules: Iterable[nn.Module]) -> Iterable[nn.Module]:
    """The modules that change the grid or attend, and those between them whole."""
    special = (*HALVING, *DOUBLING, *ATTENDING, EfficientViTBlock)
    for module in modules:
        inside = any(isinstance(part, special) for part in module.modules())
        yield from _layers(module.children()) if inside and not isinstance(module, special) else [module]


def _image_layers_flops(
    count: StepFlops, modules: Iterable[nn.Module], n_images: int, grid: tuple[int, int], carries: bool
) -> bool:
    """Layers over images, from a grid (h, w) on, in the order of their definition."""
    h, w = grid
    for layer in _layers(modules):
        if isinstance(layer, HALVING):
            h //= 2
            w //= 2
        elif isinstance(layer, DOUBLING):
            h *= 2
            w *= 2
        n = n_images * h * w
        if isinstance(layer, ATTENDING):
            q, k, v = count.side_by_side(n, count.chain(n, carries, layer.norm), layer.q, layer.k, layer.v)
            y = count.attention(n * h * w, 1, layer.q.out_channels, q=q, k=k, v=v)
            carries = count.chain(n, y, layer.proj_out) or carries
        elif isinstance(layer, EfficientViTBlock):
            carries = _multiscale_attention_flops(count, layer.attn, n, carries) or carries
            carries = count.chain(n, carries, layer.conv_out, layer.conv_norm) or carries
        else:
            carries = count.chain(n, carries, layer)
    return carries


def _multiscale_attention_flops(count: StepFlops, layer: MultiscaleLinearAttention, n: int, carries: bool) -> bool:
    qkv = count.chain(n, carries, layer.to_qkv)
    scales = count.side_by_side(n, qkv, *layer.to_qkv_multiscale)
    n_heads = layer.to_out.in_features // layer.head_dim
    return count.chain(
        n, count.linear_attention(n, n_heads, layer.head_dim, any((qkv, *scales))), layer.to_out, layer.norm_out
    )


def kl_encode_flops(
    count: StepFlops, vae: AutoencoderKL, n_images: int, size: tuple[int, int], *, carries: bool = False
) -> bool:
    """The latents of P images of a (height, width) in pixels."""
    encoder = vae.encoder
    modules = (encoder.conv_in, *encoder.down, encoder.mid, encoder.norm_out, encoder.conv_out, vae.quant_conv)
    return _image_layers_flops(count, modules, n_images, size, carries)


def kl_decode_flops(
    count: StepFlops, vae: AutoencoderKL, n_images: int, size: tuple[int, int], *, carries: bool = False
) -> bool:
    """P images of a (height, width) in pixels, from their latents."""
    decoder = vae.decoder
    modules = (vae.post_quant_conv, decoder.conv_in, decoder.mid, *reversed(decoder.up), decoder.norm_out)
    return _image_layers_flops(
        count, (*modules, decoder.conv_out), n_images, _grid_of(size, vae.config.stride), carries
    )


def vq_encode_flops(
    count: StepFlops, vq: VQModel, n_images: int, size: tuple[int, int], *, carries: bool = False
) -> bool:
    """The image tokens of P images of a (height, width) in pixels; the nearest codes are found without gradients."""
    encoder = vq.encoder
    modules = (encoder.conv_in, *_interleaved(encoder.conv_blocks), encoder.mid, encoder.norm_out, encoder.conv_out)
    carries = _image_layers_flops(count, (*modules, vq.quant_conv), n_images, size, carries)
    h, w = _grid_of(size, vq.config.stride)
    lookup = StepFlops()
    lookup.matrix(vq.quantize.embedding.weight, n_images * h * w, False)
    count.add_forward(lookup)
    return carries


def vq_decode_flops(
    count: StepFlops, vq: VQModel, n_images: int, size: tuple[int, int], *, carries: bool = False
) -> bool:
    """P images of a (height, width) in pixels, from their codes."""
    decoder = vq.decoder
    modules = (vq.post_quant_conv, decoder.conv_in, decoder.mid, *_interleaved(decoder.conv_blocks), decoder.norm_out)
    return _image_layers_flops(count, (*modules, decoder.conv_out), n_images, _grid_of(size, vq.config.stride), carries)


def emu3_vq_encode_flops(
    count: StepFlops, vq: Emu3VQModel, n_images: int, size: tuple[int, int], *, quantized: bool = True
) -> bool:
    """What is quantized of P images of a (height, width) in pixels; `quantized`: their codes, too."""
    encoder = vq.encoder
    modules = (encoder.conv_in, *encoder.down, encoder.mid, encoder.norm_out, encoder.conv_out)
    carries = _image_layers_flops(count, modules, n_images, size, False)
    h, w = _grid_of(size, vq.config.stride)
    n = n_images * h * w
    frames = vq.config.frames_per_latent
    for conv in encoder.time_conv:
        frames //= 2
        carries = count.chain(n * frames, carries, conv)
    carries = count.chain(n, carries, encoder.time_res_stack, vq.quant_conv)
    if quantized:
        lookup = StepFlops()
        lookup.matrix(vq.quantize.embedding.weight, n, False)
        count.add_forward(lookup)
    return carries


def emu3_vq_decode_flops(
    count: StepFlops, vq: Emu3VQModel, n_images: int, size: tuple[int, int], *, carries: bool = False
) -> bool:
    """P images of a (height, width) in pixels, from their codes: the first of the frames that a code stands for."""
    decoder = vq.decoder
    h, w = _grid_of(size, vq.config.stride)
    n = n_images * h * w
    latents = count.chain(n, carries, vq.post_quant_conv)
    # latents and codes side by side
    style = count.chain(2 * n, latents, decoder.time_res_stack, decoder.time_conv)
    x = count.chain(n, style, decoder.conv_in)
    modules = (decoder.mid, *reversed(decoder.up), decoder.norm_out, decoder.conv_out)
    return _image_layers_flops(count, modules, n_images, (h, w), x)


def dc_ae_encode_flops(
    count: StepFlops, vae: DCAE, n_images: int, size: tuple[int, int], *, carries: bool = False
) -> bool:
    """The latents of P images of a (height, width) in pixels."""
    encoder = vae.encoder
    return _image_layers_flops(
        count, (encoder.conv_in, *encoder.down_blocks, encoder.conv_out), n_images, size, carries
    )


def dc_ae_decode_flops(
    count: StepFlops, vae: DCAE, n_images: int, size: tuple[int, int], *, carries: bool = False
) -> bool:
    """P images of a (height, width) in pixels, from their latents."""
    decoder = vae.decoder
    modules = (decoder.conv_in, *reversed(decoder.up_blocks), decoder.norm_out, decoder.conv_out)
    return _image_layers_flops(count, modules, n_images, _grid_of(size, vae.config.stride), carries)


def _interleaved(levels: nn.ModuleList) -> Iterable[nn.Module]:
    """The layers of a VQ autoencoder's levels as they run: an attention behind each block, then the change of size."""
    for level in cast("Iterable[VQLevel]", levels):
        blocks = (level.res, level.attn) if len(level.attn) else (level.res,)
        yield from chain.from_iterable(zip(*blocks, strict=True))
        yield from (module for name, module in level.named_children() if name in ("downsample", "upsample"))


def _grid_of(size: tuple[int, int], stride: int) -> tuple[int, int]:
    return size[0] // stride, size[1] // stride
