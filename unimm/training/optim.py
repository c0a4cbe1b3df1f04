"""The optimisers of a run: which parameters each of them steps, by which learning rate, and what it holds of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unimm.checkpoint.save import own_name
from unimm.distributed.muon import Muon
from unimm.distributed.sharding import local_tensor, with_local
from unimm.training.config import TrainConfig
from unimm.training.freezing import check_prefixes, has_prefix

OptimizerKind = Literal["adamw", "adamw8bit", "muon"]
# what an optimiser holds of a parameter: as much as the parameter has, but for the number of steps, and of 8 bits the
# scale of every block
HELD_TENSORS: Mapping[OptimizerKind, tuple[str, ...]] = {
    "adamw": ("step", "exp_avg", "exp_avg_sq"),
    "adamw8bit": ("step", "exp_avg.codes", "exp_avg.scale", "exp_avg_sq.codes", "exp_avg_sq.scale"),
    "muon": ("momentum_buffer",),
}
# elements that share a scale in 8 bits
BLOCK_SIZE = 256
# parameters of fewer elements are held in full: there is little to win, and a shard of 4096 elements would be anyway
MIN_8BIT_SIZE = 2**20


class Optimizers:
    """Muon for the matrices that the recipe names, AdamW for the rest, in 8 bits if it says so.

    Muon is that of Jordan et al. 2024, scaled as in arXiv 2502.16982, section 2.2, so that AdamW's learning rate fits.
    Matrices are decayed, but for those that the recipe excepts; vectors are not. Of parameters in shards each rank
    steps its own, as plain tensors.
    """

    def __init__(self, model: nn.Module, recipe: TrainConfig) -> None:
        """Raises ValueError for prefixes in the recipe that no trained parameter's name begins with."""
        check_prefixes(model, recipe.muon, where="muon")
        check_prefixes(model, recipe.no_weight_decay, where="no_weight_decay")
        check_prefixes(model, tuple(recipe.lr_multipliers), where="lr_multipliers", trained=True)
        self.recipe = recipe
        self.parameters = {own_name(name): p for name, p in model.named_parameters() if p.requires_grad}
        self.kinds = {name: self._kind(name, p) for name, p in self.parameters.items()}
        # Muon sees whole matrices, also where they lie in shards
        self.stepped = {name: p if self.kinds[name] == "muon" else _local(p) for name, p in self.parameters.items()}
        self.optimizers = {kind: self._build(kind) for kind in HELD_TENSORS if kind in self.kinds.values()}

    def _kind(self, name: str, p: nn.Parameter) -> OptimizerKind:
        if p.ndim == 2 and has_prefix(name, self.recipe.muon):
            return "muon"
        if self.recipe.optimizer == "adamw8bit" and p.ndim >= 2 and p.numel() >= MIN_8BIT_SIZE:
            # blocks that span rows would be others in other shards
            return "adamw" if _row_size(p) % BLOCK_SIZE else "adamw8bit"
        return "adamw"

    def _build(self, kind: OptimizerKind) -> torch.optim.Optimizer:
        recipe = self.recipe
        names = [name for name, one in self.kinds.items() if one == kind]
        groups = self._groups(names)
        if kind == "muon":
            return Muon(groups, lr=recipe.lr)
        if kind == "adamw8bit":
            return _eight_bit_class()(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, block_size=BLOCK_SIZE)
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)

    def _groups(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """The parameters by how much they are decayed, and by what their learning rate is multiplied with."""
        numbers = {name: (self._weight_decay(name), self._lr_multiplier(name)) for name in names}
        ordered = sorted(numbers, key=lambda name: numbers[name], reverse=True)
        return [
            {"params": [self.stepped[name] for name in some], "weight_decay": decay, "lr_multiplier": multiplier}
            for (decay, multiplier), some in groupby(ordered, key=lambda name: numbers[name])
        ]

    def _weight_decay(self, name: str) -> float:
        is_excepted = self.parameters[name].ndim < 2 or has_prefix(name, self.recipe.no_weight_decay)
        return 0.0 if is_excepted else self.recipe.weight_decay

    def _lr_multiplier(self, name: str) -> float:
        """That of the longest prefix of the name."""
        fitting = [prefix for prefix in self.recipe.lr_multipliers if has_prefix(name, [prefix])]
        return self.recipe.lr_multipliers[max(fitting, key=len)] if fitting else 1.0

    def set_lr(self, lr: float) -> None:
        """Set the learning rate, which some parts have a multiple of."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                rate = lr * group["lr_multiplier"]
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def step(self) -> None:
        """Update the parameters that have a gradient, and take the gradients away."""
        for name, p in self.parameters.items():
            if self.stepped[name] is not p and p.grad is not None:
                self.stepped[name].grad = local_tensor(p.grad)
        for optimizer in self.optimizers.values():
            optimizer.step()
        for p in (*self.parameters.values(), *self.stepped.values()):
            p.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """What the optimisers hold of the parameters that they have stepped, by PARAMETER/NAME; shards of shards."""
        found = {}
        for name, kind in self.kinds.items():
            held = self.optimizers[kind].state.get(self.stepped[name], {})
            for key in HELD_TENSORS[kind] if held else ():
                found[f"{name}/{key}"] = self._tensor(name, held, key)
        return found

    def _tensor(self, name: str, held: Mapping[str, Any], key: str) -> Tensor:
        p = self.parameters[name]
        outer, _, inner = key.partition(".")
        value: Tensor = getattr(held[outer], inner) if inner else held[outer]
        if key == "step":
            return value
        if inner == "scale":
            # of every row's blocks; the rows lie in shards as the parameter's do
            n = _row_size(p) // BLOCK_SIZE
            return with_local(p, value.view(-1, n), shape=(p.shape[0], n))
        return with_local(p, value)

    def allocate(self, paths: Iterable[str], where: str) -> dict[str, Tensor]:
        """`tensors`, of the parameters that other optimisers held something of, to be filled with it.

        paths: the names of what they held. where: what holds it, for the error. Raises ValueError where they were other
        optimisers.
        """
        held: dict[str, set[str]] = {}
        for path in paths:
            name, _, key = path.partition("/")
            held.setdefault(name, set()).add(key)
        for name, keys in held.items():
            kind = self.kinds.get(name)
            if kind is None or keys != set(HELD_TENSORS[kind]):
                raise ValueError(
                    f"{where} holds {', '.join(sorted(keys))} of {name}, and this run's optimiser "
                    f"{', '.join(HELD_TENSORS[kind]) if kind else 'nothing'}: use the recipe that it was trained by"
                )
            self.optimizers[kind].state[self.stepped[name]] = _empty_state(kind, self.stepped[name])
        return self.tensors()


def _row_size(p: nn.Parameter) -> int:
    return math.prod(p.shape[1:])


def _local(p: nn.Parameter) -> nn.Parameter:
    """This rank's shard of a parameter as one of its own, in the same memory; or the parameter."""
    return nn.Parameter(local_tensor(p.detach())) if isinstance(p, DTensor) else p


def _empty_state(kind: OptimizerKind, p: nn.Parameter) -> dict[str, Tensor]:
    if kind == "muon":
        return {"momentum_buffer": torch.zeros_like(local_tensor(p.detach()))}
    if kind == "adamw":
        averages = {key: torch.zeros_like(p.detach()) for key in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.zeros((), device=p.device), **averages}
    from torchao.optim.subclass_8bit import OptimState8bit

    signs = {"exp_avg": True, "exp_avg_sq": False}
    averages = {
        key: OptimState8bit.zeros(p.shape, signed, BLOCK_SIZE, p.device, dtype=p.dtype) for key, signed in signs.items()
    }
    return {"step": torch.tensor(0.0), **averages}


def _eight_bit_class() -> Any:
    """torchao's AdamW8bit: Dettmers et al. 2021, arXiv 2110.02861."""
    try:
        from torchao.optim import AdamW8bit
    except ModuleNotFoundError as error:
        raise ValueError("got optimizer adamw8bit, which needs torchao: pip install 'unimm[torchao]'") from error
    return AdamW8bit
