"""Classifier-free guidance of one image from up to three branches, with renormalization of the result.

Axes: L tokens of an image, C channels of each.

Bytes read and written per number in float32 with all branches, counted from each operation's inputs and outputs, not
measured: 80 eager; here 16 where tokens are renormalized, 28 where the whole image is, of which 12 come from the cache
(an image of 4096 tokens of 64 is 1 MB).
"""

import torch
from torch import Tensor

from unimm.kernels.common import tensor_shapes
from unimm.kernels.dispatch import resolve_backend

RENORM_TYPES = ("global", "channel", "text_channel")


def cfg_combine(
    full: Tensor,
    no_text: Tensor,
    no_image: Tensor | None = None,
    *,
    text_scale: float,
    image_scale: float,
    renorm: str,
    renorm_min: float,
) -> Tensor:
    """The guided velocity of one image, [L, C], from its velocities under the full condition and without a part of it.

    u = no_text + text_scale (full - no_text), then u = no_image + image_scale (u - no_image) where `no_image` is given.
    Its length is multiplied by |full| / |u|, at least `renorm_min` and at most 1: "global" by the lengths of the whole
    image, "channel" by those of each token, "text_channel" likewise, but before the second step.
    docs/originals/bagel.md, "Guidance". The kernel has no backward. Raises ValueError for another renorm, or shapes
    that differ.
    """
    if renorm not in RENORM_TYPES:
        raise ValueError(f"unknown renorm {renorm!r}: expected one of {', '.join(RENORM_TYPES)}")
    velocities = [full, no_text] if no_image is None else [full, no_text, no_image]
    if full.ndim != 2 or any(v.shape != full.shape for v in velocities):
        raise ValueError(f"cfg_combine got velocities {tensor_shapes(*velocities)}: expected [L, C], all of one shape")
    run = _cfg_combine if resolve_backend("cfg_combine", full) == "triton" else cfg_combine_reference
    return run(full, no_text, no_image, text_scale, image_scale, renorm, renorm_min)


def cfg_combine_reference(
    full: Tensor,
    no_text: Tensor,
    no_image: Tensor | None,
    text_scale: float,
    image_scale: float,
    renorm: str,
    renorm_min: float,
) -> Tensor:
    """The definition, in plain operations."""
    u = no_text + text_scale * (full - no_text)
    if renorm == "text_channel":
        u = _renormalize(u, full, (-1,), renorm_min)
    if no_image is not None:
        u = no_image + image_scale * (u - no_image)
    if renorm == "text_channel":
        return u
    return _renormalize(u, full, (-2, -1) if renorm == "global" else (-1,), renorm_min)


def _renormalize(u: Tensor, full: Tensor, dims: tuple[int, ...], renorm_min: float) -> Tensor:
    lengths = [torch.linalg.vector_norm(v, dim=dims, keepdim=True) for v in (full, u)]
    return u * (lengths[0] / (lengths[1] + 1e-8)).clamp(renorm_min, 1.0)


@torch.library.custom_op("unimm::guided", mutates_args=())
def _cfg_combine(
    full: Tensor,
    no_text: Tensor,
    no_image: Tensor | None,
    text_scale: float,
    image_scale: float,
    renorm: str,
    renorm_min: float,
) -> Tensor:
    from unimm.kernels.cfg_combine_triton import launch_cfg_combine

    return launch_cfg_combine(full, no_text, no_image, text_scale, image_scale, renorm, renorm_min)


@_cfg_combine.register_fake
def _(
    full: Tensor,
    no_text: Tensor,
    no_image: Tensor | None,
    text_scale: float,
    image_scale: float,
    renorm: str,
    renorm_min: float,
) -> Tensor:
    return full.new_empty(full.shape)
