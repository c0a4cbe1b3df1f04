"""Tile sizes of the attention kernels, by architecture, size of a number and head width; none is tuned at run time.

Chosen by compiling ahead of time (tests/kernels/test_aot.py): no spills, shared memory under the architecture's limit,
its matrix instructions present. Those that pass have not been compared by speed on a GPU.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LoopConfig:
    """The loop of a kernel: rows or keys per step, warps, and pipeline stages (tiles being fetched at once)."""

    step: int
    warps: int
    stages: int


@dataclass(frozen=True)
class TileConfig:
    """Tiles of rows x keys, which the schedule is made for, and the loops of the three kernels over them.

    A program of forward and dq owns `rows` rows and steps over the keys of a tile; one of dkv owns `keys` keys and
    steps over the rows.
    """

    rows: int
    keys: int
    forward: LoopConfig
    dq: LoopConfig
    dkv: LoopConfig


# in the interpreter a step costs the same whatever its size: few steps, yet several tiles in a short test
INTERPRETER_CONFIG = TileConfig(64, 32, LoopConfig(32, 4, 2), LoopConfig(32, 4, 2), LoopConfig(32, 4, 2))

# (architecture, bytes per number) -> {widest head: config}
_AMPERE = {
    32: TileConfig(128, 128, LoopConfig(64, 8, 3), LoopConfig(64, 8, 2), LoopConfig(32, 8, 2)),
    64: TileConfig(128, 128, LoopConfig(64, 8, 3), LoopConfig(64, 8, 2), LoopConfig(32, 8, 2)),
    128: TileConfig(128, 64, LoopConfig(64, 8, 2), LoopConfig(32, 8, 2), LoopConfig(32, 4, 2)),
    256: TileConfig(64, 32, LoopConfig(32, 8, 2), LoopConfig(16, 4, 2), LoopConfig(32, 8, 2)),
}
# float32 products are exact (no tf32), so they are sums of plain multiplications, held in registers: small steps
_NVIDIA_FLOAT32 = {
    64: TileConfig(64, 64, LoopConfig(16, 8, 2), LoopConfig(16, 8, 2), LoopConfig(16, 8, 2)),
    128: TileConfig(32, 32, LoopConfig(16, 8, 2), LoopConfig(16, 8, 2), LoopConfig(16, 8, 2)),
    256: TileConfig(32, 32, LoopConfig(16, 8, 2), LoopConfig(16, 8, 2), LoopConfig(16, 8, 1)),
}
TILE_CONFIGS: dict[tuple[str, int], dict[int, TileConfig]] = {
    ("sm_80", 2): _AMPERE,
    ("sm_86", 2): _AMPERE,
    # wgmma wants 64 rows a group of four warps
    ("sm_90", 2): {
        32: TileConfig(128, 128, LoopConfig(64, 8, 3), LoopConfig(64, 8, 3), LoopConfig(64, 8, 3)),
        64: TileConfig(128, 128, LoopConfig(64, 8, 3), LoopConfig(64, 8, 3), LoopConfig(64, 8, 3)),
        128: TileConfig(128, 128, LoopConfig(64, 8, 3), LoopConfig(64, 8, 2), LoopConfig(32, 8, 3)),
        256: TileConfig(128, 64, LoopConfig(64, 8, 2), LoopConfig(32, 8, 2), LoopConfig(16, 8, 2)),
    },
    ("sm_100", 2): {
        32: TileConfig(128, 128, LoopConfig(32, 8, 3), LoopConfig(64, 8, 2), LoopConfig(64, 8, 2)),
        64: TileConfig(128, 128, LoopConfig(128, 8, 2), LoopConfig(64, 8, 2), LoopConfig(64, 8, 2)),
        128: TileConfig(128, 128, LoopConfig(64, 8, 3), LoopConfig(64, 8, 2), LoopConfig(32, 8, 3)),
        256: TileConfig(128, 64, LoopConfig(64, 8, 1), LoopConfig(32, 8, 1), LoopConfig(32, 8, 1)),
    },
    # a wavefront has 64 lanes, so 4 of them equal 8 warps elsewhere
    ("gfx942", 2): {
        32: TileConfig(128, 64, LoopConfig(64, 4, 2), LoopConfig(64, 4, 2), LoopConfig(64, 4, 2)),
        64: TileConfig(128, 64, LoopConfig(64, 4, 2), LoopConfig(64, 4, 2), LoopConfig(32, 4, 2)),
        128: TileConfig(128, 64, LoopConfig(64, 4, 2), LoopConfig(32, 4, 2), LoopConfig(32, 4, 1)),
        256: TileConfig(64, 32, LoopConfig(32, 4, 1), LoopConfig(16, 4, 1), LoopConfig(16, 4, 1)),
    },
    **{(name, 4): _NVIDIA_FLOAT32 for name in ("sm_80", "sm_86", "sm_90")},
    # here the forward kernel keeps its sums in 64 registers a thread, and spills with 8 warps
    ("sm_100", 4): _NVIDIA_FLOAT32
    | {128: TileConfig(32, 32, LoopConfig(16, 16, 2), LoopConfig(16, 8, 2), LoopConfig(16, 8, 2))},
    ("gfx942", 4): {
        128: TileConfig(32, 32, LoopConfig(32, 4, 1), LoopConfig(32, 4, 1), LoopConfig(16, 4, 1)),
        256: TileConfig(32, 32, LoopConfig(16, 4, 1), LoopConfig(16, 4, 1), LoopConfig(16, 4, 1)),
    },
}
# the loop of decoding over keys, by bytes per number; it is bound by memory, whatever the architecture
DECODE_LOOPS = {2: LoopConfig(64, 4, 3), 4: LoopConfig(16, 8, 2)}


def architecture(device: torch.device) -> str:
    """The key of TILE_CONFIGS for a device: its own architecture, or a related one with no more shared memory."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major in (9, 10):
        return f"sm_{major}0"
    # 8.6 and 8.9, and 12.x, have 99 KiB per program where 8.0 and 8.7 have 163
    return "sm_80" if (major, minor) in ((8, 0), (8, 7)) else "sm_86"


def pick_tile_config(name: str, head_dim: int, dtype: torch.dtype) -> TileConfig:
    """The configuration of an architecture for heads of up to 256 dimensions. Raises ValueError for wider ones."""
    if name == "interpreter":
        return INTERPRETER_CONFIG
    table = TILE_CONFIGS[name, dtype.itemsize]
    width = next((width for width in table if head_dim <= width), None)
    if width is None:
        raise ValueError(
            f"got heads of {head_dim} dimensions: the kernels take at most {max(table)}; use backend 'sdpa'"
        )
    return table[width]
