"""Ops, one a file: the plain reference, the fast ways, and the function that chooses."""

from unimm.kernels.adaln import adaln_modulate
from unimm.kernels.attention.attention import attention, plan_attention
from unimm.kernels.attention.mask import AttentionMask, KeyRange
from unimm.kernels.cfg_combine import cfg_combine
from unimm.kernels.cross_entropy import linear_cross_entropy
from unimm.kernels.dispatch import get_backend, use_kernels
from unimm.kernels.qk_norm_rope import qk_norm_rope
from unimm.kernels.rms_norm import rms_norm
from unimm.kernels.swiglu import swiglu
from unimm.kernels.vq_lookup import nearest_code

__all__ = [
    "AttentionMask",
    "KeyRange",
    "adaln_modulate",
    "attention",
    "cfg_combine",
    "get_backend",
    "linear_cross_entropy",
    "nearest_code",
    "plan_attention",
    "qk_norm_rope",
    "rms_norm",
    "swiglu",
    "use_kernels",
]
