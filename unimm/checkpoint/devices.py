"""Devices as callers name them."""

import torch


def parse_device(device: str | int | torch.device) -> torch.device:
    """A device that can be used, from itself, its name or its number. Raises ValueError for one that is not there."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)  # asks its driver
    # torch built without CUDA raises AssertionError
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise ValueError(
            f"got device {device!r:.80}, which cannot be used here ({reason}): expected cpu, or cuda or cuda:1 where "
            f"PyTorch sees such a GPU (it sees {torch.cuda.device_count()})"
        ) from error
    if found.type == "meta":
        raise ValueError(
            "got device meta, whose tensors have no values to load weights into: expected cpu, or cuda; to know what a "
            "model takes of a device: `unimm plan`"
        )
    return found
