"""What a Janus case stores of its VQ autoencoder, computed by unimm.tokenizers.vq. docs/originals/janus.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from einops import rearrange
from torch import Tensor

from unimm.processing.images.io import tensor_to_pil
from unimm.tokenizers.vq import VQModel

INPUTS = ("vq/image", "vq/rand_ids")


def vq_checks(model_vq: VQModel, io: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, str]]:
    """For each stored output its name, ours, and a note: what `Case.compare` takes. INPUTS are the names of the
    rest."""
    z = model_vq.encode(io["vq/image"])
    grid = (z.shape[2], z.shape[3])
    quantized = model_vq.quantize(z)
    yield "vq/z", z, ""
    yield "vq/ids", quantized.ids, ""
    yield "vq/quant", quantized.codes, ""
    yield "vq/recon", model_vq.decode(quantized.ids, grid=grid), ""
    # what a port that forgets the lengths gives: equal to the stored mistake, so the stored ids can tell the two apart
    wrong = raw_ids(z, model_vq.quantize.embedding.weight)
    yield "vq/ids_no_l2norm", wrong, f"{float((wrong == quantized.ids).float().mean()):.0%} of ids equal the right ones"
    drawn = model_vq.decode(io["vq/rand_ids"], grid=grid)
    yield "vq/rand_pixels", drawn, ""
    yield "vq/rand_uint8", torch.stack([pixels(image) for image in drawn]), ""


def raw_ids(z: Tensor, codebook: Tensor) -> Tensor:
    """The nearest code [B, n] by plain distance: z [B, E, h, w], codebook [V, E]."""
    return torch.cdist(rearrange(z, "B E h w -> B (h w) E"), codebook[None]).argmin(-1)


def pixels(image: Tensor) -> Tensor:
    """image [3, h, w] in [-1, 1] -> uint8 [h, w, 3], as it is saved."""
    picture = tensor_to_pil(image)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(picture.height, picture.width, 3)
