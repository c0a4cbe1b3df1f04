"""Ops, one a file: the plain reference, the fast ways, and the function that chooses."""

from unimm.kernels.adaln import modulate
from unimm.kernels.attention.attention import attention, prepare
from unimm.kernels.attention.mask import Block, Mask
from unimm.kernels.cfg_combine import guided
from unimm.kernels.cross_entropy import linear_cross_entropy
from unimm.kernels.dispatch import backend, use_kernels
from unimm.kernels.qk_norm_rope import qk_norm_rope
from unimm.kernels.rms_norm import rms_norm
from unimm.kernels.routed import routed_linear
from unimm.kernels.swiglu import swiglu
from unimm.kernels.vq_lookup import nearest_code

__all__ = [
    "Block",
    "Mask",
    "attention",
    "backend",
    "guided",
    "linear_cross_entropy",
    "modulate",
    "nearest_code",
    "prepare",
    "qk_norm_rope",
    "rms_norm",
    "routed_linear",
    "swiglu",
    "use_kernels",
]
