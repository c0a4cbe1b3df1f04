"""A cache on disk of one's own images as a frozen image tokenizer or autoencoder encodes them, by their pixels.

Each image is encoded when it is first met, alone, so that what is cached does not depend on the batch that it came in; every
later step, epoch and run reads it. The cache stands around the encoder's own method, so that any task trains with it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from unimm.checkpoint.atomic import atomic_file
from unimm.checkpoint.save import own_name, save_safetensors
from unimm.distributed.ranks import Ranks
from unimm.distributed.sharding import whole_tensor
from unimm.tokenizers.dc_ae import DCAE
from unimm.tokenizers.emu3_vq import Emu3VQModel
from unimm.tokenizers.kl import AutoencoderKL
from unimm.tokenizers.magvit_v2 import MagvitV2
from unimm.tokenizers.vq import VQModel
from unimm.training.cache import check_manifest
from unimm.training.config import TrainConfig
from unimm.training.tasks.base import TrainingTask

logger = logging.getLogger(__name__)

# the method of each that encodes images [B, 3, H, W], all of which are [B, ...] of what it returns
ENCODERS: dict[type[nn.Module], str] = {
    AutoencoderKL: "moments",
    DCAE: "encode",
    Emu3VQModel: "encode_ids",
    MagvitV2: "encode_ids",
    VQModel: "encode_ids",
}
# images of a file
FILE_SIZE = 256

Encoded = Tensor | tuple[Tensor, ...]


class ImageCache:
    """What an encoder returned of images, in memory or in the safetensors files of a folder."""

    def __init__(self, folder: Path, encode: Callable[[Tensor], Encoded], *, rank: int = 0) -> None:
        self.folder = folder
        self.encode = encode
        self.rank = rank
        self.n_encoded = 0
        # what lies in no file yet, by the images' digests
        self.new: dict[str, tuple[Tensor, ...]] = {}
        # the file of each image, by its digest, and how many tensors there are of it
        self.places: dict[str, Path] = {}
        self.n_tensors = 0
        for path in sorted(folder.glob("*.safetensors")):
            self._add_file(path)

    def _add_file(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            names = [name.partition(".") for name in file.keys()]
        self.places |= dict.fromkeys((digest for digest, _, _ in names), path)
        self.n_tensors = max((int(i) + 1 for _, _, i in names), default=self.n_tensors)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Encoded:
        """What the encoder returns of images [B, 3, H, W], in place of its method."""
        found = [self._of_one(image) for image in images]
        stacked = tuple(torch.stack(parts).to(images.device) for parts in zip(*found, strict=True))
        return stacked if len(stacked) > 1 else stacked[0]

    def _of_one(self, image: Tensor) -> tuple[Tensor, ...]:
        digest = image_digest(image)
        if digest in self.new:
            return self.new[digest]
        if digest in self.places:
            with safe_open(self.places[digest], framework="pt") as file:
                return tuple(file.get_tensor(f"{digest}.{i}") for i in range(self.n_tensors))
        encoded = self.encode(image[None])
        parts = tuple(x[0].cpu() for x in (encoded if isinstance(encoded, tuple) else (encoded,)))
        self.new[digest] = parts
        self.n_encoded += 1
        if len(self.new) >= FILE_SIZE:
            self.flush()
        return parts

    def flush(self) -> None:
        """Write what lies in no file yet. An OSError names the file."""
        if not self.new:
            return
        # of the rank alone, and under a name of its contents: no run replaces another's
        name = hashlib.blake2b("".join(sorted(self.new)).encode(), digest_size=8).hexdigest()
        path = self.folder / f"{self.rank:04}-{name}.safetensors"
        tensors = {f"{digest}.{i}": x.clone() for digest, parts in self.new.items() for i, x in enumerate(parts)}
        with atomic_file(path) as partial:
            save_safetensors(tensors, partial)
        self._add_file(path)
        self.new = {}


def image_digest(image: Tensor) -> str:
    """A name for an image's pixels [3, H, W], of 128 bits."""
    pixels = image.detach().float().cpu().contiguous()
    digest = hashlib.blake2b(f"{tuple(pixels.shape)}".encode(), digest_size=16)
    digest.update(pixels.numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def use_image_cache(task: TrainingTask, recipe: TrainConfig, out: Path, *, ranks: Ranks) -> Iterator[list[ImageCache]]:
    """Let a task's frozen encoders read what they return of images from a cache, in the body.

    Raises ValueError for a task whose encoders are all trained, or that has none, and for a folder that was filled by other
    weights.
    """
    assert recipe.cache is not None, "the recipe asks for a cache"
    folder = Path(recipe.cache.folder) if recipe.cache.folder else out / "cache"
    modules = [module for module in task.model.modules() if type(module) in ENCODERS]
    frozen = [module for module in modules if not any(p.requires_grad for p in module.parameters())]
    if not frozen:
        raise ValueError(
            f"got a cache for the task {recipe.task!r}, which has no image tokenizer or autoencoder that is frozen: leave "
            "`cache` out"
        )
    caches = []
    for module in frozen:
        place = folder / type(module).__name__
        key = {"weights": weights_digest(module), "precision": recipe.precision}
        ranks.run_first(lambda place=place, key=key: check_manifest(place, key))  # type: ignore[misc]
        cache = ImageCache(place, getattr(module, ENCODERS[type(module)]), rank=ranks.rank)
        setattr(module, ENCODERS[type(module)], cache)
        caches.append(cache)
    logger.info("a cache of %d encoded images in %s", sum(len(one.places) for one in caches), folder)
    try:
        yield caches
    finally:
        for module, cache in zip(frozen, caches, strict=True):
            delattr(module, ENCODERS[type(module)])
            cache.flush()


def weights_digest(module: nn.Module) -> str:
    """A name for the weights of a module."""
    digest = hashlib.sha256()
    for name, p in module.named_parameters():
        digest.update(own_name(name).encode())
        digest.update(whole_tensor(p.detach()).cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
