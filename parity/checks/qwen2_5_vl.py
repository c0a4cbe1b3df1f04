"""What a case of Qwen2.5-VL stores, computed by unimm.vlms.qwen2_5_vl.model: one function a group of stored outputs.

Groups are images (image0, image1, all of them in one call) and runs, batches of ids with images in them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from parity.case import Case
from unimm.processing.images.qwen2_vl import PatchGrid, smart_resize
from unimm.sequence.packing import pack_sequences
from unimm.sequence.parts import Part
from unimm.vlms.llama_layout import EXPERT
from unimm.vlms.qwen2_5_vl.model import QwenVL
from unimm.vlms.qwen2_5_vl.processor import QwenVLProcessor
from unimm.vlms.qwen2_5_vl.vision import cell_positions, window_order

EXPECTS = 'config.json with model_type "qwen2_5_vl"'
LOGITS = 2e-4  # of the largest value stored: a product with the whole vocabulary behind all layers
Shown = tuple[Tensor, PatchGrid]  # patches of an image and their grid


def recognise(folder: Path) -> bool:
    """Whether a case's files are a Qwen2.5-VL's."""
    config = folder / "config.json"
    return config.exists() and json.loads(config.read_text()).get("model_type") == "qwen2_5_vl"


@torch.inference_mode()
def check(case: Case) -> None:
    """Compare every group that the case stores. A group that cannot run is a failed row, the others still run."""
    model = QwenVL.from_pretrained(case.folder)
    notes = json.loads((case.outputs / "io.json").read_text())
    for entry in notes.get("smart_resize_cases", []):
        size = smart_resize(*(entry[name] for name in ("h", "w", "factor", "min_pixels", "max_pixels")))
        case.compare_note(f"smart_resize {entry['h']}x{entry['w']} by {entry['factor']}", [*size], entry["out"])
    names = sorted({name.partition(".")[0] for name in case.names(r"image\d+\..*")}, key=lambda name: int(name[5:]))
    groups: dict[str, Callable] = dict.fromkeys(names, check_image)
    groups |= {"images": check_images} if case.names(r"images\..*") else {}
    groups |= {name.partition(".")[0]: check_run for name in case.names(r"\w+\.input_ids")}
    for group, run in groups.items():
        try:
            run(case, model, group, names)
        except (KeyError, ValueError, RuntimeError, StopIteration) as error:  # noqa: PERF203 a few groups
            case.miss(f"{group}: the whole group", f"stopped at {type(error).__name__}: {error}")


def stored(case: Case, name: str) -> Shown:
    """An image as the original preprocessed it, so that a difference there shows in one place only."""
    t, h, w = case.tensors[f"{name}.grid_thw"][0].tolist()
    return case.tensors[f"{name}.pixel_values"], (t, h, w)


def check_image(case: Case, model: QwenVL, group: str, names: list[str]) -> None:
    """An image alone: preprocessing and features."""
    if f"{group}.raw_uint8" in case:
        patches, grid = model.config.image_processor.to_patches(
            [Image.fromarray(case.input(f"{group}.raw_uint8").numpy())]
        )
        case.compare(f"{group}.pixel_values", patches)
        case.compare(f"{group}.grid_thw", torch.tensor([grid]))
    else:
        case.input(f"{group}.pixel_values")
        case.input(f"{group}.grid_thw")
    patches, grid = stored(case, group)
    case.compare(f"{group}.vision_features", model.vision(patches, [grid]))


def check_images(case: Case, model: QwenVL, group: str, names: list[str]) -> None:
    """All images in one call, and their windows."""
    patches, grids = zip(*(stored(case, name) for name in names), strict=True)
    case.compare("images.vision_features", model.vision(torch.cat(patches), grids))
    m = model.config.vision.spatial_merge_size
    order, lengths = window_order([cell_positions(grid, m) for grid in grids], model.config.vision.window_cells)
    case.compare("images.window_index", order)
    case.compare("images.cu_window_seqlens", torch.tensor([0, *lengths]).cumsum(0) * m * m)


def items_of(prompts: QwenVLProcessor, ids: list[int], pictures: list[Shown]) -> list[Part]:
    """A row of ids as items: each run of placeholders is the first image left that has as many cells."""
    left, shown, at = list(pictures), [], 0
    while at < len(ids):
        length = next((n for n, one in enumerate(ids[at:]) if one != prompts.special_tokens.image_pad), len(ids) - at)
        if length:
            found = next(
                i
                for i, (_, grid) in enumerate(left)
                if len(cell_positions(grid, prompts.vision_config.spatial_merge_size)) == length
            )
            shown.append(left.pop(found))
        at += length + 1
    return prompts.ids_to_parts(ids, shown)


def padded(rows: Tensor, mask: Tensor, like: Tensor) -> Tensor:
    """Packed rows [N, ...] where the mask [B, T] is, elsewhere what is stored [B, T, ...]: nothing to compare."""
    out = like.clone() if like.is_floating_point() else torch.ones_like(like)  # the padding's position is 1
    out[mask] = rows.to(out.dtype)
    return out


def check_run(case: Case, model: QwenVL, group: str, names: list[str]) -> None:
    """A batch of left-padded rows: positions, every stored hidden state, logits, and greedy text."""
    mask = case.input(f"{group}.attention_mask").bool()
    pictures = [stored(case, name) for name in names]
    rows = zip(case.input(f"{group}.input_ids"), mask, strict=True)
    samples = [items_of(model.processor, ids[real].tolist(), pictures) for ids, real in rows]
    batch, layers = pack_sequences(samples), model.config.decoder.n_layers
    at = model.position_ids(batch)
    at = at if at.ndim == 2 else at[:, None].expand(-1, 3)
    like = torch.zeros(*mask.shape, 3, dtype=torch.long)
    case.compare(f"{group}.position_ids", padded(at, mask, like).movedim(-1, 0))
    case.compare(f"{group}.rope_deltas", torch.tensor(batch.layout.next_positions)[:, None] - mask.shape[1])
    outs: list[Tensor] = [model.embed(batch)]
    hooks = [
        block.register_forward_hook(lambda module, args, out: outs.append(out[EXPERT]))
        for block in model.decoder.blocks
    ]
    hidden = model.last_hidden_state(batch)
    for hook in hooks:
        hook.remove()
    for name in case.names(rf"{group}\.hidden\.\d+"):
        depth = int(name.rpartition(".")[2])
        case.compare(
            name, padded(hidden if depth == layers else outs[depth], mask, case.tensors[name]), note="real rows"
        )
    if f"{group}.logits" in case:
        logits = padded(model.decoder.head(hidden), mask, case.tensors[f"{group}.logits"])
        case.compare(f"{group}.logits", logits, note="real rows", share=LOGITS)
    if f"{group}.greedy" in case:
        case.compare(f"{group}.greedy", greedy(model, samples, case.tensors[f"{group}.greedy"].shape[1]))


def greedy(model: QwenVL, samples: list[list[Part]], steps: int) -> Tensor:
    """The likeliest ids after each sample [B, steps], with a cache; nothing ends them."""
    contexts, last = model.prefill_prompts(samples)
    session, ids = model.decode_session(contexts, steps), [torch.tensor(last)]
    for _ in range(steps):
        ids.append(model.decode_step(session, ids[-1]).argmax(-1))
    return torch.stack(ids[1:], 1)
