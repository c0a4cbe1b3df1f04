"""Triton without a GPU: a child process that interprets kernels, bfloat16 made right there, red zones, ahead-of-time
compiles.

The interpreter shows wrong numbers, the compiler shows what the interpreter lets pass: spills, lost matrix
instructions, shared memory over the limit. Neither shows races or speed.
"""

import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from helpers.paths import ROOT, TESTS

# what runs in a child knows by this that it does
CHILD = "UNIMM_TEST_CHILD"

# ------------------------------------------------------------------------------------------------------ child processes


def in_child() -> bool:
    """Whether this process was made by `child`."""
    return CHILD in os.environ


def child(
    command: list[str], *, interpret: bool, package: Path | None = None, cache: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a Python command line in a process where Triton interprets, or does not: it decides when a kernel is
    decorated.

    package: a folder that holds the `unimm` to import, instead of the one beside the tests. cache: of compiled kernels.
    """
    keep = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    path = os.pathsep.join([str(package or ROOT), str(TESTS), *filter(None, [keep.get("PYTHONPATH")])])
    env = {**keep, CHILD: "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    if interpret:
        env["TRITON_INTERPRET"] = "1"
    if cache:
        env["TRITON_CACHE_DIR"] = str(cache)
    # not from the root: python -m puts the current folder before PYTHONPATH
    return subprocess.run([sys.executable, *command], env=env, cwd=TESTS, capture_output=True, text=True, check=False)


def run_cases(file: str, *options: str, package: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The tests of a file in a child that interprets; without conftest.py, which imports every model."""
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--noconftest", "--tb=short"]
    # triton 3.6 turns one-element arrays into loop bounds as numpy < 2.4 still lets it, with a warning
    warned = ["-W", "ignore:Conversion of an array with ndim:DeprecationWarning"]
    # pyproject's own pythonpath would put the root before the package
    paths = ["-o", f"pythonpath={package or ROOT} {TESTS}"]
    return child([*command, *paths, *options, *warned, file], interpret=True, package=package)


# ---------------------------------------------------------------------------------------------------- the interpreter


def mend_bfloat16() -> None:
    """Makes bfloat16 right in the interpreter, which keeps it as uint16 and computes on the bits (triton issue 11584).

    Casts round to nearest even, products run on the numbers. Other arithmetic is refused: kernels of the house cast to
    float32 first, and on a GPU too the result would hang on how the compiler widens.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if builder.__dict__.get("mended"):
        return

    def is_bfloat16(x: object) -> bool:
        return isinstance(x, handle) and x.dtype.scalar == tl.bfloat16

    def widen(x):
        bits = np.ascontiguousarray(x.data).astype(np.uint32) << 16
        return handle(bits.view(np.float32), tl.float32)

    def narrow(x):
        values = np.ascontiguousarray(x.data, dtype=np.float32)
        bits = values.view(np.uint32)
        half = np.uint32(0x7FFF) + ((bits >> 16) & 1)  # half a unit in the last place, less one if that is even
        return handle(np.where(np.isnan(values), np.uint32(0x7FC0), (bits + half) >> 16).astype(np.uint16), tl.bfloat16)

    cast, dot = builder.cast_impl, builder.create_dot

    def mended_cast(self, x, to):
        if to.scalar == tl.bfloat16 and not is_bfloat16(x):
            return narrow(cast(self, x, tl.float32))
        if is_bfloat16(x) and to.scalar != tl.bfloat16:
            return cast(self, widen(x), to)
        return cast(self, x, to)

    def mended_dot(self, a, b, *rest):
        return dot(self, *(widen(x) if is_bfloat16(x) else x for x in (a, b)), *rest)

    def refusing(name):
        plain = getattr(builder, name)

        def checked(self, *args, **options):
            if any(map(is_bfloat16, args)):
                raise TypeError(f"{name} on bfloat16: cast to float32 first")
            return plain(self, *args, **options)

        return checked

    for name in ("binary_op", "unary_op", "create_fabs", "create_erf", "create_rsqrt", "create_fma"):
        setattr(builder, name, refusing(name))
    for operation in (interpreter.ReduceOps, interpreter.ScanOps):

        def checked(self, inputs, plain=operation.apply_impl):
            if any(x.dtype.scalar == tl.bfloat16 for x in inputs):
                raise TypeError("a reduction over bfloat16: cast to float32 first")
            return plain(self, inputs)

        operation.apply_impl = checked
    builder.cast_impl, builder.create_dot, builder.mended = mended_cast, mended_dot, True


@contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty holds NaN, so that what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def red_zone(x: Tensor, *, zone: int = 4096) -> Tensor:
    """x, with its strides, amid `zone` NaN (or the largest integers) on either side: reads out of bounds show in the
    result."""
    span = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    fill = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max
    buffer = torch.full((2 * zone + span,), fill, dtype=x.dtype)
    return buffer.as_strided(x.shape, x.stride(), zone).copy_(x)


def red_zone_intact(x: Tensor) -> bool:
    """Whether nothing wrote around a tensor that `red_zone` made: all but its own numbers are NaN still."""
    buffer = x.new_empty(0).set_(x.untyped_storage())
    inside = torch.zeros_like(buffer, dtype=torch.bool)
    inside.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
    return bool(buffer[~inside].isnan().all())


# --------------------------------------------------------------------------------------------- ahead-of-time compiles

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_86": ("cuda", 86, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# shared memory that one program may take, in KiB
SHARED = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}
# matrix instructions: what a tile of 64 rows or more should become
FLAVOUR = {"sm_80": "mma.sync", "sm_86": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "mfma"}
INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05.mma": r"tcgen05\.mma",
    "mma.sync": r"\bmma\.sync",
    "mfma": r"v_mfma",
    "cp.async": r"cp\.async\.c[ag]",
    "tma": r"cp\.async\.bulk\.tensor",
}


@dataclass(frozen=True)
class Report:
    """What the compiler made of a kernel: registers a thread, bytes spilled, bytes shared, counts of instructions."""

    kernel: str
    target: str
    label: str
    registers: int
    spills: int
    shared: int
    serialised: bool
    ring: int
    instructions: dict[str, int]

    def faults(self) -> list[str]:
        """What no kernel may show, whatever its configuration."""
        found = [f"{self.spills} bytes spilled"] if self.spills else []
        if self.shared > SHARED[self.target] * 1024:
            found.append(f"{self.shared} bytes shared: at most {SHARED[self.target]} KiB")
        return [*found, *(["wgmma is serialised"] if self.serialised else [])]

    def row(self) -> dict[str, object]:
        """As JSON takes it."""
        return asdict(self)


def compile_ahead(
    kernel, target: str, types: Mapping[str, str], constants: Mapping[str, object], *, warps: int, stages: int,
    aligned: Collection[str] = (), label: str = "",
) -> Report:  # fmt: skip
    """Compiles a jitted kernel for a GPU that is not here, and reads what became of it. Not where Triton interprets.

    types: "*bf16", "i32", "fp32" for every argument that is no constexpr. aligned: those known to be multiples of 16,
    as a launch finds out by looking; pointers are.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    multiples = [name for name in kernel.arg_names if name in aligned or signature[name].startswith("*")]
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in multiples}
    source = ASTSource(kernel, signature, constexprs=dict(constants), attrs=attrs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # triton 3.9 announces that 3.10 no longer fuses by itself: said here
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        made = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    text = made.asm["ptx" if target.startswith("sm") else "amdgcn"]
    counts = {name: len(re.findall(pattern, text)) for name, pattern in INSTRUCTIONS.items()}
    registers, spills, serialised = _nvidia(text, target) if target.startswith("sm") else _amd(text)
    return Report(
        kernel=kernel.__name__,
        target=target,
        label=label,
        registers=registers,
        spills=spills,
        shared=made.metadata.shared,
        serialised=serialised,
        # buffers of the deepest ring of tiles: the leading length of an allocation in shared memory
        ring=max(map(int, re.findall(r"local_alloc\b.*memdesc<(\d+)x\d+x\d+x", made.asm["ttgir"])), default=1),
        instructions={name: count for name, count in counts.items() if count},
    )


def _nvidia(ptx: str, target: str) -> tuple[int, int, bool]:
    """Registers, bytes spilled, and whether wgmma is serialised: only ptxas -v says, so it runs again on the PTX."""
    from triton.backends.nvidia.compiler import get_ptxas

    gpu = re.search(r"\.target (\S+?),?\s", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [
            get_ptxas(TARGETS[target][1]).path,
            "-v",
            f"--gpu-name={gpu}",
            str(source),
            "-o",
            f"{folder}/kernel.cubin",
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said)))
    # C7510 and C7511
    serialised = bool(re.search(r"C751\d|wgmma.mma_async instructions are serialized", said))
    return int(re.search(r"Used (\d+) registers", said)[1]), spills, serialised


def _amd(assembly: str) -> tuple[int, int, bool]:
    """Vector registers, and bytes of scratch, of which a kernel without spills has none."""
    field = {
        name: int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])
        for name in ("vgpr_count", "private_segment_fixed_size")
    }
    return field["vgpr_count"], field["private_segment_fixed_size"], False
