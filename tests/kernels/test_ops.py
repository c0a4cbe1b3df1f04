"""The ops beside attention: references against float64, gradients, contracts; kernels interpreted and compiled
ahead."""

import pytest
import torch
import torch.nn.functional as F
from helpers.triton_harness import compile_ahead, run_cases
from ops_cases import DTYPES, EPS, FLOOR, each_case, errors, results, truths
from torch import nn

from unimm.kernels import use_kernels
from unimm.kernels.adaln import adaln_modulate
from unimm.kernels.cfg_combine import cfg_combine
from unimm.kernels.cross_entropy import (
    _linear_cross_entropy,
    _linear_cross_entropy_backward,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from unimm.kernels.dispatch import HAS_TRITON
from unimm.kernels.qk_norm_rope import qk_norm_rope
from unimm.kernels.rms_norm import rms_norm
from unimm.kernels.swiglu import swiglu
from unimm.kernels.vq_lookup import nearest_code
from unimm.nn.layers import RMSNorm
from unimm.nn.rope import apply_rope, rope_cos_sin

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")

# ---- the references


@each_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_references_are_right(case, dtype):
    inputs = case.inputs(dtype)
    # eager rounds after every operation: several times, in a low dtype
    assert all(error <= 3 * FLOOR[dtype] for error in errors(results(case.op, inputs), truths(case, inputs)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_references_are_the_layers(dtype):
    norms = [RMSNorm(8, EPS).to(dtype) for _ in range(2)]
    for norm in norms:
        nn.init.uniform_(norm.weight)
    q, k = torch.randn(9, 4, 8).to(dtype), torch.randn(9, 2, 8).to(dtype)
    cos_sin = rope_cos_sin(torch.arange(9), 8, 1e4, dtype)
    assert rms_norm(q, norms[0].weight, EPS).equal(norms[0](q))
    found = qk_norm_rope(q, k, norms[0].weight, norms[1].weight, cos_sin, EPS)
    for x, norm, ours in zip((q, k), norms, found, strict=True):
        assert ours.equal(apply_rope(norm(x), cos_sin))


def test_nearest_code_is_the_originals():
    z, codebook = torch.randn(300, 8), torch.randn(16384, 8)
    a, b = F.normalize(z, dim=1), F.normalize(codebook, dim=1)
    distance = a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.t()
    assert nearest_code(z, codebook).equal(distance.argmin(1))
    assert nearest_code(codebook[:7], codebook[:7].repeat(3, 1)).equal(torch.arange(7))


# ---- cross entropy


def loss_inputs(dtype, n=37, d=16, v=101):
    x, weight = (torch.randn(s).to(dtype).requires_grad_() for s in ((n, d), (v, d)))
    labels = torch.randint(v, (n,))
    labels[::5] = -100
    return x, weight, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [None, 5, 37])
def test_cross_entropy(dtype, chunk):
    *inputs, labels = loss_inputs(dtype)
    truth = results(
        lambda *i: linear_cross_entropy_reference64(*i, labels), [t.detach().double().requires_grad_() for t in inputs]
    )
    found = results(lambda *i: linear_cross_entropy(*i, labels, chunk_rows=chunk), inputs)
    reference = results(lambda *i: linear_cross_entropy_reference(*i, labels), inputs)
    assert found[0].dtype == torch.float32 and not found[0][labels == -100].any()
    for ours, theirs in zip(errors(found, truth), errors(reference, truth), strict=True):
        assert ours <= (1e-5 if dtype == torch.float32 else 2 * theirs)


def linear_cross_entropy_reference64(x, weight, labels):
    """Logits in float64: the plain way casts them to float32."""
    return F.cross_entropy(x @ weight.t(), labels, reduction="none")


def test_cross_entropy_of_large_logits_and_of_nothing():
    x, weight, labels = loss_inputs(torch.float32)
    torch.testing.assert_close(
        linear_cross_entropy(x * 100, weight, labels), linear_cross_entropy_reference(x * 100, weight, labels)
    )
    x, weight, labels = loss_inputs(torch.float32, n=0)
    loss = linear_cross_entropy(x, weight, labels)
    loss.sum().backward()
    assert loss.shape == (0,) and x.grad.shape == x.shape and not weight.grad.any()


def test_cross_entropy_holds_no_logits(monkeypatch):
    """The largest tensor that any operation makes, forward and backward, is a chunk of rows."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            made = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
            largest = max([largest, *(t.numel() for t in made)])
            return out

    x, weight, labels = loss_inputs(torch.float32, n=200, d=4, v=101)
    with Watch():
        linear_cross_entropy(x, weight, labels, chunk_rows=10).sum().backward()
    assert largest <= 10 * 101


def test_cross_entropy_only_makes_the_gradients_asked_for():
    x, weight, labels = loss_inputs(torch.float32)
    linear_cross_entropy(x.detach(), weight, labels).sum().backward()
    linear_cross_entropy(x, weight.detach(), labels).sum().backward()
    expected = torch.autograd.grad(linear_cross_entropy_reference(x, weight, labels).sum(), (x, weight))
    torch.testing.assert_close((x.grad, weight.grad), expected)


def test_autocast_reaches_our_matrix_products():
    x, weight = torch.randn(6, 8), torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(x, weight, torch.arange(6))
        torch.testing.assert_close(found, linear_cross_entropy_reference(x, weight, torch.arange(6)))
    assert not found.equal(linear_cross_entropy(x, weight, torch.arange(6)))


# ---- contracts


def contracts():
    x, weight, labels = loss_inputs(torch.float32)
    cut = x.detach(), weight.detach()
    return {
        _linear_cross_entropy: (x, weight, labels, -100, 8),
        _linear_cross_entropy_backward: (torch.randn(37), *cut, labels, torch.randn(37), -100, 8, [True, True]),
    }


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own
@pytest.mark.parametrize(("op", "inputs"), contracts().items(), ids=[op._qualname for op in contracts()])
def test_opcheck(op, inputs):
    torch.library.opcheck(op, inputs)


def test_one_graph():
    def step(x, weight, head, labels):
        return linear_cross_entropy(x @ weight, head, labels)

    x, head, labels = loss_inputs(torch.float32)
    inputs = [x, torch.randn(16, 16, requires_grad=True), head, labels]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(run(*inputs).sum(), inputs[:3]) for run in (compiled, step))
    torch.testing.assert_close(found, expected)


def test_bad_shapes_say_what_is_expected():
    x = torch.zeros(4, 8)
    with pytest.raises(ValueError, match=r"rms_norm got x, weight \[\(4, 8\), \(7,\)\]: expected \[..., D\], \[D\]"):
        rms_norm(x, torch.zeros(7), EPS)
    with pytest.raises(ValueError, match=r"adaln_modulate got .* expected \[B, L, D\], \[B, D\], \[B, D\]"):
        adaln_modulate(x, x, x, EPS)
    with pytest.raises(ValueError, match="expected one shape and dtype"):
        swiglu(x, x.double())
    with pytest.raises(ValueError, match=r"expected \[N, H, K\], \[N, G, K\], \[K\], \[K\]"):
        qk_norm_rope(x[:, None], x[:, None], *torch.zeros(2, 2, 8), torch.zeros(2, 4, 4), EPS)
    with pytest.raises(ValueError, match="an even K"):
        qk_norm_rope(x[:, None, :7], x[:, None, :7], *torch.zeros(2, 7), torch.zeros(2, 4, 3), EPS)
    with pytest.raises(ValueError, match="V at least 1"):
        nearest_code(x, x[:0])
    with pytest.raises(ValueError, match="unknown renorm 'tokens'"):
        cfg_combine(x, x, text_scale=1.0, image_scale=1.0, renorm="tokens", renorm_min=0.0)
    with pytest.raises(ValueError, match="expected one dtype; cast one"):
        linear_cross_entropy(x, x.double(), torch.zeros(4).long())


def test_triton_asked_for_and_impossible_is_an_error():
    with use_kernels("triton"), pytest.raises(ValueError, match="rms_norm: backend 'triton'"):
        rms_norm(torch.zeros(4, 8), torch.ones(8), EPS)


# ---- the kernels


@needs_triton
def test_kernels_in_the_interpreter():
    done = run_cases("kernels/ops_cases.py")
    assert done.returncode == 0, done.stdout + done.stderr


def programs():
    """Every kernel at the sizes of a released model: (kernel, constants, warps)."""
    from unimm.kernels import (
        cfg_combine_triton,
        qk_norm_rope_triton,
        rms_norm_triton,
        swiglu_triton,
        vq_lookup_triton,
    )

    for d in (1536, 3584, 8192):
        rows, columns, warps = rms_norm_triton.row_tile_shape(d)
        sizes = dict(D=d, ROWS=rows, COLUMNS=columns)
        for kernel in ("rms_norm", "rms_norm_backward", "modulate", "modulate_backward"):
            yield getattr(rms_norm_triton, f"{kernel}_kernel"), sizes, warps
    for half in (64, 36):
        rows, columns = qk_norm_rope_triton.head_tile_shape(half)
        sizes = dict(HEADS=28, HALF=half, ROWS=rows, COLUMNS=columns)
        for norm_rope in (qk_norm_rope_triton.norm_rope_kernel, qk_norm_rope_triton.norm_rope_backward_kernel):
            yield norm_rope, sizes, 4
    for kernel in (swiglu_triton.swiglu_kernel, swiglu_triton.swiglu_backward_kernel):
        yield kernel, dict(F=18944, COLUMNS=swiglu_triton.MAX_COLUMNS), 4
    yield (
        vq_lookup_triton.nearest_code_kernel,
        dict(D=8, DIMS=16, ROWS=vq_lookup_triton.ROWS, CODES=vq_lookup_triton.CODES),
        4,
    )
    block = dict(HAS_NO_IMAGE=1, BLOCK=cfg_combine_triton.BLOCK)
    yield cfg_combine_triton.sum_squares_kernel, block, 4
    yield cfg_combine_triton.renormalize_kernel, block | dict(SUMS=128), 4
    for after in (0, 1):
        tokens = dict(HAS_NO_IMAGE=1, AFTER_TEXT=after, C=64, ROWS=cfg_combine_triton.ENTRIES // 64, COLUMNS=64)
        yield cfg_combine_triton.renormalize_tokens_kernel, tokens, 4


FLOATS = ("eps", "text_scale", "image_scale", "renorm_min")
WIDE = ("sums_ptr", "dweight_ptr", "dscale_ptr", "dshift_ptr", "score_ptr", "full_ptr", "no_image_ptr", "no_text_ptr")


def type_of(name, kernel):
    """As a launch finds it: bfloat16 tensors, but float32 where a kernel sums or compares."""
    if name in FLOATS:
        return "fp32"
    if not name.endswith("_ptr"):
        return "i32"
    if name == "code_ptr":
        return "*i32"
    return (
        "*fp32"
        if name in WIDE or kernel in ("nearest_code_kernel", "renormalize_kernel", "renormalize_tokens_kernel")
        else "*bf16"
    )


# bytes: triton 3.6 spills these where 3.9 spills none, in heads of 72, which no release has
SPILLS = {("norm_rope_kernel", "sm_90", 36): 16}


@needs_triton
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_kernels_compile_without_spills(target):
    for kernel, constants, warps in programs():
        types = {name: type_of(name, kernel.__name__) for name in kernel.arg_names}
        strides = [name for name in kernel.arg_names if name.endswith(("_row", "_head"))]
        report = compile_ahead(kernel, target, types, constants, warps=warps, stages=3, aligned=strides)
        allowed = SPILLS.get((kernel.__name__, target, constants.get("HALF")), 0)
        assert not [one for one in report.faults() if "spilled" not in one or report.spills > allowed], (
            report,
            constants,
        )
