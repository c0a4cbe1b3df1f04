"""A model whose weights lie in shards on the ranks (FSDP2): gathered a block at a time, gradients reduced a block at a
time. Each rank updates and averages its own shards."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from unimm.distributed.gradients import ReachedParameters, replace_tensors, require_input_gradient, tensors_in
from unimm.distributed.ranks import Ranks

# as it is called from torch 2.14 on, or before
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# the last dimension of a mesh
SHARD_DIM = "shard"


def build_mesh(ranks: Ranks, *, shard: int, replicate: int) -> DeviceMesh:
    """`replicate` groups of ranks, in each of which the weights lie in `shard` shards."""
    if replicate == 1:
        return init_device_mesh(ranks.device.type, (shard,), mesh_dim_names=(SHARD_DIM,))
    return init_device_mesh(ranks.device.type, (replicate, shard), mesh_dim_names=("replicate", SHARD_DIM))


def mixed_precision(param_dtype: torch.dtype | None, reduce_dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Weights are gathered in one type (None: their own), gradients are added up in another."""
    # tensors keep their types: autocast decides what is computed in which
    return MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)


class ShardedModel:
    """A module in shards. Its forward, and nothing else, finds whole weights, but inside of `whole`."""

    def __init__(
        self,
        root: nn.Module,
        ranks: Ranks,
        mesh: DeviceMesh,
        *,
        blocks: Sequence[nn.Module],
        ahead_of_blocks: Sequence[nn.Module] = (),
        kept_whole: Collection[nn.Parameter] = (),
        precision: MixedPrecisionPolicy,
        cpu_offload: bool = False,
    ) -> None:
        """blocks: modules gathered one after the other, which every forward of the root runs, on any batch.
        ahead_of_blocks: parts of them that run before they do. kept_whole: parameters, not trained, that every rank
        holds."""
        self.root = root
        self.ranks = ranks
        self.mesh = mesh
        self.reached = ReachedParameters()
        self.units: list[FSDPModule] = []
        self.trained = {name: p for name, p in root.named_parameters() if p.requires_grad}
        units = [*ahead_of_blocks, *blocks, root]
        owners = [self._owners(unit, units) for unit in units]
        self.reached.watch_root(root, owners[-1])
        policy = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
        for unit in units:
            fully_shard(
                unit,
                mesh=mesh,
                reshard_after_forward=unit is not root,
                mp_policy=precision,
                offload_policy=policy,
                ignored_params=set(kept_whole),
            )
            sharded = cast("FSDPModule", unit)
            # losses are divided by their counts over all ranks, so that gradients add up; in sums, which gloo has, too
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
            self.units.append(sharded)
        for p in kept_whole:
            p.data = p.data.to(ranks.device)
        for unit, own in zip(units[:-1], owners[:-1], strict=True):
            # whether gradients flow through a frozen block must not depend on what a batch holds
            if own or (owners[-1] and unit in blocks):
                unit.register_forward_pre_hook(require_input_gradient, prepend=True)
            self.reached.watch_part(unit, own)
            unit.register_forward_hook(_copy_views, prepend=True)
        if cpu_offload:
            for one in self.units:  # FSDP pins memory when it first gathers, and the shards move there
                one.unshard()
                one.reshard()
        self.trained = {name: p for name, p in root.named_parameters() if p.requires_grad}

    def _owners(self, unit: nn.Module, units: Sequence[nn.Module]) -> dict[str, tuple[nn.Module, str]]:
        """The trained parameters of a unit: which module holds each, and what it is called there."""
        names = {id(p): name for name, p in self.trained.items()}
        own = {local: p for local, p in own_parameters(unit, units).items() if p.requires_grad}
        return {names[id(p)]: _owner(unit, local) for local, p in own.items()}

    def sum_over_shards(self, x: Tensor) -> Tensor:
        """The sum of a tensor over the ranks that share the weights, in place."""
        dist.all_reduce(x, group=self.mesh.get_group(SHARD_DIM))
        return x

    def finish_gradients(self) -> None:
        """Take away the zero gradients of what no batch of a step reached."""
        self.reached.clear_unreached(self.trained, self.ranks)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Every rank holds all weights inside of the body, in the type that they are gathered in, which must not train.

        The ranks need not do the same in it; they wait for each other at its end.
        """
        modules = [cast("nn.Module", unit) for unit in self.units]
        for unit in self.units:
            unit.unshard()
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(_without_hooks(module))
            yield
        for unit in self.units:
            unit.reshard()
        self.ranks.barrier()


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Leave out a module's forward hooks, in which FSDP counts on all ranks doing the same."""
    before = module._forward_pre_hooks
    after = module._forward_hooks
    module._forward_pre_hooks = OrderedDict()
    module._forward_hooks = OrderedDict()
    try:
        yield
    finally:
        module._forward_pre_hooks = before
        module._forward_hooks = after


def own_parameters(module: nn.Module, units: Collection[nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters of a module but for those of other units inside of it, by their names in it."""
    inner = {id(p) for unit in units if unit is not module and _contains(module, unit) for p in unit.parameters()}
    return {name: p for name, p in module.named_parameters() if id(p) not in inner}


def _contains(module: nn.Module, other: nn.Module) -> bool:
    return any(one is other for one in module.modules())


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, local = name.rpartition(".")
    return module.get_submodule(path), local


def _copy_views(module: nn.Module, args: object, output: object) -> object:
    """A forward hook that gives copies for outputs that are views, which FSDP warns of."""
    views = [x for x in tensors_in(output) if x._is_view() and x.requires_grad]
    return replace_tensors(output, {id(x): x.clone() for x in views}) if views else None


def local_tensor(x: Tensor) -> Tensor:
    """What this rank holds of a tensor: its shard, or all of it."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole_tensor(x: Tensor) -> Tensor:
    """A tensor gathered from the ranks, which all must ask for it, or as it is."""
    if not isinstance(x, DTensor):
        return x
    mesh = x.device_mesh
    local = x.to_local().to(mesh.device_type)
    n = mesh.size(mesh.ndim - 1)
    # every rank but the last ones has as many rows
    rows = -(-x.shape[0] // n)
    padded = local.new_zeros(rows, *x.shape[1:])
    padded[: len(local)] = local
    whole = local.new_empty(n * rows, *x.shape[1:])
    all_gather(whole, padded, group=mesh.get_group(SHARD_DIM))
    return whole[: x.shape[0]]


def shard_like(x: Tensor, target: Tensor) -> Tensor:
    """What this rank holds of a whole tensor that lies in shards as another does."""
    if not isinstance(target, DTensor):
        return x
    # no rank sends anything: all have the whole
    return distribute_tensor(x, target.device_mesh, target.placements, src_data_rank=None).to_local()


def with_local(x: Tensor, local: Tensor, *, shape: tuple[int, ...] | None = None) -> Tensor:
    """A tensor whose rows lie in shards as another's do, of which this rank holds `local`. shape: unless the other's."""
    if not isinstance(x, DTensor):
        return local
    size = torch.Size(x.shape if shape is None else shape)
    meta = TensorMeta(size, torch.empty(size, device="meta").stride(), local.dtype)
    # DTensor.from_local copies to the mesh's device what is offloaded to the CPU, and what is read into the copy is lost
    return DTensor(local, DTensorSpec(x.device_mesh, x.placements, meta), requires_grad=False)


def copy_to_cpu(x: Tensor) -> Tensor:
    """A copy, in the CPU's memory, of a tensor or of what this rank holds of it."""
    return with_local(x, local_tensor(x.detach()).to("cpu", copy=True))
