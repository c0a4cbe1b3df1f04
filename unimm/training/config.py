"""The configuration of a training run, read strictly from a recipe: a YAML file that names every number of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from unimm.training.data_config import DataConfig, PackingConfig, ValidationConfig
from unimm.training.fields import (
    AtLeastOne,
    Decay,
    Fraction,
    LossWeights,
    NoneOrMore,
    NotNegative,
    Positive,
    RecipeSection,
    Seed,
)
from unimm.training.lora_config import LoRAConfig
from unimm.training.overrides import apply_overrides
from unimm.training.recipe_keys import RecipeLoader, suggestion

Section = TypeVar("Section", bound=RecipeSection)
RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True, kw_only=True)
class CacheConfig(RecipeSection):
    """A recipe's `cache` of what frozen parts compute of training samples (unimm.training.cache), or, with `data`, of its
    images (unimm.training.image_cache)."""

    # how many training samples there are: each is computed once; null with `data`, whose images are encoded once
    samples: AtLeastOne | None = None
    # where they lie; "" for OUT/cache
    folder: str = ""


@dataclass(frozen=True, kw_only=True)
class DistributedConfig(RecipeSection):
    """A recipe's `distributed`: how a model is trained on the devices of a run (unimm.training.parallel)."""

    # the weights lie in so many shards, each on a device, so many times; 0 for as many as there are devices left
    shard: NoneOrMore = 0
    replicate: NoneOrMore = 0
    # whether what a block computed is dropped, and computed again for its backward; "selective" keeps the products of
    # matrices and attention
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    # whether shards, and what the optimisers hold of them, lie in the memory of the CPU
    cpu_offload: bool = False
    # in what gradients are added up over devices
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RecipeSection):
    """Numbers of one run; a recipe gives all of them, but for `options` and `model`, which the task reads."""

    # a task of ours (unimm.training.tasks.base), or `module:Class` for one of another package
    task: str
    options: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    seed: Seed
    steps: AtLeastOne
    batch_size: AtLeastOne
    lr: Positive
    betas: tuple[Decay, Decay]
    eps: Positive
    # for matrices only: biases and gains of norms are not decayed
    weight_decay: NotNegative
    # prefixes of the names of parameters whose matrices Muon trains; `optimizer` trains the rest
    muon: tuple[str, ...]
    warmup_steps: NoneOrMore
    schedule: Literal["constant", "cosine"]
    # the cosine ends at this fraction of lr
    min_lr_ratio: Fraction
    # the gradient is scaled down to this norm where it is larger
    max_grad_norm: Positive
    # decay of the exponential moving average of the weights
    ema_decay: Fraction
    # "auto": bfloat16 where products of matrices are quicker in it (unimm.training.precision)
    precision: Literal["auto", "float32", "bfloat16"]
    # one for every loss of the task
    loss_weights: LossWeights
    save_every: AtLeastOne
    sample_every: AtLeastOne
    log_every: AtLeastOne
    # prefixes of the names of parameters whose matrices are not decayed either
    no_weight_decay: tuple[str, ...] = ()
    # "adamw8bit" holds averages of large matrices in 8 bits
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    # prefix of the names of parameters -> what the learning rate is multiplied with; the longest prefix counts
    lr_multipliers: Mapping[str, Positive] = field(default_factory=dict)
    # the device's FLOPs a second in the run's precision, in 10^12, for MFU; null: a product of matrices is timed
    peak_tflops: Positive | None = None
    # losses on a held-out part, now and then; null for none
    validation: ValidationConfig | None = None
    # where numbers and samples are shown beside log.jsonl (unimm.training.loggers)
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    # batches whose gradients are added up, each loss by its count, before a step
    gradient_accumulation: AtLeastOne = 1
    # whether checkpoints are written beside training, by a thread, from a copy in the CPU's memory
    async_checkpoints: bool = False
    # how the model lies on the devices of a run; null for the defaults
    distributed: DistributedConfig | None = None
    # samples whose frozen parts' results are computed once; null where every step makes new samples
    cache: CacheConfig | None = None
    # one's own datasets in place of the toy world
    data: DataConfig | None = None
    # a batch is a pack of about so many tokens, in place of batch_size samples
    packing: PackingConfig | None = None
    # an adapter of a release is trained in place of its weights
    lora: LoRAConfig | None = None

    def __post_init__(self) -> None:
        if self.cache is not None and (self.cache.samples is None) == (self.data is None):
            raise ValueError(
                f"got cache.samples {self.cache.samples} {'without' if self.data is None else 'and'} data: expected a number "
                "of training samples of the toy world, or data, whose images are encoded once, however many there are"
            )
        if self.packing is None:
            return
        if self.data is None:
            raise ValueError("got packing without data: expected both; the toy world has batches of batch_size samples")
        if self.batch_size != 1:
            raise ValueError(f"got batch_size {self.batch_size} and packing: expected 1, since a batch is one pack")

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0: a linear rise over `warmup_steps`, then the schedule."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * cosine)


def recipe_path(name: str, *, folder: Path = RECIPES) -> Path:
    """Where a recipe lies: a YAML file, or one of ours in `folder` by its name."""
    return Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"


