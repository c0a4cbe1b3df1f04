"""Attention's kernels, compiled ahead of time for GPUs that are not here, with the configurations of the table.

`python tests/test_aot.py [target ...]` prints what became of each.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.triton_harness import FLAVOUR, SHARED, Report, child, compile_ahead, in_child

from unimm.kernels.attention.tile_configs import DECODE_LOOPS, TILE_CONFIGS, TileConfig

pytest.importorskip("triton")

TYPES = {2: "*bf16", 4: "*fp32"}
ATTENTION = ("forward", "dq", "dkv")
GROUP_ROWS, MOST_PARTS = 16, 64  # as decode pads a small group, and the most it merges

# bytes spilled that are let pass, and why
ALLOWED = {
    # dk and dv alone take half of all registers: 64 keys x 256 numbers x 2, by 256 threads; no other step spills less
    ("dkv_kernel", "sm_90", 256, 2): 96,
}
# a padded head and a second range each put a mask more beside the scores of a partial tile
ALLOWED_MASKS = 256


@dataclass(frozen=True)
class Job:
    """One compile: a kernel, a target, bytes a number, the width of a head, and ranges a key."""

    kernel: str
    target: str
    size: int
    head_dim: int
    ranges: int = 1

    @property
    def config(self) -> TileConfig:
        return next(config for width, config in TILE_CONFIGS[self.target, self.size].items() if self.head_dim <= width)


TABLE_JOBS = [
    *(
        Job(kernel, target, size, width)
        for (target, size), widths in TILE_CONFIGS.items()
        for width in widths
        for kernel in ATTENTION
    ),
    *(Job(kernel, target, size, 128) for target in SHARED for size in DECODE_LOOPS for kernel in ("part", "merge")),
    # a head padded to the next power of two, and two ranges a key: the most masks there are
    *(Job(kernel, target, 2, 80, 2) for target in SHARED for kernel in ATTENTION),
]
QUICK_JOBS = [
    *(Job(kernel, "sm_90", 2, 128) for kernel in (*ATTENTION, "part", "merge")),
    Job("dkv", "sm_90", 2, 80, 2),
    Job("forward", "sm_80", 2, 64),
    Job("dq", "sm_100", 2, 64),
    Job("dkv", "gfx942", 2, 64),
]


def compiled(job: Job) -> Report:
    """In the child: the report of one compile."""
    from unimm.kernels.attention import attention_triton, decode_triton

    constants = dict(HEAD=job.head_dim, WIDTH=attention_triton.padded_head_dim(job.head_dim))
    if job.kernel in ATTENTION:
        kernel, config = getattr(attention_triton, f"{job.kernel}_kernel"), job.config
        how = getattr(config, job.kernel)
        constants |= dict(ROWS=config.rows, KEYS=config.keys, STEP=how.step, RANGES=job.ranges, STAGES=how.stages)
    else:
        kernel, how = getattr(decode_triton, f"{job.kernel}_kernel"), DECODE_LOOPS[job.size]
        steps = dict(STEP=how.step, STAGES=how.stages) if job.kernel == "part" else dict(PARTS=MOST_PARTS)
        constants |= dict(ROWS=GROUP_ROWS) | steps
    strides = [name for name in kernel.arg_names if name.endswith(("_row", "_head", "_sample"))]
    return compile_ahead(
        kernel, job.target, {name: type_of(name, job.size) for name in kernel.arg_names}, constants,
        warps=how.warps, stages=how.stages, aligned=strides,
    )  # fmt: skip


def type_of(name: str, size: int) -> str:
    """The type of a kernel's argument, by its name."""
    if name in ("lse_ptr", "delta_ptr", "part_ptr", "part_lse_ptr"):
        return "*fp32"
    if name in ("ranges_ptr", "starts_ptr", "lengths_ptr") or name.endswith(("_index", "_runs")):
        return "*i32"
    return TYPES[size] if name.endswith("_ptr") else "fp32" if name == "scale" else "i32"


def faults(job: Job, report: Report) -> list[str]:
    """What is wrong with a compiled kernel, in words."""
    plain = job.ranges == 1 and job.head_dim & (job.head_dim - 1) == 0
    allowed = ALLOWED.get((report.kernel, job.target, job.head_dim, job.size), 0 if plain else ALLOWED_MASKS)
    found = [fault for fault in report.faults() if "spilled" not in fault or report.spills > allowed]
    count = report.instructions
    if job.kernel in ATTENTION and job.size == 2:
        if {"wgmma", "tcgen05.mma", "mma.sync", "mfma"} & set(count) != {FLAVOUR[job.target]}:
            found.append(f"matrix instructions: {count}, expected {FLAVOUR[job.target]} alone")
        stages = getattr(job.config, job.kernel).stages
        if job.target in ("sm_90", "sm_100") and report.ring < stages:
            found.append(f"a ring of {report.ring} tiles: {stages} asked for")
    if job.kernel == "part" and job.size == 2 and not {"mma.sync", "mfma"} & set(count):
        found.append(f"matrix instructions: {count}, expected those of 16 rows")
    return found


def compile_in_child(jobs: list[Job], folder: Path, cache: Path) -> list[Report]:
    """Not in this process, where Triton may be set to interpret."""
    ask, answer = folder / "jobs.json", folder / "reports.json"
    ask.write_text(json.dumps([vars(job) for job in jobs]))
    ran = child([__file__, str(ask), str(answer)], interpret=False, cache=cache)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return [Report(**row) for row in json.loads(answer.read_text())]


def check(jobs: list[Job], request: pytest.FixtureRequest, tmp_path: Path) -> None:
    kept = request.config.pluginmanager.hasplugin("cacheprovider")
    cache = request.config.cache.mkdir("triton") if kept else tmp_path
    reports = compile_in_child(jobs, tmp_path, cache)
    found = {job: faults(job, report) for job, report in zip(jobs, reports, strict=True)}
    wrong = [f"{job}: {', '.join(what)}" for job, what in found.items() if what]
    assert not wrong, "\n".join(wrong)


def test_quick(request, tmp_path):
    check(QUICK_JOBS, request, tmp_path)


@pytest.mark.nightly
def test_whole_table(request, tmp_path):
    check(TABLE_JOBS, request, tmp_path)


def test_steps_divide_tiles():
    for config in (config for widths in TILE_CONFIGS.values() for config in widths.values()):
        assert config.keys % config.forward.step == config.keys % config.dq.step == config.rows % config.dkv.step == 0


def main(arguments: list[str]) -> None:
    if in_child():
        ask, answer = map(Path, arguments)
        rows = [compiled(Job(**row)).row() for row in json.loads(ask.read_text())]
        answer.write_text(json.dumps(rows))
        return
    for job in TABLE_JOBS:
        if job.target in (arguments or SHARED):
            r = compiled(job)
            made = f"{r.registers} registers, {r.spills} B spilled, {r.shared / 1024:.0f} KiB, ring {r.ring}, {r.instructions}"
            line = f"{job.kernel:8}{job.target:7} {job.size} B  K {job.head_dim:3}  R {job.ranges}  {made}"
            sys.stdout.write("  ! ".join([line, *faults(job, r)]) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
