"""Cases for attention's Triton kernels, forward and every gradient against float64. Run where Triton interprets: by
test_attention_triton.py, and by test_mutations.py on kernels with planted mistakes.

Ranges and schedule are built here from the dense mask, slowly, so that no mistake in mask.py can hide one in a kernel.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from helpers.triton_harness import in_child, mend_bfloat16, poisoned, red_zone, red_zone_intact
from torch import Tensor
from triton.runtime.errors import InterpreterError

from unimm.kernels.attention.attention_triton import launch_attention, launch_attention_backward
from unimm.kernels.attention.decode_triton import launch_decode
from unimm.kernels.attention.tile_configs import LoopConfig, TileConfig
from unimm.kernels.attention.tile_schedule import TileRuns

if not in_child():
    pytest.skip("Triton interprets only in a child: run test_attention_triton.py", allow_module_level=True)
mend_bfloat16()

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
# relative error allowed beyond twice the plain computation's: the rounding of one number in 16 bits; for float32 that
# of a few, since the two add in different orders
FLOOR = {FLOAT32: 5e-7, FLOAT16: 2**-12, BFLOAT16: 2**-9}
LSE = 1e-6  # relative beyond 1, absolute below; float32 whatever the inputs
LARGE = 1e4  # what no row may see, yet must be a number: 0 times infinity is none


def small(rows: int = 32, keys: int = 32, steps: tuple[int, int, int] = (16, 32, 16)) -> TileConfig:
    """A configuration of few operations a step; steps differ so that each kernel cuts tiles in its own way."""
    return TileConfig(rows, keys, *(LoopConfig(step, 4, 2) for step in steps))


SMALL = small()


@pytest.fixture(autouse=True)
def fixed() -> Iterator[None]:
    torch.manual_seed(0)
    # numpy warns where a GPU goes on: infinities that a mask then drops
    with poisoned(), np.errstate(all="ignore"):
        yield


# ------------------------------------------------------------------------------------------------- masks from the
# definition


def packed(samples: list[list[tuple[str, int]]]) -> Tensor:
    """Text (causal), image (full) and noised (full, invisible to others) segments, [N, N] bool."""
    spans = [(i, kind, n) for i, segments in enumerate(samples) for kind, n in segments]
    sample, kind, segment = (
        [x for j, span in enumerate(spans) for x in [(*span[:2], j)[at]] * span[2]] for at in range(3)
    )
    n = len(kind)
    dense = torch.zeros(n, n, dtype=torch.bool)
    for row in range(n):
        for key in range(n):
            own = segment[row] == segment[key]
            before = key <= row or (own and kind[key] != "text")
            dense[row, key] = sample[row] == sample[key] and before and (own or kind[key] != "noised")
    return dense


def random_samples(seed: int) -> list[list[tuple[str, int]]]:
    """Two to four samples of 100 to 250 rows together."""
    rng = np.random.default_rng(seed)
    cuts = (
        np.diff([0, *np.sort(rng.choice(np.arange(1, 100), 7, replace=False)), 100])
        * int(rng.integers(100, 250))
        // 100
    )
    segments = [(str(rng.choice(["text", "image", "noised"])), int(n)) for n in cuts if n]
    ends = sorted(rng.choice(np.arange(1, len(segments)), int(rng.integers(1, 4)), replace=False))
    return [segments[a:b] for a, b in zip([0, *ends], [*ends, len(segments)], strict=True)]


def ranges_of(dense: Tensor) -> Tensor:
    """Each key's ranges of rows, [R, 2, M] int32, read off a mask [N, M]."""
    edges = torch.nn.functional.pad(dense.T.int(), (1, 1)).diff(dim=1)
    starts, ends = ([torch.nonzero(key == sign).flatten().tolist() for key in edges] for sign in (1, -1))
    most = max(1, *map(len, starts))
    padded = [[list(zip(s, e, strict=True)) + [(0, 0)] * (most - len(s))] for s, e in zip(starts, ends, strict=True)]
    return torch.tensor(padded, dtype=torch.int32).reshape(-1, most, 2).permute(1, 2, 0).contiguous()


