"""A cache on disk of what the frozen parts of a model compute of training samples: latents, features, hidden states.

Frozen parts give the same for a sample at every step, so that a step which reads their results trains the rest alone.
The samples of a cache are a function of the recipe; each epoch trains on all of them, in a new order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from unimm.checkpoint.atomic import atomic_file
from unimm.checkpoint.json_files import read_json, write_json
from unimm.checkpoint.save import own_name, save_safetensors
from unimm.distributed.ranks import Ranks
from unimm.training.batches import iterate_batches
from unimm.training.config import TrainConfig
from unimm.training.tasks.base import StepTask, TrainingTask

logger = logging.getLogger(__name__)

# samples whose records are computed together and lie in one file
SHARD_SIZE = 256
MANIFEST = "cache.json"
# fields of a recipe that say how it trains, and not on which samples
TRAINING_FIELDS = (
    *("cache", "steps", "batch_size", "lr", "betas", "eps", "weight_decay", "no_weight_decay", "muon", "warmup_steps"),
    *("schedule", "min_lr_ratio", "max_grad_norm", "ema_decay", "loss_weights", "save_every", "sample_every"),
    *("log_every", "gradient_accumulation", "distributed"),
    *("optimizer", "lr_multipliers"),
)
# what is computed of one sample, by name; the first axis may differ between samples
Record = dict[str, Tensor]


@runtime_checkable
class CachingTask(StepTask, Protocol):
    """A task that can train on records of what its frozen parts compute."""

    # inputs of the records of one shard, a pure function of the shard's number, made by worker processes
    cache_inputs: Callable[[int], Any]

    def cache_records(self, inputs: Any) -> list[Record]:
        """The records of one shard's samples; called without gradients, in eval mode."""

    def use_cache(self, cache: FeatureCache) -> None:
        """Make batches of the cache's records from now on.

        Raises ValueError where a part whose results it holds is trained.
        """


@dataclass(frozen=True)
class FeatureCache:
    """The records of `n_samples` samples in a folder, which are read where they lie when they are asked for."""

    folder: Path
    n_samples: int

    def __len__(self) -> int:
        return self.n_samples

    def __getitem__(self, index: int) -> Record:
        shard, place = divmod(index, SHARD_SIZE)
        return self.shards[shard].record(place)

    def __reduce__(self) -> tuple[type[FeatureCache], tuple[Path, int]]:
        # another process maps the files itself
        return FeatureCache, (self.folder, self.n_samples)

    @cached_property
    def shards(self) -> list[CacheShard]:
        """The files, mapped into memory."""
        return [CacheShard(load_file(path)) for path in shard_paths(self.folder, self.n_samples)]

    def batch_indices(self, step: int, batch_size: int, seed: int) -> list[int]:
        """The samples of a training step, in whose epoch each sample occurs once."""
        first = step * batch_size
        epochs = [divmod(i, self.n_samples) for i in range(first, first + batch_size)]
        return [epoch_order(self.n_samples, epoch, seed)[place] for epoch, place in epochs]


@dataclass(frozen=True)
class CacheShard:
    """The records of SHARD_SIZE samples: of each name their tensors end to end, and how long each is."""

    tensors: Mapping[str, Tensor]

    @cached_property
    def bounds(self) -> dict[str, list[tuple[int, int]]]:
        """name -> where each record's tensor begins and ends"""
        lengths = {name: x.tolist() for name, x in self.tensors.items() if name.endswith(".lengths")}
        return {
            name.removesuffix(".lengths"): list(pairwise(accumulate(values, initial=0)))
            for name, values in lengths.items()
        }

    def record(self, place: int) -> Record:
        """The record of one sample."""
        return {name: self.tensors[name][slice(*bounds[place])] for name, bounds in self.bounds.items()}

    @classmethod
    def from_records(cls, records: Sequence[Record]) -> CacheShard:
        """Records of the same names as one shard."""
        tensors = {}
        for name in records[0]:
            values = [record[name] for record in records]
            tensors[name] = torch.cat(values)
            tensors[f"{name}.lengths"] = torch.tensor([len(x) for x in values])
        return cls(tensors)


