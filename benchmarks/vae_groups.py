"""The VAE's share of a training step: images of several sizes encoded size by size, against all padded to the largest.

    python benchmarks/vae_groups.py                          # FLUX's VAE, random weights, and what padding does to latents
    python benchmarks/vae_groups.py --sizes 512x768 768x512 512x512 640x640

Times on a CPU are of the process. What padding changes is measured with bagel-nano's VAE, which is trained, on 48 x 48
pixels of its scenes alone and in a corner of 64 x 64 zeros, as the released loader pads.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from timing import Machine, show

from unimm.data.batching import uint8_to_image
from unimm.data.shapes import example
from unimm.models.bagel.model import Bagel
from unimm.tokenizers.kl import AutoencoderKL, AutoencoderKLConfig


def seconds(call: Callable[[], Any]) -> float:
    """Of the process on a CPU, of the clock on a GPU."""
    gpu = torch.cuda.is_available()
    clock = time.perf_counter if gpu else time.process_time
    start = clock()
    call()
    if gpu:
        torch.cuda.synchronize()
    return clock() - start


def padded(images: list[torch.Tensor]) -> torch.Tensor:
    """Images [1, 3, h, w] in the upper left corners of ones of the largest sides."""
    height, width = (max(image.shape[axis] for image in images) for axis in (2, 3))
    batch = images[0].new_zeros(len(images), 3, height, width)
    for i, image in enumerate(images):
        batch[i, :, : image.shape[2], : image.shape[3]] = image[0]
    return batch


@torch.no_grad()
def padding_error(n: int) -> list[float]:
    """The relative difference of latents that padding makes."""
    vae = Bagel.from_pretrained("bagel-nano").vae
    errors = []
    for i in range(n):
        image = uint8_to_image(example("draw.two", i, seed=0).target[None])[:, :, :48, :48].contiguous()
        alone = vae.encode(image)
        corner = vae.encode(torch.nn.functional.pad(image, (0, 16, 0, 16)))[..., : alone.shape[2], : alone.shape[3]]
        errors.append(float((corner - alone).norm() / alone.norm()))
    return errors


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["128x192", "192x128", "128x128", "160x160"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = [tuple(map(int, size.split("x"))) for size in options.sizes]
    torch.manual_seed(0)
    vae = AutoencoderKL(AutoencoderKLConfig()).eval().to(device)
    images = [torch.rand(1, 3, *size, device=device) * 2 - 1 for size in sizes]
    batch = padded(images)
    rounds = [
        (seconds(lambda: [vae.encode(image) for image in images]), seconds(lambda: vae.encode(batch)))
        for _ in range(options.rounds)
    ]
    pixels = sum(image.shape[2] * image.shape[3] for image in images)
    errors = padding_error(32)
    ratios = statistics.median(b / a for a, b in rounds), batch[:, 0].numel() / pixels
    rows = [
        {"": "size by size", "seconds": statistics.median(a for a, _ in rounds), "pixels": pixels},
        {"": "padded", "seconds": statistics.median(b for _, b in rounds), "pixels": batch[:, 0].numel()},
        {"": "padded / size by size", "seconds": ratios[0], "pixels": ratios[1]},
    ]
    show(rows, title=f"{len(images)} images, {', '.join(options.sizes)}; {Machine.here(torch.float32)}")
    print(f"latents of padded images differ by {statistics.mean(errors):.1%} (mean), {max(errors):.1%} (most)")


if __name__ == "__main__":
    main()
