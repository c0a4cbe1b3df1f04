"""The op inside what training wraps around it: compiled graphs, checkpointing, sharding, tensors without memory."""

import os
import random
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from unimm.kernels import AttentionMask, KeyRange, attention, plan_attention, use_kernels
from unimm.kernels.attention.attention import _attention_via_op
from unimm.kernels.dispatch import constant_in_graphs

D, H, G = 16, 4, 2
op = partial(_attention_via_op, backend="sdpa")


class Layer(nn.Module):
    """A projection and attention, the least that has parameters."""

    def __init__(self, attend=attention):
        super().__init__()
        self.qkv = nn.Linear(D, (H + 2 * G) * 4)
        self.attend = attend

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        q, k, v = self.qkv(x).unflatten(1, (-1, 4)).split((H, G, G), 1)
        return x + self.attend(q, k, v, mask).flatten(1)


def layout(seed: int, rows: int | None = None) -> AttentionMask:
    """A few samples of text and images; the last one fills up to `rows`."""
    rng = random.Random(seed)
    kinds = ({}, {"full": True}, {"full": True, "visible": False})
    samples = [[KeyRange(rng.randint(3, 9), **kind) for kind in kinds] for _ in range(rng.randint(2, 5))]
    if rows:
        samples.append([KeyRange(rows - sum(b.length for sample in samples for b in sample))])
    return AttentionMask(samples)


def loss_and_gradients(layer: nn.Module, x: Tensor, mask: AttentionMask) -> tuple[Tensor, ...]:
    loss = layer(x, mask).square().mean()
    return loss, *torch.autograd.grad(loss, (x, *layer.parameters()))


@pytest.mark.parametrize("lengths", ["one length", "any length"])
@pytest.mark.filterwarnings("default")
def test_one_graph_for_all_layouts(lengths):
    layer = Layer().double()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for seed in range(5):
        mask = layout(seed, 200 if lengths == "one length" else None)
        x = torch.randn(mask.n_queries, D, dtype=torch.float64, requires_grad=True)
        torch._dynamo.maybe_mark_dynamic(x, 0)
        plan_attention(mask, x.view(-1, H, 4))
        expected = loss_and_gradients(layer, x, mask)
        torch.testing.assert_close(loss_and_gradients(compiled, x, mask), expected)
        still = x.detach()
        torch._dynamo.maybe_mark_dynamic(still, 0)
        with torch.no_grad():
            torch.testing.assert_close(compiled(still, mask), layer(still, mask))
    assert counter.frame_count == 2, "one graph with gradients, one without"


@pytest.mark.filterwarnings("default")
def test_a_graph_knows_its_backend():
    layer, mask = Layer().double(), layout(0)
    x = torch.randn(mask.n_queries, D, dtype=torch.float64)
    plan_attention(mask, x.view(-1, H, 4))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for kernels, graphs in (("sdpa", 1), ("reference", 2), ("sdpa", 2)):
        with use_kernels(kernels):
            torch.testing.assert_close(compiled(x, mask), layer(x, mask))
        assert counter.frame_count == graphs


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_inductor():
    layer = Layer()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for seed in range(2):
        mask = layout(seed)
        x = torch.randn(mask.n_queries, D, requires_grad=True)
        plan_attention(mask, x.view(-1, H, 4))
        torch.testing.assert_close(loss_and_gradients(compiled, x, mask), loss_and_gradients(layer, x, mask))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("from_ranges", [False, True])
