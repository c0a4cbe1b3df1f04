"""What all tests share: one thread, fixed seeds, no uninitialised memory; and models: a golden case, the bundled nano.

Small random models are made by toys.py.
"""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers.paths import GOLDEN

from unimm import Bagel


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Workers of a parallel run share the cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed() -> Iterator[None]:
    """Every test begins from the same seeds, sees NaN in memory that nobody wrote, and leaves torch's defaults as they
    were."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def golden() -> Bagel:
    """The small golden case: random weights in the released layout, without a tokenizer."""
    return Bagel.from_pretrained(GOLDEN / "bagel" / "dev")


@pytest.fixture(scope="session")
def nano() -> Bagel:
    """The trained model that ships inside the package."""
    return Bagel.from_pretrained("bagel-nano")