@lru_cache(maxsize=2)
def epoch_order(n: int, epoch: int, seed: int) -> list[int]:
    """The order of n samples in an epoch; the same for a seed on every machine."""
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randperm(n, generator=generator).tolist()


def shard_paths(folder: Path, n_samples: int) -> list[Path]:
    """The files of a cache."""
    return [folder / f"{i:06d}.safetensors" for i in range(-(-n_samples // SHARD_SIZE))]


def use_feature_cache(
    task: TrainingTask, recipe: TrainConfig, out: Path, *, workers: int, ranks: Ranks | None = None
) -> None:
    """Let a task train on a cache, which is computed as far as it is not there yet, by each rank a share.

    Raises ValueError for a task that has nothing to cache, and for a folder that holds other samples' records, or those
    of other weights.
    """
    assert recipe.cache is not None and recipe.cache.samples is not None, "the recipe asks for a cache"
    if not isinstance(task, CachingTask):
        raise ValueError(f"got a cache for the task {recipe.task!r}, which caches nothing: leave `cache` out")
    folder = Path(recipe.cache.folder) if recipe.cache.folder else out / "cache"
    cache = FeatureCache(folder, recipe.cache.samples)
    task.use_cache(cache)
    ranks = ranks or Ranks()
    ranks.run_first(lambda: check_manifest(folder, cache_key(task.model, recipe)))
    with torch.autocast(_device_type(task.model), torch.bfloat16, enabled=recipe.precision == "bfloat16"):
        fill_cache(task, cache, workers=workers, ranks=ranks)
    ranks.barrier()


def _device_type(model: nn.Module) -> str:
    return next(model.parameters()).device.type


def cache_key(model: nn.Module, recipe: TrainConfig) -> dict[str, str]:
    """What the records of a cache depend on: the recipe's samples, and the weights that are not trained."""
    samples = {name: x for name, x in dataclasses.asdict(recipe).items() if name not in TRAINING_FIELDS}
    weights = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            weights.update(own_name(name).encode())
            weights.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    text = json.dumps(samples, sort_keys=True)
    return {"samples": hashlib.sha256(text.encode()).hexdigest(), "weights": weights.hexdigest()}


def check_manifest(folder: Path, key: Mapping[str, str]) -> None:
    """Write what the records depend on. Raises ValueError where the folder has records that depend on something
    else."""
    if (folder / MANIFEST).exists():
        found = read_json(folder / MANIFEST)
        changed = [name for name in key if found.get(name) != key[name]]
        if changed:
            raise ValueError(
                f"the cache {folder} was made of other {' and '.join(changed)}: delete it, or give `cache` another "
                "folder"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / MANIFEST, dict(key))


@torch.no_grad()
def fill_cache(task: CachingTask, cache: FeatureCache, *, workers: int, ranks: Ranks) -> None:
    """Compute this rank's share of the shards that are not there yet."""
    paths = shard_paths(cache.folder, len(cache))
    missing = [i for i, path in enumerate(paths) if i % ranks.size == ranks.rank and not path.exists()]
    if not missing:
        return
    logger.info("computing %d of the cache's %d samples in %s", len(missing) * SHARD_SIZE, len(cache), cache.folder)
    task.model.eval()
    inputs = MissingInputs(task.cache_inputs, missing)
    with closing(iterate_batches(inputs, range(len(missing)), workers=workers)) as made:
        for i, batch in zip(missing, tqdm(made, total=len(missing), desc="cache", disable=None), strict=True):
            shard = CacheShard.from_records(task.cache_records(batch))
            with atomic_file(paths[i]) as partial:
                save_safetensors(shard.tensors, partial)


@dataclass(frozen=True)
class MissingInputs:
    """The inputs of the shards that are missing, by their place among these."""

    cache_inputs: Callable[[int], Any]
    missing: Sequence[int]

    def __call__(self, place: int) -> Any:
        return self.cache_inputs(self.missing[place])
