"""On a CUDA device: the same pictures, answers and losses as on the CPU, to rounding."""
import numpy as np
import pytest
import torch
from toys import picture, toy

from unimm import Guidance
from unimm.sequence import pack

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
    items = [cpu.items.answer([1, 2, 3]), cpu.items.drawn(torch.randn(3, 4, 6), time=0.4, noised=True)]
    batch, noise = pack([items]), torch.randn(6, cpu.cfg.latent_dim)
    expected, found = cpu(batch, noise), gpu(batch.to("cuda"), noise.to("cuda"))
    torch.testing.assert_close(found.ce.cpu(), expected.ce, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.mse.cpu(), expected.mse, rtol=1e-3, atol=1e-3)


def test_bfloat16_draws():
    model = toy(0).to("cuda", torch.bfloat16)
    model.vae.float()
    assert model.generate("a b", images=picture(), steps=2).image.size[0] % 8 == 0
