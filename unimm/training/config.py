"""The configuration of a training run, read strictly from a recipe: a YAML file that names every number of it."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from unimm.training.fields import (
    AtLeastOne,
    Decay,
    Fraction,
    LossWeights,
    NoneOrMore,
    NotNegative,
    Positive,
    Seed,
)

# keys of recipes of earlier versions -> what they are called now, where a class has a field of that name
RENAMED_KEYS: Mapping[str, tuple[str, ...]] = {
    # of TrainConfig
    "objective": ("task",),
    "batch": ("batch_size",),
    "warmup": ("warmup_steps",),
    "final": ("min_lr_ratio",),
    "clip": ("max_grad_norm",),
    "average": ("ema_decay",),
    "undecayed": ("no_weight_decay",),
    # of the tasks' options and of their sections of `model`
    "begun": ("append_vision_start",),
    "captions": ("text_encoders",),
    "compiled": ("compile",),
    "draw": ("vae",),
    "free": ("unquantized_steps",),
    "hidden": ("hidden_dim",),
    "judged": ("scored_scenes", "scored_examples"),
    "looked": ("vision_batch_size",),
    "look": ("vit",),
    "looks": ("vision",),
    "measured": ("measured_scenes",),
    "nameless_colours": ("novel_colours",),
    "nameless_shapes": ("novel_shapes",),
    "noise": ("latent_noise",),
    "painter": ("denoiser",),
    "plan": ("plan_system_prompt",),
    "planned": ("planned_characters",),
    "reader": ("mllm",),
    "reader_dtype": ("mllm_dtype",),
    "revived": ("revive_fraction",),
    "shift": ("timestep_shift",),
    "side": ("image_size",),
    "sighted": ("vision_steps",),
    "start": ("init_from",),
    "targets": ("timesteps_per_image",),
    "thinks": ("think_prob",),
    "vocabulary": ("vocab_size",),
    "weights": ("edit_weights",),
}


class RecipeSection:
    """A part of a recipe: subclasses are dataclasses that `from_mapping` reads."""

    # no string for a number, no 1.0 or true for 1, no infinities
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")


Section = TypeVar("Section", bound=RecipeSection)


@dataclass(frozen=True, kw_only=True)
class CacheConfig(RecipeSection):
    """A recipe's `cache` of what frozen parts compute of training samples (unimm.training.cache)."""

    # how many training samples there are: each is computed once
    samples: AtLeastOne
    # where they lie; "" for OUT/cache
    folder: str = ""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(RecipeSection):
    """A recipe's `validation` on a held-out part (unimm.training.validation)."""

    # steps between two validations; there is one at the end, too
    every: AtLeastOne
    # batches of the recipe's size, the same every time
    batches: AtLeastOne
    # which weights are validated: the averaged ones, which a release holds, or those that are trained
    weights: Literal["average", "current"] = "average"


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
    # prefixes of the names of parameters whose matrices Muon trains; AdamW trains the rest
    muon: tuple[str, ...]
    warmup_steps: NoneOrMore
    schedule: Literal["constant", "cosine"]
    # the cosine ends at this fraction of lr
    min_lr_ratio: Fraction
    # the gradient is scaled down to this norm where it is larger
    max_grad_norm: Positive
    # decay of the exponential moving average of the weights
    ema_decay: Fraction
    precision: Literal["float32", "bfloat16"]
    # one for every loss of the task
    loss_weights: LossWeights
    save_every: AtLeastOne
    sample_every: AtLeastOne
    log_every: AtLeastOne
    # prefixes of the names of parameters whose matrices are not decayed either
    no_weight_decay: tuple[str, ...] = ()
    # the device's FLOPs a second in the run's precision, in 10^12, for MFU; null: a product of matrices is timed
    peak_tflops: Positive | None = None
    # losses on a held-out part, now and then; null for none
    validation: ValidationConfig | None = None
    # where numbers and samples are shown beside log.jsonl (unimm.training.loggers)
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    # batches whose gradients are added up, each loss by its count, before a step
    gradient_accumulation: AtLeastOne = 1
    # samples whose frozen parts' results are computed once; null where every step makes new samples
    cache: CacheConfig | None = None

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0: a linear rise over `warmup_steps`, then the schedule."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * cosine)


class RecipeLoader(yaml.SafeLoader):
    """YAML's safe loader that refuses keys written twice, which YAML forbids, and of which it would take the last.

    It also takes 1e-3 for a number, which YAML 1.1 takes for a string without a point.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping. Raises ValueError for a key that is written twice; one that `<<` merges may be written again."""
        lines: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, Hashable):  # which the loader says below
                continue
            if key in lines:
                raise ValueError(f"got the key {key!r} twice, in lines {lines[key]} and {line}: leave one of them out")
            lines[key] = line
        return super().construct_mapping(node, deep=deep)


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_recipe(path: str | Path) -> TrainConfig:
    """The configuration in a YAML file. Raises ValueError for one that is missing, no YAML, or says something else."""
    path = Path(path)
    if not path.is_file():
        found = sorted(other.name for other in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ValueError(f"got the recipe {path}, expected a file: {path.parent} holds {found or 'no recipe'}")
    try:
        # a subclass of the safe loader
        contents = yaml.load(path.read_text(encoding="utf-8"), Loader=RecipeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return from_mapping(TrainConfig, contents, where=str(path))


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


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the new name of a renamed key, else the known name that is nearest."""
    names = sorted(known)
    for renamed in RENAMED_KEYS.get(name, ()):
        if renamed in names:
            return f": it is called {renamed!r} now"
    close = difflib.get_close_matches(name, names, n=1)
    return f": did you mean {close[0]!r}?" if close else f": known are {', '.join(names)}"


def _message(cls: type, values: Mapping[str, Any], errors: list[ErrorDetails], where: str) -> str:
    """The message for wrong values: what is missing, or else the first wrong value."""
    missing = [str(one["loc"][0]) for one in errors if one["type"] == "missing" and len(one["loc"]) == 1]
    if missing:
        return f"{where} lacks {', '.join(missing)}: give every field of {cls.__name__} a value"
    error = errors[0]
    if not error["loc"]:
        # what __post_init__ of the class says
        return _own_words(error)
    name = str(error["loc"][0])
    kind = get_type_hints(cls)[name]
    value: Any = values[name]
    place = name
    for key in error["loc"][1:]:
        # too short a tuple is wrong as a whole
        if error["type"] == "missing":
            break
        value = value[key]
        place = f"{key} of {place}" if isinstance(key, str) else f"{place}[{key}]"
        kind = get_args(kind)[1 if isinstance(key, str) else 0]
    if error["type"] == "unexpected_keyword_argument":
        return f"got {place} in {where}, which has no such key: correct the recipe"
    if error["type"] == "value_error":
        return f"{place} in {where}: {_own_words(error)}: correct the recipe"
    return f"got {value!r} for {place} in {where}, expected {_expected(kind, error)}: correct the recipe"


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
