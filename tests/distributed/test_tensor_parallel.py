"""Tensor parallel inference: two processes together give what one gives, in every family; what they cannot share."""

import numpy as np
import pytest
import torch
from helpers.rank_jobs import STEPS, generate_job
from helpers.ranks import run_processes
from torch import nn

import unimm
from unimm.distributed.ranks import Ranks
from unimm.distributed.tensor_parallel import _group_by_rank, parallelize
from unimm.models.parallel_plan import COLUMN, LinearSplit, find_modules
from unimm.models.registry import FAMILIES

# a decoder alone, and a decoder with FLUX, by day; the others by night
BY_DAY = ("bagel-nano", "uniworld-nano")
BY_NIGHT = tuple(name for name in STEPS if name not in BY_DAY)


@pytest.mark.slow
@pytest.mark.parametrize("names", [BY_DAY, pytest.param(BY_NIGHT, marks=pytest.mark.nightly)], ids=["day", "night"])
def test_two_processes_give_what_one_gives(tmp_path, names):
    """Velocities or logits, the image, and an answer in words."""
    together = run_processes(tmp_path, [(name, "generate", dict(name=name)) for name in names])
    for name in names:
        steps, image, answer = generate_job(Ranks(), name=name)
        for rank in together:
            of_two, image_of_two, answer_of_two = rank[name]
            for a, b in zip(steps, of_two, strict=True):
                torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5 * float(a.abs().max()))
            assert np.abs(image - image_of_two).max() <= 1
            assert answer_of_two == answer


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_plan(family):
    assert getattr(unimm, family).TENSOR_PARALLEL_PLAN


@pytest.mark.parametrize("name", STEPS)
def test_a_plan_splits_every_block(name):
    """Each pattern is of linears that the model has, and of each block all are split that hold most of its weights."""
    model = unimm.load(name)
    found = {}
    for pattern in model.TENSOR_PARALLEL_PLAN:
        modules = find_modules(model, [pattern])
        assert modules, pattern
        found |= modules
    blocks = [module for pattern in model.PARALLEL_PLAN.blocks for module in find_modules(model, [pattern]).items()]
    for block, module in blocks:
        if block.startswith(("decoder", "mllm.decoder")):
            split = sum(one.weight.numel() for path, one in found.items() if path.startswith(f"{block}."))
            assert split > 0.95 * sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("name", "part"), [("uniworld-nano", "denoiser.mmdit"), ("metaquery-nano", "cross_attention")])
def test_heads_that_cannot_be_shared_are_refused_before_anything_is_split(name, part):
    model = unimm.load(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"{part}.* has heads \[5\], which 2 processes cannot share"):
        parallelize(model, Ranks(size=2))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_quantized_linears_are_refused():
    model = unimm.load("janusflow-nano").optimize_for_cpu(int8=True)
    with pytest.raises(ValueError, match="takes weights as they are"):
        parallelize(model, Ranks(size=2))


@pytest.mark.parametrize(
    ("split", "order"),
    [
        (COLUMN, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        (LinearSplit(kind="column", equal=3), [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]),
        (LinearSplit(kind="column", wide=2), [0, 2, 4, 5, 6, 7, 1, 3, 8, 9, 10, 11]),
    ],
)
def test_rows_of_a_rank_lie_side_by_side(split, order):
    linear = nn.Linear(2, 12).requires_grad_(False)
    weight, bias = linear.weight.clone(), linear.bias.clone()
    _group_by_rank(linear, split, 2)
    assert torch.equal(linear.weight, weight[order]) and torch.equal(linear.bias, bias[order])