def runs_of(dense: Tensor, rows: int, keys: int) -> TileRuns:
    """The runs of full and of partial tiles of each block of rows, by looking at every tile."""
    found: dict[str, tuple[list[int], list[int]]] = {"full": ([0], []), "part": ([0], [])}
    for at in range(0, dense.shape[0], rows):
        tiles = [dense[at : at + rows, key : key + keys] for key in range(0, dense.shape[1], keys)]
        is_full = [bool(tile.all()) and tile.shape == (rows, keys) for tile in tiles]
        kinds = {"full": is_full, "part": [bool(t.any()) and not full for t, full in zip(tiles, is_full, strict=True)]}
        for kind, (ptr, flat) in found.items():
            edges = np.flatnonzero(np.diff([0, *kinds[kind], 0]))
            flat.extend(map(int, edges))
            ptr.append(len(flat) // 2)
    # a list is never empty, and what lies past its end is not read
    out = [red_zone(torch.tensor(x or [0, 0], dtype=torch.int32)) for pair in found.values() for x in pair]
    return TileRuns(*out)


# ------------------------------------------------------------------------------------------------------------- the
# definition


def plain(q: Tensor, k: Tensor, v: Tensor, dense: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """o and lse by the definition, in the dtype of q; differentiable where rows see nothing, too."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    seeing = dense.any(1)
    scores = torch.einsum("nhk, mhk -> hnm", q, k) * scale
    scores = scores.masked_fill(~(dense | ~seeing[:, None]), float("-inf"))
    lse = scores.logsumexp(-1).masked_fill(~seeing, float("-inf"))
    return torch.einsum("hnm, mhk -> nhk", scores.softmax(-1), v) * seeing[:, None, None].to(q.dtype), lse


def error(got: Tensor, expected: Tensor) -> float:
    """Relative, by norms; absolute where nothing is expected."""
    return float((got.double() - expected).norm() / (expected.norm() if expected.any() else 1))


@dataclass
class Case:
    """One call: a mask, sizes, a configuration, and how the tensors lie in memory."""

    dense: Tensor
    head_dim: int
    group: int = 1
    key_heads: int = 2
    dtype: torch.dtype = FLOAT32
    config: TileConfig = SMALL
    scale: float | None = None
    layout: Callable[[Tensor], Tensor] = Tensor.contiguous

    def draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (n, m), g, head = self.dense.shape, self.key_heads, self.head_dim
        shapes = (n, g * self.group, head), (m, g, head), (m, g, head), (n, g * self.group, head)
        q, k, v, do = (torch.randn(shape).to(self.dtype) for shape in shapes)
        unseen = ~self.dense.any(0)
        k[unseen], v[unseen] = LARGE, LARGE
        return tuple(red_zone(self.layout(x)) for x in (q, k, v, do))

    def check(self) -> None:
        """o, lse, dq, dk, dv: at most twice the error of the definition in the same dtype, plus FLOOR."""
        q, k, v, do = self.draw()
        ranges, c = red_zone(ranges_of(self.dense)), self.config
        by_row = runs_of(self.dense, c.rows, c.keys)
        by_key = runs_of(self.dense.T, c.keys, c.rows)
        o, lse = launch_attention(q, k, v, ranges, by_row, c, scale=self.scale)
        got = [o, *launch_attention_backward(do, q, k, v, o, lse, ranges, by_row, by_key, c, scale=self.scale)]
        exact, exact_lse = self.plainly(q, k, v, do, dtype=torch.float64)
        same_dtype, _ = self.plainly(q, k, v, do, dtype=self.dtype)
        for name, x, y, z in zip(("o", "dq", "dk", "dv"), got, exact, same_dtype, strict=True):
            bound = 2 * error(z, y) + FLOOR[self.dtype]
            assert error(x, y) <= bound, f"{name}: error {error(x, y):.2e}, at most {bound:.2e}"  # a NaN fails
            assert x.dtype == self.dtype and x.is_contiguous()
        assert torch.equal(lse.isinf(), exact_lse.isinf())
        off = (lse - exact_lse).abs() / exact_lse.abs().clamp(min=1)
        assert float(off[exact_lse.isfinite()].max()) <= LSE
        assert not o[~self.dense.any(1)].any() and not got[2][~self.dense.any(0)].any()
        assert all(map(red_zone_intact, (q, k, v, do)))

    def plainly(
        self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, *, dtype: torch.dtype
    ) -> tuple[list[Tensor], Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        o, lse = plain(*inputs, self.dense, self.scale or self.head_dim**-0.5)
        return [o.detach(), *torch.autograd.grad(o, inputs, do.to(dtype))], lse.detach()


def heads_first(x: Tensor) -> Tensor:
    """The same numbers stored as [H, N, K]."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def a_slice(x: Tensor) -> Tensor:
    """The same numbers stored as part of wider rows, as of a fused projection."""
    wide = torch.full((x.shape[0], x.shape[1] + 2, x.shape[2] + 8), float("nan"), dtype=x.dtype)
    wide[:, 1:-1, 8:] = x
    return wide[:, 1:-1, 8:]


# ------------------------------------------------------------------------------------------------------------ the
# tester


@triton.jit
def there_and_back(x_ptr, y_ptr, add: tl.constexpr):
    at = tl.arange(0, 256)
    x = tl.load(x_ptr + at).to(tl.bfloat16)
    tl.store(y_ptr + at, (x + x if add else x).to(tl.float32))


def test_the_mend_of_bfloat16():
    x = torch.cat([torch.randn(250), torch.tensor([0.0, -0.0, 3e38, 3.4e38, float("inf"), float("nan")])])
    y = torch.empty(256)
    there_and_back[(1,)](x, y, add=0)
    assert torch.equal(y.nan_to_num(7), x.bfloat16().float().nan_to_num(7))
    with pytest.raises(InterpreterError, match="cast to float32 first"):
        there_and_back[(1,)](x, y, add=1)


# --------------------------------------------------------------------------------------------------------------------
# cases


@pytest.mark.parametrize(
    ("seed", "dtype", "head_dim", "group", "layout"),
    [
        (0, FLOAT32, 64, 1, Tensor.contiguous),
        (1, BFLOAT16, 32, 2, heads_first),
        (2, FLOAT16, 16, 3, a_slice),
        (3, FLOAT32, 80, 3, a_slice),
        (4, BFLOAT16, 96, 1, a_slice),
        (5, BFLOAT16, 40, 2, Tensor.contiguous),
    ],
)
def test_packed_samples(seed, dtype, head_dim, group, layout):
    dense = packed(random_samples(seed))
    tiles = small(64, 32, (32, 16, 32)) if seed % 2 else small(32, 64, (64, 32, 16))
    Case(dense, head_dim, group, dtype=dtype, layout=layout, config=tiles).check()


def test_a_tile_as_on_a_gpu():
    dense = packed([[("text", 40), ("image", 90), ("noised", 70)], [("text", 60)]])
    config = TileConfig(128, 64, LoopConfig(64, 8, 3), LoopConfig(64, 8, 2), LoopConfig(64, 8, 2))
    Case(dense, 128, group=2, key_heads=1, dtype=BFLOAT16, config=config).check()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_rows_that_see_nothing(dtype):
    dense = packed([[("text", 100)]])
    dense[:5] = dense[33:98] = dense[:, 40:80] = False
    Case(dense, 32, dtype=dtype).check()


@pytest.mark.parametrize("steps", [(16, 16, 16), (32, 32, 32)])
def test_two_ranges_a_key(steps):
    # text and images after a sink that all rows see, within a window of 50 rows
    row, key = torch.arange(140)[:, None], torch.arange(140)
    dense = packed([[("text", 60), ("image", 30), ("text", 50)]])
    dense &= (row - key < 50) | (key < 4)
    dense[:, 70:80] &= (row < 85) | (row > 120)
    assert len(ranges_of(dense)) == 2
    Case(dense, 16, group=2, config=small(steps=steps)).check()


@pytest.mark.parametrize("layout", [Tensor.contiguous, heads_first])
def test_caches_longer_than_queries(layout):
    """Two samples whose last rows alone are queries, in a buffer with free rows between and after their keys."""
    dense = torch.zeros(75, 230, dtype=torch.bool)
    dense[:70, 10:110] = packed([[("text", 30), ("image", 70)]])[30:]
    dense[70:, 130:193] = packed([[("text", 63)]])[-5:]
    Case(dense, 32, group=2, layout=layout).check()


def test_more_queries_than_keys():
    dense = torch.ones(133, 40, dtype=torch.bool)
    dense[50:60, 33:] = False
    Case(dense, 16, scale=0.3).check()


def test_whole_tiles_only():
    Case(torch.ones(64, 96, dtype=torch.bool), 16, group=3, key_heads=1).check()


def test_scores_that_differ_by_much():
    """Earlier keys weigh nothing beside later ones: sums are rescaled step after step."""
    Case(packed([[("text", 100)]]), 16, key_heads=1, scale=2.0).check()


@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 40), (40, 0)])
def test_empty(n, m):
    case = Case(torch.zeros(n, m, dtype=torch.bool), 16)
    q, k, v, do = (torch.randn(r, 2, 16) for r in (n, m, m, n))
    ranges = torch.zeros(1, 2, m, dtype=torch.int32)
    by_row, by_key = runs_of(case.dense, 32, 32), runs_of(case.dense.T, 32, 32)
    o, lse = launch_attention(q, k, v, ranges, by_row, case.config)
    assert o.shape == q.shape and not o.any() and bool((lse == float("-inf")).all())
    grads = launch_attention_backward(do, q, k, v, o, lse, ranges, by_row, by_key, case.config)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape] and not any(g.any() for g in grads)


