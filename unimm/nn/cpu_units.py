"""What a CPU has that decides which way of multiplying matrices is quickest."""

import torch


def prefers_bfloat16(device: torch.device) -> bool:
    """Whether matrix products on a device are quicker in bfloat16: on a GPU, and on a CPU with tiles for it (AMX).

    Of CPUs without tiles, those that have bfloat16 instructions (AVX-512) too multiply matrices in bfloat16 at half the
    speed of float32.
    """
    return device.type != "cpu" or torch.cpu._is_amx_tile_supported()