def read_recipe(path: str | Path, *, settings: Sequence[str] = ()) -> TrainConfig:
    """The configuration in a YAML file. settings: values set over the file's, as `key=value` (unimm.training.overrides).

    Raises ValueError for a file that is missing, is no YAML, or says something else.
    """
    return read_recipe_file(TrainConfig, path, settings=settings)


def read_recipe_file(cls: type[Section], path: str | Path, *, settings: Sequence[str] = ()) -> Section:
    """A section that is a YAML file of its own, as `read_recipe` reads it."""
    path = Path(path)
    if not path.is_file():
        found = sorted(other.name for other in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ValueError(f"got the recipe {path}, expected a file: {path.parent} holds {found or 'no recipe'}")
    try:
        # a subclass of the safe loader
        contents = yaml.load(path.read_text(encoding="utf-8"), Loader=RecipeLoader)
        if isinstance(contents, dict) and settings:
            contents = apply_overrides(contents, cls, settings)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return from_mapping(cls, contents, where=str(path))


def from_mapping(cls: type[Section], values: object, *, where: str) -> Section:
    """A section from a mapping of names to values of the types that its fields have; lists serve as tuples.

    Raises ValueError for unknown and missing names and for wrong values. where: the source, for the message.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"got {values!r} for {where}, expected a mapping of names to values")
    known = [one.name for one in fields(cls)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ValueError(
                f"got {name!r} in {where}, which is no field of {cls.__name__}{suggestion(str(name), known)}"
            )
    try:
        # as JSON, since strictness there still takes a list for a tuple
        written = json.dumps(dict(values), default=lambda value: _refuse(value, where))
        return TypeAdapter(cls).validate_json(written, strict=True)
    except ValidationError as error:
        raise ValueError(_message(cls, values, error.errors(), where)) from error


def _refuse(value: object, where: str) -> object:
    raise ValueError(f"got {value!r:.80} in {where}, expected numbers, texts, lists and mappings: correct the recipe")


@contextmanager
def name_source(where: str) -> Iterator[None]:
    """Begin the message of a ValueError of the body with what it is about, as the recipe's file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def require(values: Mapping[str, Any], *paths: str, where: str = "model of the recipe") -> None:
    """Raise ValueError, with their names, for keys that a section lacks: `section.key`, or `section.` for any of it."""
    missing = []
    for path in paths:
        *sections, key = path.split(".")
        inner: Any = values
        for section in sections:
            inner = inner.get(section)
            if not isinstance(inner, Mapping):
                raise ValueError(f"got {inner!r:.80} for {section} in {where}, expected a mapping: correct the recipe")
        missing += [path] if key and inner.get(key) is None else []
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}: correct the recipe")


def _message(cls: type, values: Mapping[str, Any], errors: list[ErrorDetails], where: str) -> str:
    """The message for wrong values: what is missing, or else the first wrong value."""
    missing = [str(one["loc"][0]) for one in errors if one["type"] == "missing" and len(one["loc"]) == 1]
    if missing:
        return f"{where} lacks {', '.join(missing)}: give every field of {cls.__name__} a value"
    error = errors[0]
    if not error["loc"]:
        # what __post_init__ of the class says
        return _own_words(error)
    kind: Any = cls
    value: Any = values
    place = ""
    for key in error["loc"]:
        # too short a tuple is wrong as a whole
        if error["type"] == "missing" and isinstance(key, int):
            break
        if error["type"] in ("missing", "unexpected_keyword_argument") and key == error["loc"][-1]:
            known = [one.name for one in fields(kind)]
            if error["type"] == "missing":
                return f"{place} in {where} lacks {key}: give every field of {kind.__name__} a value"
            return (
                f"got {key!r} in {place} of {where}, which is no field of {kind.__name__}{suggestion(str(key), known)}"
            )
        value = value[key]
        kind = _kind_of_value(kind, key)
        place = f"{place}[{key}]" if isinstance(key, int) else f"{place}.{key}" if place else key
    if error["type"] == "value_error":
        return f"{place} in {where}: {_own_words(error)}: correct the recipe"
    return f"got {value!r} for {place} in {where}, expected {_expected(kind, error)}: correct the recipe"


def _kind_of_value(kind: Any, key: str | int) -> Any:
    """The type of what stands under a key of a section, of a mapping, or of a tuple."""
    if is_dataclass(kind):
        kind = get_type_hints(kind)[str(key)]
        # of an optional section the section
        others = [one for one in get_args(kind) if one is not type(None)]
        return others[0] if isinstance(kind, UnionType) and len(others) == 1 else kind
    return get_args(kind)[1 if isinstance(key, str) else 0]


def _own_words(error: ErrorDetails) -> str:
    """What a check of ours says."""
    return str(error.get("ctx", {}).get("error", error["msg"]))


def _expected(kind: Any, error: ErrorDetails) -> str:
    """A description of the values of this type, or within these bounds."""
    bounds = error.get("ctx", {})
    words = {
        "ge": "at least",
        "gt": "more than",
        "le": "at most",
        "lt": "less than",
        "min_length": "a length of at least",
    }
    found = [f"{word} {bounds[name]:g}" for name, word in words.items() if name in bounds]
    if found:
        return " and ".join(found)
    if get_origin(kind) is Literal:
        return f"one of {list(get_args(kind))}"
    return str(kind) if get_origin(kind) else getattr(kind, "__name__", str(kind))