def test_a_gradient_expanded_from_one_number():
    dense = packed([[("text", 40)]])
    q, k, v, _ = Case(dense, 16).draw()
    runs = runs_of(dense, 32, 32), runs_of(dense.T, 32, 32)
    o, lse = launch_attention(q, k, v, ranges_of(dense), runs[0], SMALL)
    one = torch.ones(()).expand_as(o)
    got, same = (
        launch_attention_backward(x, q, k, v, o, lse, ranges_of(dense), *runs, SMALL) for x in (one, one.contiguous())
    )
    assert all(map(torch.equal, got, same))


def far_apart(x: Tensor, dim: int) -> Tensor:
    """The same numbers 2^29 apart along one axis: from index 4 on, an offset has more than 31 bits. Zeros take no
    memory."""
    step, n = 2**29, x.shape[dim]
    pages = torch.from_numpy(np.zeros(step * (n - 1) + x[0].numel() * len(x) // n, dtype=np.float16))
    inner = [x.shape[1 - dim], x.shape[2]]
    return pages.as_strided((n, *inner), (step, inner[1], 1)).movedim(0, dim).copy_(x)


@pytest.mark.parametrize("dim", [0, 1])
def test_strides_beyond_31_bits(dim):
    dense = packed([[("text", 6)]])
    runs = runs_of(dense, 32, 32), runs_of(dense.T, 32, 32)
    near = [torch.randn(6, 6, 16, dtype=FLOAT16) for _ in range(4)]
    outs = []
    for q, k, v, do in (near, [far_apart(x, dim) for x in near]):
        o, lse = launch_attention(q, k, v, ranges_of(dense), runs[0], SMALL)
        outs.append([o, *launch_attention_backward(do, q, k, v, o, lse, ranges_of(dense), *runs, SMALL)])
    assert all(map(torch.equal, *outs))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "group", "layout"),
    [(FLOAT32, 64, 1, Tensor.contiguous), (BFLOAT16, 80, 7, a_slice), (FLOAT16, 32, 3, heads_first)],
)
def test_decode(dtype, head_dim, group, layout):
    g, lengths, starts = 2, [0, 1, 70, 200], [3, 5, 20, 100]
    q = red_zone(layout(torch.randn(4, g * group, head_dim).to(dtype)))
    k, v = (red_zone(layout(torch.randn(300, g, head_dim).to(dtype))) for _ in range(2))
    at, n = (torch.tensor(x, dtype=torch.int32) for x in (starts, lengths))
    got = launch_decode(q, k, v, at, n)
    key = torch.arange(300)
    dense = (key >= at[:, None]) & (key < (at + n)[:, None])
    exact, same = (plain(*(x.to(d) for x in (q, k, v)), dense, head_dim**-0.5)[0] for d in (torch.float64, dtype))
    assert error(got, exact) <= 2 * error(same, exact) + FLOOR[dtype]
    assert not got[0].any() and got.is_contiguous()
