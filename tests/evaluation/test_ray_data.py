"""examples/ray_data on a local cluster: the images are those of single runs."""

import io
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from helpers.paths import ROOT
from helpers.serving import ROUNDING, levels_apart
from PIL import Image

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra ray")

EXAMPLE = ROOT / "examples" / "ray_data" / "draw_prompts.py"
PROMPTS = ["a red circle", "a blue square", "a green triangle", "two red squares", "a blue circle"]


# two processes load torch and a model
@pytest.mark.nightly
def test_images_are_those_of_single_runs(nano, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet", reason="needs the extra data")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    arguments = ["prompts.txt", "out", "--seed", "7", "--steps", "3", "--batch", "2", "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    # 15 otherwise: other work on the machine would starve its workers
    environment["RAY_worker_niceness"] = "0"
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, EXAMPLE, *arguments],
        check=False,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = sorted(pq.read_table(tmp_path / "out").to_pylist(), key=lambda row: row["id"])
    assert [(row["id"], row["prompt"], row["seed"]) for row in rows] == [
        (f"{i + 1:05}", prompt, 7 + i) for i, prompt in enumerate(PROMPTS)
    ]
    for row in rows:
        image = Image.open(io.BytesIO(row["png"]))
        assert levels_apart(image, nano.generate(row["prompt"], seed=row["seed"], steps=3).image) <= ROUNDING
