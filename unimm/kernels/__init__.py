"""Ops, one a file: the plain reference, the fast ways, and the function that chooses."""
from unimm.kernels.attention import Block, Mask, attention
from unimm.kernels.dispatch import backend, use_kernels

__all__ = ["Block", "Mask", "attention", "backend", "use_kernels"]
