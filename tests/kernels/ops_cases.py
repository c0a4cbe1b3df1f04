"""Cases of the ops: the function, and the truth in float64. Run as tests in a child that interprets Triton
(test_ops.py)."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.triton_harness import in_child, mend_bfloat16, poisoned, red_zone
from torch import Tensor

from unimm.kernels import use_kernels
from unimm.kernels.adaln import _adaln_modulate, _adaln_modulate_backward, adaln_modulate
from unimm.kernels.cfg_combine import RENORM_TYPES, _cfg_combine, cfg_combine
from unimm.kernels.qk_norm_rope import _norm_rope, _norm_rope_backward, qk_norm_rope
from unimm.kernels.rms_norm import _rms_norm, _rms_norm_backward, rms_norm
from unimm.kernels.swiglu import _swiglu, _swiglu_backward, swiglu
from unimm.kernels.vq_lookup import _nearest_code, nearest_code

EPS = 1e-6
FLOOR = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # an error below this is none
DTYPES = tuple(FLOOR)


@dataclass(frozen=True)
class Case:
    """An op on inputs of some shapes: `op` and `truth` take all inputs, gradients are those of the first `grads`."""

    name: str
    op: Callable[..., Tensor]
    truth: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    grads: int

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """Numbers whose rows are not dense: every second row of something twice as high, amid NaN."""
        made = [red_zone(torch.randn(2 * s[0], *s[1:]).to(dtype)[::2]) for s in self.shapes]
        return [t.requires_grad_(i < self.grads) for i, t in enumerate(made)]


def unit64(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def modulate64(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return unit64(centred) * (1 + scale[:, None]) + shift[:, None]


def rotated64(x: Tensor, weight: Tensor, cos_sin: Tensor) -> Tensor:
    """As a product of complex numbers."""
    a, b = (unit64(x) * weight).chunk(2, -1)
    z = torch.complex(a, b) * torch.complex(*cos_sin)[:, None]
    return torch.cat((z.real, z.imag), -1)


def rope_op(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos_sin: Tensor) -> Tensor:
    """q and k one after the other, as one tensor of heads."""
    return torch.cat(qk_norm_rope(q, k, q_weight, k_weight, cos_sin, EPS), 1)


def rope64(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos_sin: Tensor) -> Tensor:
    return torch.cat([rotated64(x, w, cos_sin) for x, w in ((q, q_weight), (k, k_weight))], 1)


def rope_case(n: int, h: int, g: int, k: int) -> Case:
    return Case(f"rope-{n}-{h}-{g}-{k}", rope_op, rope64, ((n, h, k), (n, g, k), (k,), (k,), (2, n, k // 2)), 4)


def norm_case(*shape: int) -> Case:
    return Case(f"norm-{shape}", partial(rms_norm, eps=EPS), lambda x, w: unit64(x) * w, (shape, shape[-1:]), 2)


def modulate_case(b: int, n: int, d: int) -> Case:
    return Case(f"modulate-{b}-{n}-{d}", partial(adaln_modulate, eps=EPS), modulate64, ((b, n, d), (b, d), (b, d)), 3)


def swiglu_case(*shape: int) -> Case:
    return Case(f"swiglu-{shape}", swiglu, lambda gate, up: F.silu(gate) * up, (shape, shape), 2)


def halves_case(n: int, f: int) -> Case:
    """Both halves in one tensor."""
    return Case(
        f"halves-{n}-{f}", lambda x: swiglu(*x.chunk(2, -1)), lambda x: F.silu(x[:, :f]) * x[:, f:], ((n, 2 * f),), 1
    )


CASES = [
    *(norm_case(*s) for s in ((1, 3), (7, 33), (2, 19, 128), (300, 48), (0, 8))),
    *(modulate_case(*s) for s in ((1, 1, 16), (3, 21, 40), (2, 64, 128), (2, 0, 8))),
    *(swiglu_case(*s) for s in ((1, 1), (5, 100), (2, 3, 4100), (0, 8))),
    halves_case(9, 70),
    *(rope_case(*s) for s in ((1, 1, 1, 2), (13, 3, 1, 8), (13, 4, 2, 24), (40, 6, 2, 64), (0, 2, 1, 8))),
]
each_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def results(op: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of the inputs that take one, under a fixed upstream gradient."""
    out = op(*inputs)
    # numbers that every dtype holds
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.dtype)
    return [out, *torch.autograd.grad(out, [t for t in inputs if t.requires_grad], up)]


def errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    """Relative to the truth's length; NaN stays NaN."""
    return [((a.double() - b).norm() / (b.norm() + 1e-12)).item() for a, b in zip(found, truth, strict=True)]


def truths(case: Case, inputs: list[Tensor]) -> list[Tensor]:
    return results(case.truth, [t.detach().double().requires_grad_(t.requires_grad) for t in inputs])


