"""Ops, one a file: the plain reference, the fast ways, and the function that chooses."""
from unimm.kernels.attention import attention, prepare
from unimm.kernels.codes import nearest_code
from unimm.kernels.cross_entropy import linear_cross_entropy
from unimm.kernels.dispatch import backend, use_kernels
from unimm.kernels.few_rows import linear_few_rows
from unimm.kernels.guidance import guided
from unimm.kernels.mask import Block, Mask
from unimm.kernels.modulate import modulate
from unimm.kernels.norm import rms_norm
from unimm.kernels.rotary import qk_norm_rope
from unimm.kernels.routed import routed_linear
from unimm.kernels.swiglu import swiglu

__all__ = [
    "Block",
    "Mask",
    "attention",
    "backend",
    "guided",
    "linear_cross_entropy",
    "linear_few_rows",
    "modulate",
    "nearest_code",
    "prepare",
    "qk_norm_rope",
    "rms_norm",
    "routed_linear",
    "swiglu",
    "use_kernels",
]
