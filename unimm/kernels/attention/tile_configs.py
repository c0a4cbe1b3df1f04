"""Tile sizes of the attention kernels: a table per architecture, number size and head width; nothing is tuned at run time.

Chosen by compiling ahead of time (tests/test_aot.py): no spills, shared memory under the architecture's limit, its matrix
instructions present. Speed on a GPU has not yet chosen between those that pass.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LoopConfig:
    """How a kernel walks: rows or keys a step, warps, and depth of the ring of tiles being fetched."""

    step: int
    warps: int
    stages: int


@dataclass(frozen=True)
class TileConfig:
    """Tiles of rows x keys, which the schedule is made for, and the loops of the three kernels over them.

    forward and dq own `rows` rows and walk over the keys of a tile in steps; dkv owns `keys` keys and walks over the rows.
    """

    rows: int
    keys: int
    forward: LoopConfig
    dq: LoopConfig
    dkv: LoopConfig


# where triton interprets, a step costs the same whatever its size: few steps, yet several tiles in a short test
INTERPRETER_CONFIG = TileConfig(64, 32, LoopConfig(32, 4, 2), LoopConfig(32, 4, 2), LoopConfig(32, 4, 2))

# (architecture, bytes a number) -> {widest head: config}
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
    # a wave holds 64 lanes, so 4 of them are what 8 warps are elsewhere
    ("gfx942", 2): {
        32: TileConfig(128, 64, LoopConfig(64, 4, 2), LoopConfig(64, 4, 2), LoopConfig(64, 4, 2)),
        64: TileConfig(128, 64, LoopConfig(64, 4, 2), LoopConfig(64, 4, 2), LoopConfig(32, 4, 2)),
        128: TileConfig(128, 64, LoopConfig(64, 4, 2), LoopConfig(32, 4, 2), LoopConfig(32, 4, 1)),
        256: TileConfig(64, 32, LoopConfig(32, 4, 1), LoopConfig(16, 4, 1), LoopConfig(16, 4, 1)),
    },
    **{(architecture, 4): _NVIDIA_FLOAT32 for architecture in ("sm_80", "sm_86", "sm_90")},
    # here the forward kernel keeps its sums in 64 registers a thread, and spills with 8 warps
    ("sm_100", 4): _NVIDIA_FLOAT32
    | {128: TileConfig(32, 32, LoopConfig(16, 16, 2), LoopConfig(16, 8, 2), LoopConfig(16, 8, 2))},
    ("gfx942", 4): {
        128: TileConfig(32, 32, LoopConfig(32, 4, 1), LoopConfig(32, 4, 1), LoopConfig(16, 4, 1)),
        256: TileConfig(32, 32, LoopConfig(16, 4, 1), LoopConfig(16, 4, 1), LoopConfig(16, 4, 1)),
    },
}
# keys a step of a single row's attention, by bytes a number; it waits for memory, whatever the architecture
DECODE_LOOPS = {2: LoopConfig(64, 4, 3), 4: LoopConfig(16, 8, 2)}


def architecture(device: torch.device) -> str:
    """The entry of TABLE that serves a device: its own architecture's, or a relative's with no more shared memory."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major in (9, 10):
        return f"sm_{major}0"
    # 8.6 and 8.9, and 12.x, have 99 KiB a program where 8.0 and 8.7 have 163
    return "sm_80" if (major, minor) in ((8, 0), (8, 7)) else "sm_86"


def pick_tile_config(arch: str, head_dim: int, dtype: torch.dtype) -> TileConfig:
    """The configuration for heads of up to 256 dimensions."""
    if arch == "interpreter":
        return INTERPRETER_CONFIG
    table = TILE_CONFIGS[arch, dtype.itemsize]
    width = next((width for width in table if head_dim <= width), None)
    if width is None:
        raise ValueError(
            f"got heads of {head_dim} dimensions: the kernels take at most {max(table)}; use backend 'sdpa'"
        )
    return table[width]