if in_child():
    mend_bfloat16()

    @pytest.fixture(autouse=True)
    def quiet():
        torch.manual_seed(0)
        torch.set_num_threads(1)
        with poisoned():
            yield

    @each_case
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_kernels_err_no_more_than_the_reference(case, dtype):
        inputs = case.inputs(dtype)
        truth = truths(case, inputs)
        with use_kernels("triton"):
            found = results(case.op, inputs)
        with use_kernels("reference"):
            reference = results(case.op, inputs)
        assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in reference]
        for ours, theirs in zip(errors(found, truth), errors(reference, truth), strict=True):
            # a few numbers may be exact by chance: no result is better than one rounding
            assert ours <= max(2 * theirs, torch.finfo(dtype).eps / 2, FLOOR[torch.float32])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_norm_rounds_as_the_module_does(dtype):
        x, weight = torch.randn(50, 64).to(dtype), torch.rand(64).to(dtype)
        with use_kernels("triton"):
            found = rms_norm(x, weight, EPS)
        with use_kernels("reference"):
            expected = rms_norm(x, weight, EPS)
        # bit for bit, but where the sum's order falls on the other side of a rounding
        assert (found != expected).double().mean() < 0.01

    def test_norm_promotes_as_the_module_does():
        x, weight = torch.randn(5, 64).half(), torch.rand(64)
        with use_kernels("triton"):
            assert rms_norm(x, weight, EPS).dtype == torch.float32

    @pytest.mark.parametrize(("n", "v", "d"), [(70, 1000, 8), (1, 1, 8), (130, 64, 5), (3, 700, 32), (0, 9, 8)])
    def test_nearest_code_is_nearest(n, v, d):
        z, codebook = torch.randn(n, 2 * d)[:, :d], torch.randn(v, d)
        with use_kernels("triton"):
            found = nearest_code(z, codebook)
        scores = F.normalize(z.double(), dim=1) @ F.normalize(codebook.double(), dim=1).t()
        assert found.shape == (n,) and found.dtype == torch.int64
        if n:
            best = scores.amax(1)
            assert (best - scores.gather(1, found[:, None])[:, 0]).max() < 1e-6

    def test_of_equal_codes_the_lowest():
        # signs over 2: unit rows whose products are exact, so that equal codes score the same in any order of summation
        signs = torch.tensor(list(itertools.product((-0.5, 0.5), repeat=4)))
        padding = torch.zeros(len(signs), 4)
        rows = torch.cat([torch.cat((signs, padding), 1), torch.cat((padding, signs), 1), torch.eye(8)])
        codebook = rows.repeat(20, 1)
        with use_kernels("triton"):
            found = nearest_code(rows * 4, codebook)
        assert found.equal(torch.arange(len(rows)))

    @pytest.mark.parametrize("renorm", RENORM_TYPES)
    @pytest.mark.parametrize(
        ("size", "scale", "least"), [((3, 5), 4.0, 0.0), ((70, 64), 4.0, 0.9), ((33, 100), 0.5, 0.0)]
    )
    def test_guidance(renorm, size, scale, least):
        velocities = [torch.randn(size) for _ in range(3)]
        for held in (velocities, velocities[:2]):
            options = dict(text_scale=scale, image_scale=1.5, renorm=renorm, renorm_min=least)
            with use_kernels("triton"):
                found = cfg_combine(*held, **options)
            with use_kernels("reference"):
                reference, truth = cfg_combine(*held, **options), cfg_combine(*(t.double() for t in held), **options)
            ours, theirs = errors([found, reference], [truth, truth])
            assert ours <= 2 * theirs + FLOOR[torch.float32]

    def opchecks():
        x, w = torch.randn(6, 8, requires_grad=True), torch.rand(8, requires_grad=True)
        y, s = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 8, requires_grad=True)
        heads, cos_sin = torch.randn(3, 2, 8, requires_grad=True), torch.randn(2, 3, 4)
        cut = [t.detach() for t in (x, w, y, s, heads)]
        return {
            _rms_norm: (x, w, EPS),
            _rms_norm_backward: (cut[0], cut[0], cut[1], EPS),
            _adaln_modulate: (y, s, s, EPS),
            _adaln_modulate_backward: (cut[2], cut[2], cut[3], EPS),
            _swiglu: (x, torch.randn(6, 8, requires_grad=True)),
            _swiglu_backward: (cut[0],) * 3,
            _norm_rope: (heads, w, cos_sin, EPS),
            _norm_rope_backward: (cut[4], cut[4], cut[1], cos_sin, EPS),
            _nearest_code: (cut[0], cut[0]),
            _cfg_combine: (cut[0], cut[0] * 2, None, 4.0, 1.5, "global", 0.0),
        }

    @pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own
    @pytest.mark.parametrize(("op", "inputs"), opchecks().items(), ids=[str(op._qualname) for op in opchecks()])
    def test_opcheck(op, inputs):
        torch.library.opcheck(op, inputs)

    @pytest.mark.filterwarnings("ignore")
    def test_one_graph_whatever_the_rows():
        graphs = []

        def count(graph, _):
            graphs.append(graph)
            return graph

        def block(q, k, w, cos_sin):
            q, k = qk_norm_rope(q, k, w, w, cos_sin, EPS)
            return swiglu(rms_norm(q, w, EPS), q)

        compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=count)
        w = torch.rand(8)
        for n in (5, 6, 11):
            inputs = torch.randn(n, 2, 8), torch.randn(n, 1, 8), w, torch.randn(2, n, 4)
            with use_kernels("triton"):
                torch.testing.assert_close(compiled(*inputs), block(*inputs))
        assert len(graphs) == 1
