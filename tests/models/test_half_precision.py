"""A sample in half precision does not depend on its place in the batch, as far as the CPU's matrix products do not."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.cases import small_model

import unimm
from unimm.models.registry import FAMILIES

PROMPTS = ["two green triangles", "a yellow square above a red circle"]
SEEDS = [23, 37]


def products_depend_on_rows() -> bool:
    """Whether this CPU's products in bfloat16 round a row differently among more or fewer rows."""
    x, w = (torch.randn(n, 256).bfloat16() for n in (600, 512))
    whole = F.linear(x, w)
    return any(not torch.equal(F.linear(x[:n], w), whole[:n]) for n in (1, 2, 3, 5, 8, 16, 31, 48, 64, 150))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_is_the_same_alone_and_in_a_batch(family):
    if products_depend_on_rows():
        pytest.skip("this CPU's products in bfloat16 depend on the number of rows")
    model = unimm.load(small_model(family), dtype="bfloat16")
    options = {"steps": 4} if model.supports_steps else {}
    together = model.generate(PROMPTS, seed=SEEDS, **options).images
    for prompt, seed, image in zip(PROMPTS, SEEDS, together, strict=True):
        alone = model.generate(prompt, seed=seed, **options).image
        assert np.array_equal(np.asarray(alone), np.asarray(image))
