"""The codebook entries nearest to vectors, without the [N, V] matrix of similarities.

Axes: N vectors, V codes (the vocabulary of image tokens), D features.

Bytes read and written for an image of 576 vectors, 16 384 codes of 8, float32, counted, not measured: the matrix
written and read is 75 MB; here each tile of 64 vectors reads the codebook (0.5 MB, from the cache), 5 MB in all.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unimm.kernels.common import tensor_shapes
from unimm.kernels.dispatch import resolve_backend

MAX_SIMILARITIES = 2**22  # held at once by the reference: 16 MiB


def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """The code of the largest cosine with each vector, the lowest of ties: z [N, D], codebook [V, D] -> [N] int64.

    In float32, whatever the dtypes. Raises ValueError where the shapes disagree or there are no codes.
    """
    if z.ndim != 2 or codebook.ndim != 2 or z.shape[1] != codebook.shape[1] or not len(codebook):
        raise ValueError(
            f"nearest_code got z, codebook {tensor_shapes(z, codebook)}: expected [N, D] and [V, D], V at least 1"
        )
    # among unit vectors the nearest is the one of the largest product; the index has no gradient
    z, codebook = (F.normalize(t.detach().float(), dim=1) for t in (z, codebook))
    if resolve_backend("nearest_code", z) == "triton":
        return _nearest_code(z, codebook)
    return nearest_code_reference(z, codebook)


def nearest_code_reference(z: Tensor, codebook: Tensor) -> Tensor:
    """The definition for unit vectors, in chunks of rows of z."""
    parts = z.split(max(1, MAX_SIMILARITIES // len(codebook)))
    return torch.cat([(part @ codebook.t()).argmax(1) for part in parts])


@torch.library.custom_op("unimm::nearest_code", mutates_args=())
def _nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    from unimm.kernels import vq_lookup_triton

    return vq_lookup_triton.launch_nearest_code(z, codebook)


@_nearest_code.register_fake
def _(z: Tensor, codebook: Tensor) -> Tensor:
    return z.new_empty(z.shape[0], dtype=torch.int64)
