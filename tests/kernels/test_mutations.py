"""Planted mistakes in attention's kernels: the interpreted cases must fail on every one."""

import shutil
from pathlib import Path

import pytest
from helpers.paths import ROOT, TESTS
from helpers.triton_harness import run_cases

pytest.importorskip("triton")
pytestmark = pytest.mark.nightly

PACKAGE = ROOT / "unimm"
CASES = TESTS / "kernels" / "attention_triton_cases.py"
FORWARD, DECODE = "attention_triton", "decode_triton"

# name: (module, text, what replaces it wherever it stands); "nothing" shows that the cases pass on a copy, too
MISTAKES = {
    "nothing": (FORWARD, "", ""),
    "range ends one row late": (FORWARD, "= (rows >= first) & (rows < last)", "= (rows >= first) & (rows <= last)"),
    "range begins one row late": (FORWARD, "= (rows >= first)", "= (rows > first)"),
    "second range ignored": (FORWARD, "if RANGES == 2:", "if RANGES == 3:"),
    "second range instead of the first": (FORWARD, "visible = visible | (", "visible = ("),
    "output not rescaled": (FORWARD, "dot(p.to(v.dtype), v, o * rescale[:, None]", "dot(p.to(v.dtype), v, o"),
    "sum not rescaled": (FORWARD, "total = total * rescale + tl.sum(p, 1)", "total = total + tl.sum(p, 1)"),
    "lse in base 2": (FORWARD, "(top + tl.log2(total)) * LN2", "top + tl.log2(total)"),
    "rows that attend to nothing divide by zero": (
        FORWARD,
        "total = tl.where(total > 0.0, total, 1.0)\n    store",
        "store",
    ),
    "nan where no key is visible yet": (
        FORWARD,
        'shift = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top',
        "shift = new_top",
    ),
    "wrong key head": (
        FORWARD,
        "v_ptr += head // group * v_head\n    scale2 = scale * LOG2E\n    o =",
        "v_ptr += head % group * v_head\n    scale2 = scale * LOG2E\n    o =",
    ),
    "wrong query head for dk and dv": (FORWARD, "head = key_head * group + member", "head = key_head + member"),
    "last partial run skipped": (
        FORWARD,
        "in range(tl.load(index_ptr + block), tl.load(index_ptr + block + 1)):",
        "in range(tl.load(index_ptr + block), tl.load(index_ptr + block + 1) - MASKED):",
    ),
    "last step of a tile skipped": (
        FORWARD,
        "end = tl.load(runs_ptr + 2 * run + 1) * (ROWS // STEP)",
        "end = tl.load(runs_ptr + 2 * run + 1) * (ROWS // STEP) - 1",
    ),
    "keys past the end not masked": (
        FORWARD,
        "v = load_rows(v_ptr, keys, v_row, n_keys, HEAD, WIDTH, MASKED)",
        "v = load_rows(v_ptr, keys, v_row, n_keys, HEAD, WIDTH, False)",
    ),
    "rows past the end not masked": (
        FORWARD,
        "do = load_rows(do_ptr, rows, do_row, n_rows, HEAD, WIDTH, MASKED)",
        "do = load_rows(do_ptr, rows, do_row, n_rows, HEAD, WIDTH, False)",
    ),
    "head not padded": (FORWARD, "mask=(dims < HEAD)[None, :], other=0.0)", "mask=(dims < WIDTH)[None, :], other=0.0)"),
    "writes past the head": (
        FORWARD,
        "mask=(rows < end)[:, None] & (dims < HEAD)[None, :])",
        "mask=(rows < end)[:, None])",
    ),
    "writes past the rows": (
        FORWARD,
        "mask=(rows < end)[:, None] & (dims < HEAD)[None, :])",
        "mask=(dims < HEAD)[None, :])",
    ),
    "delta dropped from dq": (FORWARD, 'input_precision="ieee") - delta[:, None])', 'input_precision="ieee"))'),
    "delta dropped from dk": (FORWARD, 'input_precision="ieee") - delta[None, :])', 'input_precision="ieee"))'),
    "scale forgotten in dq": (FORWARD, "dq * scale", "dq"),
    "scale forgotten in dk": (FORWARD, "dk * scale", "dk"),
    "mask forgotten in dq": (
        FORWARD,
        "_visible_pairs(ranges_ptr, rows[:, None], keys[None, :], n_keys, RANGES), p, 0.0)",
        "p > 0.0, p, 0.0)",
    ),
    "addresses of 32 bits": (FORWARD, "rows.to(tl.int64)[:, None] * row_stride", "rows[:, None] * row_stride"),
    "heads of 32 bits": (FORWARD, "tl.program_id(1).to(tl.int64)", "tl.program_id(1)"),
    "decode: length ignored": (DECODE, "(keys < last)[None, :]", "(keys < last + STEP)[None, :]"),
    "decode: start ignored": (DECODE, "v_ptr += start * v_row", "v_ptr += 0 * v_row"),
    "decode: equal weights of parts": (DECODE, "o * weights[:, None]", "o"),
    "decode: first head for all": (DECODE, "* ROWS + head % group", "* ROWS"),
}


def planted(mistake: str, folder: Path) -> Path:
    """A folder with a `unimm` that is the package but for the mistake."""
    module, text, instead = MISTAKES[mistake]
    inside = folder / "unimm"
    inside.mkdir()
    for path in PACKAGE.iterdir():
        if path.name not in ("kernels", "__pycache__"):
            (inside / path.name).symlink_to(path)
    shutil.copytree(PACKAGE / "kernels", inside / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    source = inside / "kernels" / "attention" / f"{module}.py"
    assert text in source.read_text(), f"{text!r} no longer stands in {module}.py"
    source.write_text(source.read_text().replace(text, instead))
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_found(mistake, tmp_path):
    ran = run_cases(str(CASES), "-x", package=planted(mistake, tmp_path))
    # 1: a case failed; less than 0: a wrong address ended the process; anything else is a mistake in the patch
    assert ran.returncode == 0 if mistake == "nothing" else ran.returncode == 1 or ran.returncode < 0, ran.stdout[
        -3000:
    ]
    assert "ImportError" not in ran.stdout and "SyntaxError" not in ran.stdout
