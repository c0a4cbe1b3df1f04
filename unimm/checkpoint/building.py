"""Building a module of a folder's configs, without weights: what cannot be built is refused with the folder's name."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from unimm.checkpoint.contents import CheckpointError
from unimm.checkpoint.json_files import naming_place
from unimm.checkpoint.load import read_shapes

# parameters above which the headers of a folder's weights are read while it is built; releases have about 2,000
UNSUSPICIOUS = 10_000
# parameters of ours for a tensor of a file: one may be cut into several
PARAMETERS_A_TENSOR = 4


@contextmanager
def building(folder: Path) -> Iterator[None]:
    """Build a module out of a folder's configs, in the body.

    Raises ValueError, which names the folder, for what cannot be built, and CheckpointError, before it is built whole,
    where it has many more parameters than the folder's files hold tensors.
    """
    thread = threading.get_ident()
    n_parameters = 0
    limit = 0

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal n_parameters, limit
        if threading.get_ident() != thread:  # hooks see every thread's modules
            return
        n_parameters += 1
        if n_parameters == UNSUSPICIOUS:
            limit = PARAMETERS_A_TENSOR * _count_tensors(folder)
        if limit and n_parameters > max(limit, UNSUSPICIOUS):
            raise CheckpointError(
                f"the configs in {folder} describe more than {n_parameters:,} parameters, its weights hold "
                f"{limit // PARAMETERS_A_TENSOR:,} tensors: correct the number of layers, or fetch the folder again"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        with naming_place(folder), _naming_overflows():
            yield
    finally:
        hook.remove()


def _count_tensors(folder: Path) -> int:
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin", ".pt")]
    return sum(len(read_shapes([path])) for path in files)


@contextmanager
def _naming_overflows() -> Iterator[None]:
    """Raise ValueError where the body makes a tensor of more elements than can be counted."""
    try:
        yield
    except (RuntimeError, TypeError, OverflowError) as error:
        if "overflow" not in str(error).lower():
            raise
        raise ValueError(f"the configs describe a tensor that is too large for any memory: {error}") from error
