"""Classifier-free guidance under two more contexts, and the shrinking of its result, for one picture.

Axes: L tokens of a picture, C features of each.

Bytes read and written a number in float32 under both contexts, counted from each operation's inputs and outputs, not
measured: 80 eager; here 16 where tokens are shrunk, 28 where the whole picture is, of which 12 come from the cache (a
picture of 4096 tokens of 64 is 1 MB).
"""

import torch
from torch import Tensor

from unimm.kernels.common import shapes
from unimm.kernels.dispatch import resolve

RENORMS = ("global", "channel", "text_channel")


def guided(
    v: Tensor,
    text: Tensor,
    image: Tensor | None = None,
    *,
    text_scale: float,
    image_scale: float,
    renorm: str,
    least: float,
) -> Tensor:
    """The guided velocity of one picture, all [L, C]: u = text + s (v - text), then u = image + s' (u - image).

    It is shrunk by |v| / |u|, no less than `least` and at most 1: "global" by the lengths of the whole picture,
    "channel" by those of each token, "text_channel" likewise, but before the image's part. docs/originals/bagel.md,
    "Guidance". The kernel has no backward. Raises ValueError for another renorm, or shapes that differ.
    """
    if renorm not in RENORMS:
        raise ValueError(f"unknown renorm {renorm!r}: expected one of {', '.join(RENORMS)}")
    held = [v, text] if image is None else [v, text, image]
    if v.ndim != 2 or any(t.shape != v.shape for t in held):
        raise ValueError(f"guided got velocities {shapes(*held)}: expected [L, C], all of one shape")
    if resolve("guided", v) == "triton":
        return _guided(v, text, image, text_scale, image_scale, renorm, least)
    return guided_reference(v, text, image, text_scale, image_scale, renorm, least)


def guided_reference(
    v: Tensor, text: Tensor, image: Tensor | None, text_scale: float, image_scale: float, renorm: str, least: float
) -> Tensor:
    """The definition, in plain operations."""
    u = text + text_scale * (v - text)
    if renorm == "text_channel":
        u = _shrink(u, v, (-1,), least)
    if image is not None:
        u = image + image_scale * (u - image)
    if renorm == "text_channel":
        return u
    return _shrink(u, v, (-2, -1) if renorm == "global" else (-1,), least)


def _shrink(u: Tensor, v: Tensor, dims: tuple[int, ...], least: float) -> Tensor:
    lengths = [torch.linalg.vector_norm(t, dim=dims, keepdim=True) for t in (v, u)]
    return u * (lengths[0] / (lengths[1] + 1e-8)).clamp(least, 1.0)


@torch.library.custom_op("unimm::guided", mutates_args=())
def _guided(
    v: Tensor, text: Tensor, image: Tensor | None, text_scale: float, image_scale: float, renorm: str, least: float
) -> Tensor:
    from unimm.kernels import cfg_combine_triton

    return cfg_combine_triton.guided(v, text, image, text_scale, image_scale, renorm, least)


@_guided.register_fake
def _(
    v: Tensor, text: Tensor, image: Tensor | None, text_scale: float, image_scale: float, renorm: str, least: float
) -> Tensor:
    return v.new_empty(v.shape)
