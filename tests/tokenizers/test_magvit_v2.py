"""MAGVIT-v2's quantiser: its entropies against the softmax they come from, and for vectors far from their codes."""

import torch

from unimm.tokenizers.magvit_v2 import LookupFreeQuantizer


def test_entropies_are_of_the_softmax_over_squared_distances():
    z = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    found = LookupFreeQuantizer(5)(z)
    values = z.movedim(1, -1).reshape(-1, 5).double()
    choices = torch.stack((-(values - 1).square(), -(values + 1).square())).softmax(0)
    torch.testing.assert_close(found.entropy.double(), -(choices * choices.log()).sum(0).mean(), atol=1e-6, rtol=1e-5)
    mean = choices.mean(1)
    torch.testing.assert_close(found.mean_entropy.double(), -(mean * mean.log()).sum(0).mean(), atol=1e-6, rtol=1e-5)


def test_gradients_are_finite_where_every_choice_is_certain():
    """1 - sigmoid(4 z) is 0 in float32 from z = 5 on, where the logarithm's gradient would be infinite."""
    for size in (1.0, 5.0, 30.0, 1e4):
        z = torch.full((1, 3, 2, 2), size, requires_grad=True)
        found = LookupFreeQuantizer(3)(z)
        (found.entropy - found.mean_entropy + found.commitment).backward()
        assert z.grad is not None and z.grad.isfinite().all(), size
        assert 0 <= found.entropy.item() < 0.1 and 0 <= found.mean_entropy.item() < 0.1