def test_opcheck(from_ranges):
    mask = layout(0)
    if from_ranges:
        mask = AttentionMask.from_ranges(*mask.ranges[0])
    q, k, v = (torch.randn(mask.n_queries, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (H, G, G))
    rest = (mask.ranges, mask.table, [], [], "sdpa")
    opcheck(torch.ops.unimm.attention, (q, k, v, *rest))
    q, k, v = (t.detach() for t in (q, k, v))
    o, lse = torch.ops.unimm.attention(q, k, v, *rest)
    opcheck(torch.ops.unimm.attention_backward, (torch.randn_like(o), q, k, v, o, lse, *rest))


@pytest.mark.parametrize("keep", [False, True], ids=["all again", "attention kept"])
@pytest.mark.filterwarnings("default")
def test_checkpointing(keep, monkeypatch):
    home = import_module("unimm.kernels.attention.attention")
    forward, runs = home._forward_without_triton, []
    monkeypatch.setattr(home, "_forward_without_triton", lambda *args: runs.append(1) or forward(*args))
    layer, mask = Layer(op).double(), layout(0)
    x = torch.randn(mask.n_queries, D, dtype=torch.float64, requires_grad=True)
    expected = loss_and_gradients(layer, x, mask)
    runs.clear()
    kept = partial(create_selective_checkpoint_contexts, [torch.ops.unimm.attention.default])
    loss = checkpoint(layer, x, mask, use_reentrant=False, **({"context_fn": kept} if keep else {})).square().mean()
    found = torch.autograd.grad(loss, (x, *layer.parameters()))
    torch.testing.assert_close((loss, *found), expected)
    assert len(runs) == (1 if keep else 2)


def test_tensors_without_memory():
    blocks = [[KeyRange(5), KeyRange(4, full=True)], [KeyRange(7)]]
    sizes = ((16, H, 64), (16, G, 64), (16, G, 64))
    q, k, v = (torch.empty(size, device="meta") for size in sizes)
    assert attention(q, k, v, AttentionMask(blocks, device="meta")).shape == q.shape
    with FakeTensorMode():
        mask = AttentionMask(blocks, device="cuda")
        q, k, v = (torch.empty(size, device="cuda", dtype=torch.bfloat16) for size in sizes)
        for kernels in ("auto", "triton", "sdpa", "reference"):
            if kernels == "triton":
                pytest.importorskip("triton")
            with use_kernels(kernels):
                o = attention(q, k, v, mask)
            assert (o.shape, o.dtype, o.device.type) == (q.shape, q.dtype, "cuda")
        rest = (mask.ranges, mask.table, [], [], "triton")
        o, lse = torch.ops.unimm.attention(q, k, v, *rest)
        assert (lse.shape, lse.dtype) == ((H, 16), torch.float32)
        grads = torch.ops.unimm.attention_backward(o, q, k, v, o, lse, *rest)
        assert [g.shape for g in grads] == [torch.Size(size) for size in sizes]
        one = AttentionMask(blocks, query_lengths=[1, 1], device="cuda")
        assert attention(q[:2], k, v, one).shape == (2, H, 64)


def sharded(rank: int, store: str) -> None:
    """One of two processes: gradients of a sharded stack of layers equal those of the whole one."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    stack = nn.ModuleList(Layer(op) for _ in range(2))
    whole = nn.ModuleList(Layer(op) for _ in range(2))
    whole.load_state_dict(stack.state_dict())
    for layer in stack:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    batches = [(mask, torch.randn(mask.n_queries, D)) for mask in (layout(0), layout(1))]

    def loss(layers: nn.ModuleList, mask: AttentionMask, x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x, mask)
        return x.square().mean()

    loss(stack, *batches[rank]).backward()
    (sum(loss(whole, *batch) for batch in batches) / 2).backward()
    for ours, theirs in zip(stack.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)
    dist.barrier()
    dist.destroy_process_group()
    # without the interpreter's teardown, which now and then finds a thread of gloo still running and aborts
    os._exit(0)


def interpreted() -> None:
    """Triton's kernels, interpreted: eager and in one graph for two layouts; and a row of decoding."""
    layer = Layer()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for seed in range(2):
        mask = layout(seed, 100)
        x = torch.randn(100, D, requires_grad=True)
        with use_kernels("reference"):
            expected = loss_and_gradients(layer, x, mask)
        with use_kernels("triton"):
            plan_attention(mask, x.view(-1, H, 4))
            for way in (layer, compiled):
                torch.testing.assert_close(loss_and_gradients(way, x, mask), expected)
    assert counter.frame_count == 1
    past = [KeyRange(40, full=True), KeyRange(1)]
    mask = AttentionMask([past, past[1:]], query_lengths=[1, 1], key_starts=[3, 50])
    q, (k, v) = torch.randn(2, H, 16), torch.randn(2, 60, G, 16)
    with use_kernels("reference"):
        o = attention(q, k, v, mask)
    with use_kernels("triton"):
        torch.testing.assert_close(attention(q, k, v, mask), o)


def child(*words: str, **environment: str) -> subprocess.Popen[str]:
    """This file as a program of its own."""
    command = [sys.executable, str(Path(__file__)), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["interpreted", "sharded"])
def test_processes(what, tmp_path):
    if what == "interpreted":
        pytest.importorskip("triton")
        processes = [child(what, TRITON_INTERPRET="1")]
    else:
        processes = [child(what, rank, str(tmp_path / "store")) for rank in "01"]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


def test_constants_are_marked_as_torch_marks_them():
    """`constant_in_graphs` is torch's decorator without its import of torch._dynamo."""

    def ours(): ...

    def theirs(): ...

    constant_in_graphs(ours)
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}


if __name__ == "__main__":
    if sys.argv[1] == "sharded":
        sharded(int(sys.argv[2]), sys.argv[3])
    else:
        interpreted()
