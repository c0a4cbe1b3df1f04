"""What a case of UniWorld's edit weights stores: every stage of the mask, the weights, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from parity.case import Case
from unimm.training.tasks.edit_weights import EditWeights

EXPECTS = "config.json with closing_kernel and weight_types"
FIELDS = {
    "threshold": "threshold",
    "closing": "closing_kernel",
    "min_component": "component_area_fraction",
    "min_area": "min_area_fraction",
    "factor": "downsample_factor",
}


def recognise(folder: Path) -> bool:
    """Whether a case's files are those of edit weights."""
    config = folder / "config.json"
    files = json.loads(config.read_text()) if config.exists() else {}
    return "closing_kernel" in files and "weight_types" in files


def check(case: Case) -> None:
    """Compare every group of tensors: a reference or several, a target, stages, weights of each function."""
    files = json.loads((case.folder / "config.json").read_text())
    numbers = {ours: files[theirs] for ours, theirs in FIELDS.items()}
    pairs = {entry["index"]: entry for entry in json.loads((case.outputs / "io.json").read_text()).get("pairs", [])}
    for group in dict.fromkeys(name.partition(".")[0] for name in case.tensors):
        notes = pairs.get(int(group[4:]), {}) if re.fullmatch(r"pair\d+", group) else {}
        for function in files["weight_types"]:
            check_group(case, group, EditWeights(**numbers, function=function), notes)


def check_group(case: Case, group: str, weights: EditWeights, notes: dict) -> None:
    """One group under one function."""
    names = case.names(rf"{group}\.(reference|ref\d+)")
    references = [case.input(name).numpy() for name in names]
    target = f"{group}.target"
    stored = f"{group}.weight_{weights.function}"
    # a group without a target says only that all weights are 1
    height, width = (weights.factor * n for n in case.tensors[stored].shape[1:]) if stored in case else (0, 0)
    target_image = case.input(target).numpy() if target in case else np.zeros((height, width, 3), np.uint8)
    if not target_image.size:
        return
    if names and len(references) == 1:
        white = weights.difference_mask(references[0], target_image)
        for stage, mask in (("mask0_diff", white), ("mask1_closed", closed := weights.close_gaps(white)),
                            ("mask2_filtered", weights.drop_small_components(closed))):  # fmt: skip
            compare_mask(case, f"{group}.{stage}", mask)
    error = None
    try:
        found, cells = weights(references, target_image), weights.latent_mask(references, target_image)
    except ValueError as raised:
        error = raised
    name, told = f"{group}: error_{weights.function}", notes.get(f"error_{weights.function}")
    if error or told:
        case.compare_note(name, type(error).__name__ if error else None, "SmallEditError" if told else None)
        return
    case.compare(stored, found)
    compare_mask(case, f"{group}.mask3_down", cells)
    if (value := notes.get(f"value_{weights.function}")) is not None:
        case.compare_scalar(f"{group}: value_{weights.function}", float(found.max()), value, largest=value)


def compare_mask(case: Case, name: str, mask: np.ndarray) -> None:
    """Masks are exact, whatever number stands for white."""
    if name in case:
        case.compare_note(name, bool((case.tensors[name].numpy() > 0).tolist() == mask.tolist()), True)
