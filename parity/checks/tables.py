"""What blocks/tables.json stores: schedules, sizes, decays and weights at real sizes, a list a row."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from unimm.generation.flow import (
    dpm_timesteps,
    dynamic_shift,
    floor_timesteps,
    flow_timesteps,
    integer_timesteps,
)
from unimm.models.uniworld.processor import nearest_aspect_size
from unimm.processing.images.qwen2_vl import smart_resize
from unimm.training.ema import ramped_decay
from unimm.training.tasks.edit_weights import AREA_FUNCTIONS

ROUNDED = 1e-6  # the table has seven digits
INFERENCE = TRAINING = 448 * 448  # pixels that UniWorld's MLLM sees, least and most


def near(ours: Iterable[float], stored: list[float]) -> bool:
    """Whether two lists agree to what the table holds."""
    return torch.allclose(torch.tensor(list(ours)).double(), torch.tensor(stored).double(), atol=ROUNDED, rtol=ROUNDED)


def flux(entry: dict[str, Any]) -> bool:
    """Flow Euler with a shift by the number of tokens."""
    shift = dynamic_shift(entry["image_tokens"])
    return near([math.log(shift)], [entry["mu"]]) and near(
        flow_timesteps(entry["steps"], shift).tolist(), entry["sigmas"]
    )


def sana(entry: dict[str, Any]) -> bool:
    """DPM-Solver++'s times, and what the model is told."""
    times = dpm_timesteps(entry["steps"])
    told = [round(1000 * time) for time in floor_timesteps(times[:-1]).tolist()]
    return near(times.tolist(), entry["sigmas"]) and told == entry["timesteps"]


def drawn(entry: dict[str, Any]) -> bool:
    """The size that an image is generated at."""
    ratios = int(re.findall(r"\d+", entry["anyres"])[0])
    found = nearest_aspect_size(
        entry["h"], entry["w"], image_pixels=entry["anchor_pixels"], n_ratios=ratios, side_unit=entry["stride"]
    )
    return [*found] == entry["out_hw"]


def seen(entry: dict[str, Any]) -> bool:
    """The size that an image is seen at: resized twice when drawing, once in training."""
    first = smart_resize(entry["h"], entry["w"], 28, INFERENCE, INFERENCE)
    second = smart_resize(*first, 28, INFERENCE, INFERENCE)
    trained = smart_resize(entry["h"], entry["w"], 56, TRAINING, TRAINING)
    return [[*first], [*second], [*trained]] == [entry["first"], entry["second"], entry["train_factor56"]]


def decays(table: dict[str, Any]) -> bool:
    """The decay of the weights' average at an update."""
    values = table["values"]
    return near([ramped_decay(int(step) - 1, table["decay"]) for step in values], list(values.values()))


def functions(table: dict[str, list[float]]) -> bool:
    """The weights of an edited region."""
    return all(near(map(AREA_FUNCTIONS[name], table["x"]), stored) for name, stored in table.items() if name != "x")


def trained(table: dict[str, Any]) -> bool:
    """The note says in words what the times of training are: all thousandths, the first draw the noisiest."""
    draws = (torch.arange(1000) + 0.5) / 1000
    return "timestep 1000-i" in table["note"] and near(
        integer_timesteps(draws).tolist(), [(1000 - i) / 1000 for i in range(1000)]
    )


CHECKS: dict[str, Callable[[Any], bool]] = {
    "flux_schedule": flux,
    "sana_dpm_schedule": sana,
    "metaquery_train_schedule": trained,
    "uniworld_dynamic_resize": drawn,
    "uniworld_two_pass_resize": seen,
    "uniworld_ema_decay": decays,
    "edit_weight_functions": functions,
}


def check_tables(path: Path) -> dict[str, tuple[int, str]]:
    """How many entries of each list are wrong, and a note; a list that nothing compares counts as wrong."""
    found = {}
    for name, table in json.loads(path.read_text()).items():
        if name == "made_with":
            continue
        entries = table if isinstance(table, list) else [table]
        wrong = [entry for entry in entries if not (name in CHECKS and CHECKS[name](entry))]
        found[name] = len(wrong), f"{len(entries)} entries" + (f", first wrong {str(wrong[0])[:200]}" if wrong else "")
    return found
