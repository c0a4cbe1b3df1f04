"""Gradients over ranks: each rank's batches may reach other parameters, and all ranks must reduce the same ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from unimm.distributed.ranks import Ranks

# elements that are sent at once: 256 MB of float32
BUCKET_SIZE = 2**26


class ZeroGradients(torch.autograd.Function):
    """Tensors as they are, and zeros as the gradients of those of some parameters that turn out to be unreached."""

    @staticmethod
    def forward(ctx: Any, unreached: Callable[[], Sequence[bool]], n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The first n tensors; the others are the parameters, of which `unreached` is asked in the backward."""
        ctx.unreached = unreached
        ctx.n = n
        ctx.like = [(p.shape, p.dtype, p.device) for p in tensors[n:]]
        ctx.set_materialize_grads(False)
        return tensors[:n]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        zeros = [
            torch.zeros((), dtype=dtype, device=device).expand(shape) if is_unreached else None
            for (shape, dtype, device), is_unreached in zip(ctx.like, ctx.unreached(), strict=True)
        ]
        return None, None, *gradients, *zeros


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of nested mappings, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors_in(one)
    elif type(value) in (list, tuple):
        for one in value:
            yield from tensors_in(one)


def replace_tensors(value: Any, new: Mapping[int, Tensor]) -> Any:
    """Nested mappings, lists and tuples with other tensors in the places of some, which are given by their ids."""
    if isinstance(value, Tensor):
        return new.get(id(value), value)
    if isinstance(value, Mapping):
        return {key: replace_tensors(one, new) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(replace_tensors(one, new) for one in value)
    return value


def reached_leaves(outputs: Iterable[Tensor]) -> set[int]:
    """The ids of the leaves that tensors depend on, not counting what `ZeroGradients` adds."""
    found: set[int] = set()
    left = [x.grad_fn for x in outputs if x.grad_fn is not None]
    seen = set(left)
    while left:
        node = left.pop()
        edges = node.next_functions
        if node.name() == f"{ZeroGradients.__name__}Backward":
            edges = edges[: node.n]  # type: ignore[attr-defined]
        for following, _ in edges:
            if following is None or following in seen:
                continue
            seen.add(following)
            if following.name() == "torch::autograd::AccumulateGrad":
                found.add(id(following.variable))  # type: ignore[attr-defined]
            else:
                left.append(following)
    return found


def require_input_gradient(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A forward pre-hook by which an input of a module requires a gradient, as it does on a rank whose batch has trained
    parameters before the module."""
    floating = [x for x in tensors_in(args) if x.is_floating_point()]
    if not torch.is_grad_enabled() or not floating or any(x.requires_grad for x in floating):
        return None
    return replace_tensors(args, {id(floating[0]): floating[0].detach().requires_grad_()})


class ReachedParameters:
    """Which trained parameters the losses of a step reach; those that a batch's do not get zeros as their gradients.

    So all ranks reduce the same gradients, whatever their batches hold.
    """

    def __init__(self) -> None:
        # of a step
        self.names: set[str] = set()
        # of the present batch: the whole parameters by their ids, and what its losses do not reach
        self.present: dict[int, str] = {}
        self.unreached: set[str] = set()

    def watch_part(self, module: nn.Module, owners: Mapping[str, tuple[nn.Module, str]]) -> None:
        """Watch trained parameters that are whole in the forward of a module. owners: by name, the module that holds
        it, and its name there."""

        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            inputs = [x for x in tensors_in(args) if x.requires_grad]
            if not torch.is_grad_enabled() or not inputs:
                return None
            outputs = self._with_zeros(inputs, owners)
            return replace_tensors(args, dict(zip(map(id, inputs), outputs, strict=True)))

        if owners:
            # behind FSDP's own hook, which brings the whole parameters
            module.register_forward_pre_hook(hook)

    def watch_root(self, module: nn.Module, owners: Mapping[str, tuple[nn.Module, str]]) -> None:
        """Watch the trained parameters that are whole in the forward of the whole, whose losses are its outputs."""

        def hook(_: nn.Module, __: Any, output: dict[str, Tensor]) -> dict[str, Tensor] | None:
            if not torch.is_grad_enabled() or not output:
                return None
            losses = self._with_zeros(list(output.values()), owners)
            reached = reached_leaves(output.values())
            names = {name for key, name in self.present.items() if key in reached}
            self.unreached = set(self.present.values()) - names
            self.names |= names
            self.present = {}
            # copies: FSDP refuses views
            return {name: x.clone() for name, x in zip(output, losses, strict=True)}

        # before FSDP's own hook, which takes the whole parameters away
        module.register_forward_hook(hook, prepend=True)

    def _with_zeros(self, tensors: list[Tensor], owners: Mapping[str, tuple[nn.Module, str]]) -> tuple[Tensor, ...]:
        parameters = {name: owner.get_parameter(local) for name, (owner, local) in owners.items()}
        self.present |= {id(p): name for name, p in parameters.items()}
        return ZeroGradients.apply(
            lambda: [name in self.unreached for name in parameters], len(tensors), *tensors, *parameters.values()
        )

    def clear_unreached(self, parameters: Mapping[str, nn.Parameter], ranks: Ranks) -> None:
        """Take away the gradients of parameters that no rank's losses reached, and begin another step."""
        counts = ranks.sum([name in self.names for name in parameters])
        for parameter, count in zip(parameters.values(), counts, strict=True):
            if not count:
                parameter.grad = None
        self.names = set()


def sum_gradients(parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Add up the gradients of all ranks; parameters that no rank has one of are left without."""
    if ranks.size == 1:
        return
    counts = ranks.sum([p.grad is not None for p in parameters])
    reached = [p for p, count in zip(parameters, counts, strict=True) if count]
    for p in reached:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for bucket in _buckets([p.grad for p in reached if p.grad is not None]):
        flat = ranks.sum_tensor(torch.cat([x.reshape(-1) for x in bucket]))
        for x, part in zip(bucket, flat.split([x.numel() for x in bucket]), strict=True):
            x.copy_(part.view_as(x))


def clip_gradients(gradients: Sequence[Tensor], max_norm: float, add_squares: Callable[[Tensor], Tensor]) -> Tensor:
    """Scale gradients, of which this rank holds shards, down to a norm where theirs is larger; returns theirs [].

    add_squares: adds up the squares of the shards' norms. As torch.nn.utils.clip_grad_norm_ does.
    """
    norm = add_squares(get_total_norm(gradients).square()).sqrt()
    torch._foreach_mul_(list(gradients), (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype, as many as are sent at once."""
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        bucket: list[Tensor] = []
        for x in tensors:
            if x.dtype == dtype:
                bucket.append(x)
                if sum(one.numel() for one in bucket) >= BUCKET_SIZE:
                    yield bucket
                    bucket = []
        if bucket:
            yield bucket
