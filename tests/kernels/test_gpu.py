"""On a CUDA device: the same images, answers and losses as on the CPU, to rounding."""

import numpy as np
import pytest
import torch
from helpers.toys import picture, toy

from unimm import Guidance
from unimm.kernels import AttentionMask, KeyRange, attention, use_kernels
from unimm.sequence.packing import pack_sequences

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_verbs_give_the_same():
    cpu, gpu = toy(0), toy(0).to("cuda")
    options = dict(images=[None, picture()], seed=[1, 2], guidance=Guidance(interval=(0.0, 1.0)))
    ours, theirs = (model.generate(["a b", "c"], **options).images for model in (gpu, cpu))
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= 2
    assert gpu.understand(picture(), "what") == cpu.understand(picture(), "what")


def test_training_gives_the_same():
    cpu, gpu = toy(0), toy(0).to("cuda")
    items = [
        cpu.processor.answer_part([1, 2, 3]),
        cpu.processor.latent_part(torch.randn(3, 4, 6), timestep=0.4, noised=True),
    ]
    batch, noise = pack_sequences([items]), torch.randn(6, cpu.config.latent_dim)
    expected, found = cpu(batch, noise), gpu(batch.to("cuda"), noise.to("cuda"))
    torch.testing.assert_close(found.ce.cpu(), expected.ce, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.mse.cpu(), expected.mse, rtol=1e-3, atol=1e-3)


def test_bfloat16_draws():
    model = toy(0).to("cuda", torch.bfloat16)
    model.vae.float()
    assert model.generate("a b", images=picture(), steps=2).image.size[0] % 8 == 0


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("width", [64, 80, 128])
def test_attention_kernels(dtype, allowed, width):
    long = [KeyRange(70), KeyRange(300, full=True, visible=False), KeyRange(300, full=True), KeyRange(40)]
    mask = AttentionMask([long, [KeyRange(129, full=True), KeyRange(200)]], device="cuda")
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(mask.n_queries, heads, width, generator=generator).to("cuda", dtype) for heads in (6, 2, 2)]
    grad = torch.randn(inputs[0].shape, generator=generator).to("cuda")

    def run(name, to):
        leaves = [x.to(to).requires_grad_() for x in inputs]
        with use_kernels(name):
            out = attention(*leaves, mask)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(to))]

    for found, expected in zip(run("triton", dtype), run("reference", torch.float64), strict=True):
        assert (found.double() - expected).norm() / expected.norm() < allowed


def test_attention_in_a_captured_graph():
    mask = AttentionMask([[KeyRange(40), KeyRange(200, full=True, visible=False)]], device="cuda")
    q, k, v = (torch.randn(mask.n_queries, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    expected = attention(q, k, v, mask)
    graph, out = torch.cuda.CUDAGraph(), None
    with torch.cuda.graph(graph):
        out = attention(q, k, v, mask)
    graph.replay()
    assert torch.equal(out, expected)
