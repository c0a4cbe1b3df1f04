"""Sizes, schedules and decays of UniWorld and MetaQuery against the stored tables."""

import json

import pytest
from helpers.paths import GOLDEN

from parity.runner import check
from unimm.models.uniworld.processor import nearest_aspect_size

TABLES = GOLDEN / "blocks" / "tables.json"


def test_tables(tmp_path):
    rows = check(TABLES)
    assert len(rows) == 7 and all(row.ok for row in rows), [row.note for row in rows if not row.ok]
    # each can fail
    tables = json.loads(TABLES.read_text())
    tables["flux_schedule"][0]["sigmas"][3] += 1e-4
    tables["sana_dpm_schedule"][1]["timesteps"][2] += 1
    tables["uniworld_dynamic_resize"][4]["out_hw"][0] += 32
    tables["uniworld_two_pass_resize"][0]["second"][1] += 28
    tables["uniworld_ema_decay"]["values"]["1"] = 0.1
    tables["edit_weight_functions"]["exp"][1] += 1e-3
    tables["metaquery_train_schedule"]["note"] = tables["something new"] = "?"
    path = tmp_path / "tables.json"
    path.write_text(json.dumps(tables))
    assert [row.difference for row in check(path)] == [1] * 8


def test_any_ratio():
    assert nearest_aspect_size(1080, 1920, image_pixels=1024**2) == (864, 1536)
    assert nearest_aspect_size(1080, 1920, image_pixels=1024**2, n_ratios=1) == (1024, 1024)
    assert nearest_aspect_size(10, 1000, image_pixels=1) == (288, 512), "never nothing"
    for wrong in ({"image_pixels": 0}, {"image_pixels": 1024, "n_ratios": 12}):
        with pytest.raises(ValueError, match="got an image of 4x4.*1 to 11"):
            nearest_aspect_size(4, 4, **wrong)
