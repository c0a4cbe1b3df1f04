"""What blocks/tables.json stores: schedules, sizes, decays and weights at real sizes, a list a row."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from unimm.generation.flow import dynamic_shift, in_whole_steps, knots, solver_knots, whole_times
from unimm.models.uniworld.processor import any_ratio
from unimm.processing.images.qwen2_vl import smart_size
from unimm.training.ema import ramp
from unimm.training.tasks.edit_weights import WEIGHTS

ROUNDED = 1e-6  # the table has seven digits
INFERENCE = TRAINING = 448 * 448  # pixels that UniWorld's reader sees, least and most


def near(ours: Iterable[float], stored: list[float]) -> bool:
    """Whether two lists agree to what the table holds."""
    return torch.allclose(torch.tensor(list(ours)).double(), torch.tensor(stored).double(), atol=ROUNDED, rtol=ROUNDED)


def flux(entry: dict[str, Any]) -> bool:
    """Flow Euler with a shift by the number of tokens."""
    shift = dynamic_shift(entry["image_tokens"])
    return near([math.log(shift)], [entry["mu"]]) and near(knots(entry["steps"], shift).tolist(), entry["sigmas"])


def sana(entry: dict[str, Any]) -> bool:
    """DPM-Solver++'s times, and what the model is told."""
    times, told = solver_knots(entry["steps"]), []
    velocity = in_whole_steps(lambda x, time: told.append(round(1000 * time)) or x)
    for time in times[:-1].tolist():
        velocity(torch.zeros(1), time)
    return near(times.tolist(), entry["sigmas"]) and told == entry["timesteps"]


def drawn(entry: dict[str, Any]) -> bool:
    """The size that a picture is drawn at."""
    ratios = int(re.findall(r"\d+", entry["anyres"])[0])
    found = any_ratio(entry["h"], entry["w"], pixels=entry["anchor_pixels"], ratios=ratios, stride=entry["stride"])
    return [*found] == entry["out_hw"]


def seen(entry: dict[str, Any]) -> bool:
    """The size that a picture is seen at: resized twice when drawing, once in training."""
    first = smart_size(entry["h"], entry["w"], 28, INFERENCE, INFERENCE)
    second = smart_size(*first, 28, INFERENCE, INFERENCE)
    trained = smart_size(entry["h"], entry["w"], 56, TRAINING, TRAINING)
    return [[*first], [*second], [*trained]] == [entry["first"], entry["second"], entry["train_factor56"]]


def decays(table: dict[str, Any]) -> bool:
    """The decay of the weights' average at an update."""
    values = table["values"]
    return near([ramp(int(step) - 1, table["decay"]) for step in values], list(values.values()))


def functions(table: dict[str, list[float]]) -> bool:
    """The weights of an edited region."""
    return all(near(map(WEIGHTS[name], table["x"]), stored) for name, stored in table.items() if name != "x")


def trained(table: dict[str, Any]) -> bool:
    """The note says in words what the times of training are: all thousandths, the first draw the noisiest."""
    draws = (torch.arange(1000) + 0.5) / 1000
    return "timestep 1000-i" in table["note"] and near(
        whole_times(draws).tolist(), [(1000 - i) / 1000 for i in range(1000)]
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
