"""A recipe: every number of a training run, read strictly from YAML."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Numbers of one run; all are spelled out in the file, but for `options` and `model`, which the objective reads."""

    task: str
    options: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    seed: int
    steps: int
    batch_size: int
    lr: float
    betas: tuple[float, float]
    eps: float
    # on matrices only: biases and gains of norms are left alone
    weight_decay: float
    # matrices of parts that Muon trains, by the beginning of their parameters' names; AdamW trains the rest
    muon: tuple[str, ...]
    warmup_steps: int
    schedule: Literal["constant", "cosine"]
    # the cosine ends at this fraction of lr
    min_lr_ratio: float
    # largest norm of the gradient
    max_grad_norm: float
    # decay of the weights' running average
    ema_decay: float
    precision: Literal["float32", "bfloat16"]
    loss_weights: Mapping[str, float]
    save_every: int
    sample_every: int
    log_every: int
    # parts whose matrices are not decayed either, by the beginning of their parameters' names
    no_weight_decay: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "sample_every", "log_every"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("lr", "eps", "max_grad_norm"):
            check(getattr(self, name) > 0, name, getattr(self, name), "more than 0")
        for name in ("weight_decay", "warmup_steps"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name, value in (("min_lr_ratio", self.min_lr_ratio), ("ema_decay", self.ema_decay)):
            check(0 <= value <= 1, name, value, "a number from 0 to 1")
        check(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "two numbers from 0 to 1, 1 excluded")
        check(bool(self.loss_weights), "loss_weights", {}, "a weight for every loss of the objective")

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0: a linear rise over `warmup` steps, then the schedule."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def check(fine: bool, name: str, got: object, expected: str) -> None:
    """Raise a ValueError about a field, unless it is fine."""
    if not fine:
        raise ValueError(f"got {name}: {got}, expected {expected}: correct the recipe")


def read_recipe(path: str | Path) -> TrainConfig:
    """A recipe from its YAML file."""
    path = Path(path)
    if not path.is_file():
        found = sorted(other.name for other in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ValueError(f"got the recipe {path}, expected a file: {path.parent} holds {found or 'no recipe'}")
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    return strict(TrainConfig, fields, where=str(path))


def strict(cls: type[T], fields: object, *, where: str) -> T:
    """A dataclass from a mapping: unknown and missing names and wrong types are refused; `where` names the source."""
    if not isinstance(fields, Mapping):
        raise ValueError(f"got {fields!r} for {where}, expected a mapping of names to values")
    known = {part.name: part for part in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in fields:
        if name not in known:
            raise ValueError(f"got {name!r} in {where}, which is no field of {cls.__name__}{nearest(str(name), known)}")
    absent = (dataclasses.MISSING, dataclasses.MISSING)
    missing = [n for n, p in known.items() if n not in fields and (p.default, p.default_factory) == absent]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}: give every field of {cls.__name__} a value")
    kinds = get_type_hints(cls)
    return cls(**{name: cast(value, kinds[name], where=f"{name} in {where}") for name, value in fields.items()})


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the known name that looks most like this one."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f": did you mean {close[0]!r}?" if close else f": known are {', '.join(names)}"


def cast(value: object, kind: Any, *, where: str) -> Any:
    """A YAML value as the type a field asks for."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else cast(value, next(k for k in inner if k is not type(None)), where=where)
    if origin is Literal:
        if value in inner:
            return value
    elif origin is tuple:
        varied = inner[-1] is Ellipsis
        if isinstance(value, list | tuple) and (varied or len(value) == len(inner)):
            kinds = [inner[0]] * len(value) if varied else inner
            return tuple(cast(part, k, where=where) for part, k in zip(value, kinds, strict=True))
    elif origin is not None:
        if isinstance(value, Mapping):
            return {key: cast(part, inner[1], where=f"{key} of {where}") for key, part in value.items()}
    elif kind is float:
        number = as_float(value)
        if number is not None:
            return number
    elif kind is Any or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
        return value
    expected = f"one of {list(inner)}" if origin is Literal else str(kind) if origin else kind.__name__
    raise ValueError(f"got {value!r} for {where}, expected {expected}: correct the recipe")


def as_float(value: object) -> float | None:
    """A finite number; YAML takes 1e-3 (without a point) for a string, so strings are tried too."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
