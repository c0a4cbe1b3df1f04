"""Classifier-free guidance under two more contexts, and the shrinking of its result, for one picture.

Axes: L tokens of a picture, C features of each.

Bytes read and written a number in float32 under both contexts, counted from each operation's inputs and outputs, not
measured: 80 eager; here 16 where tokens are shrunk, 28 where the whole picture is, of which 12 come from the cache (a
picture of 4096 tokens of 64 is 1 MB).
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
    """The guided velocity of one picture, all [L, C]: u = text + s (v - text), then u = image + s' (u - image).

    It is shrunk by |v| / |u|, no less than `least` and at most 1: "global" by the lengths of the whole picture,
    "channel" by those of each token, "text_channel" likewise, but before the image's part. docs/originals/bagel.md,
    "Guidance". The kernel has no backward. Raises ValueError for another renorm, or shapes that differ.
    """
    if renorm not in RENORM_TYPES:
        raise ValueError(f"unknown renorm {renorm!r}: expected one of {', '.join(RENORM_TYPES)}")
    velocities = [full, no_text] if no_image is None else [full, no_text, no_image]
    if full.ndim != 2 or any(t.shape != full.shape for t in velocities):
        raise ValueError(f"cfg_combine got velocities {tensor_shapes(*velocities)}: expected [L, C], all of one shape")
    if resolve_backend("cfg_combine", full) == "triton":
        return _cfg_combine(full, no_text, no_image, text_scale, image_scale, renorm, renorm_min)
    return cfg_combine_reference(full, no_text, no_image, text_scale, image_scale, renorm, renorm_min)


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


def _renormalize(u: Tensor, v: Tensor, dims: tuple[int, ...], renorm_min: float) -> Tensor:
    lengths = [torch.linalg.vector_norm(t, dim=dims, keepdim=True) for t in (v, u)]
    return u * (lengths[0] / (lengths[1] + 1e-8)).clamp(renorm_min, 1.0)


@torch.library.custom_op("unimm::guided", mutates_args=())
def _cfg_combine(
    v: Tensor, text: Tensor, image: Tensor | None, text_scale: float, image_scale: float, renorm: str, least: float
) -> Tensor:
    from unimm.kernels import cfg_combine_triton

    return cfg_combine_triton.launch_cfg_combine(v, text, image, text_scale, image_scale, renorm, least)


@_cfg_combine.register_fake
def _(
    v: Tensor, text: Tensor, image: Tensor | None, text_scale: float, image_scale: float, renorm: str, least: float
) -> Tensor:
    return v.new_empty(v.shape)
