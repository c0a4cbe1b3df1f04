"""Training as a BAGEL case stores it: plans to packs, their layout, losses and gradients. docs/originals/bagel.md."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from parity.case import Case
from unimm.generation.flow import shift_timesteps
from unimm.models.bagel.model import Bagel
from unimm.models.bagel.weights import KEY_MAP
from unimm.nn.patches import patchify
from unimm.sequence.packing import PackedBatch, pack_sequences
from unimm.sequence.parts import IGNORE_INDEX, Part, image_part
from unimm.training.tasks.bagel_plans import ConditionDropout, PlannedPart, drop_conditions


class Plan:
    """A stored plan as the library's parts: what the original's packing was given."""

    def __init__(self, case: Case, model: Bagel, note: Mapping[str, Any]) -> None:
        self.case, self.model, self.note = case, model, note
        self.normals = iter(note.get("timestep_normals", ()))
        self.n_timesteps, self.timestep = 0, 0.0
        sequence = note.get("random_sequence", ["then 1"])
        given = [value for value in sequence if not isinstance(value, str)]
        rest = [float(value.split()[-1]) for value in sequence if isinstance(value, str)]
        self.random = chain(given, repeat(rest[-1] if rest else 1.0))
        self.n_random = 0

    def samples(self) -> list[list[Part]]:
        """The parts of each sample that its dropout leaves, image contents still empty."""
        dropout = ConditionDropout(**self.note.get("dropout_probs", {}))
        return [
            drop_conditions([self.part(entry) for entry in entries], dropout, self.rand)
            for entries in self.note["plan"]
        ]

    def rand(self) -> float:
        self.n_random += 1
        return next(self.random)

    def part(self, entry: Mapping[str, Any]) -> PlannedPart:
        """One entry of a plan."""
        make = {"text": self.text, "vae_image": self.latent, "vit_image": self.patches}[entry["type"]]
        return PlannedPart(make(entry), droppable=entry["enable_cfg"] == 1)

    def text(self, entry: Mapping[str, Any]) -> Part:
        ids = self.case.input(entry["text"]).tolist()
        part = (self.model.processor.answer_part if entry["loss"] else self.model.processor.text_part)(ids)
        return replace(part, labels=torch.cat((part.labels[:-1], torch.tensor([self.end_label(entry)]))))

    def latent(self, entry: Mapping[str, Any]) -> Part:
        config, loss, starts = self.model.config, bool(entry["loss"]), entry.get("split_start", True)
        if starts:
            self.first = entry
        if loss and starts:
            raw = torch.tensor(next(self.normals))
            self.timestep = float(shift_timesteps(raw.sigmoid(), config.train_timestep_shift))
            self.n_timesteps += 1
        side = [n * config.latent_patch_size for n in entry["grid"]]
        empty = torch.zeros(config.vae.latent_channels, *side)
        part = self.model.processor.latent_part(empty, timestep=self.timestep if loss else 0.0, noised=loss)
        grouped = "frame_delta" in self.first
        frame = (entry.get("frame_delta", 0 if loss else 1), not starts) if grouped else None
        return self.with_end_label(part, entry, frame)

    def patches(self, entry: Mapping[str, Any]) -> Part:
        side = [n * self.model.config.vision.patch_size for n in entry["grid"]]
        return self.with_end_label(
            self.model.processor.vit_part(torch.zeros(self.model.config.vision.channels, *side)), entry, None
        )

    def with_end_label(self, part: Part, entry: Mapping[str, Any], frame: tuple[int, bool] | None) -> Part:
        """An image's part with a label at its closing special token, or as a frame of a video."""
        again = {"boundary_ids": tuple(part.ids.tolist()), "timestep": part.timestep, "noised": part.noised}
        return image_part(
            part.kind, part.tokens, part.image_position_ids, **again, video_frame=frame, end_label=self.end_label(entry)
        )

    @staticmethod
    def end_label(entry: Mapping[str, Any]) -> int:
        return entry["special_token_label"] if entry.get("special_token_loss") else IGNORE_INDEX


def check_plan(case: Case, model: Bagel, group: str) -> None:
    """A plan's packed layout and, where stored, its losses and gradients."""
    note = case.input_note(group)
    plan = Plan(case, model, note)
    samples = plan.samples()
    if f"{group}.padded_images" in case:
        samples = filled(case, model, group, samples)
    batch = pack_sequences(samples)
    check_layout(case, group, batch, samples, model.config.train_timestep_shift)
    check_note(case, group, batch, plan)
    if f"{group}.flow_noise" in case:
        check_losses(case, model, group, batch)


@torch.no_grad()
def filled(case: Case, model: Bagel, group: str, samples: Sequence[Sequence[Part]]) -> list[list[Part]]:
    """The same items with their images: latents of the padded batch cut to size, patches from the stored rows."""
    padded = case.input(f"{group}.padded_images")
    latents = model.vae.encode(padded, noise=case.input(f"{group}.vae_eps"))
    note = "encoded together as the original does; the library encodes each image apart"
    case.compare(f"{group}.padded_latent", latents, note=note)
    grids = iter(zip(latents, case.input_note(group)["vae_latent_shapes"], strict=True))
    lengths = [len(part.tokens) for part in chain(*samples) if part.kind == "und_image"]
    patches = iter(case.input(f"{group}.vit_tokens").split(lengths) if lengths else ())
    p = model.config.latent_patch_size

    def fill(part: Part) -> Part:
        if part.kind == "gen_image":
            latent, (h, w) = next(grids)
            return replace(part, tokens=patchify(latent[:, : h * p, : w * p], p))
        return replace(part, tokens=next(patches)) if part.kind == "und_image" else part

    return [[fill(part) for part in items] for items in samples]


def check_layout(case: Case, group: str, batch: PackedBatch, samples: Sequence[Sequence[Part]], shift: float) -> None:
    """Mask, rows, ids, positions, labels and times of a pack."""
    none = torch.zeros(0, dtype=torch.long)
    at = batch.labels != IGNORE_INDEX
    found = {
        "mask": batch.layout.mask.dense(),
        "packed_text_ids": batch.ids,
        "packed_text_indexes": batch.id_rows,
        "packed_position_ids": batch.layout.position_ids,
        "packed_vae_token_indexes": batch.gen_images.rows if batch.gen_images else none,
        "packed_vit_token_indexes": batch.und_images.rows if batch.und_images else none,
        "packed_label_ids": batch.labels[at],
        "ce_loss_indexes": batch.id_rows[at],
        "mse_loss_indexes": batch.gen_images.rows[batch.noised] if batch.gen_images else none,
        "vit_token_seqlens": torch.tensor(batch.und_images.lengths) if batch.und_images else none,
        "vit_position_ids": batch.und_images.image_position_ids if batch.und_images else none,
        "latent_position_ids": batch.gen_images.image_position_ids if batch.gen_images else none,
        "timesteps": batch.timesteps,
        "packed_timesteps_raw": torch.logit(shift_timesteps(batch.timesteps, 1 / shift)),
        "ce_loss_weights": batch.label_weights[batch.labels != IGNORE_INDEX],
    }
    for name, ours in found.items():
        case.compare(f"{group}.{name}", ours)


def check_note(case: Case, group: str, batch: PackedBatch, plan: Plan) -> None:
    """The counts that `meta` holds beside a plan."""
    blocks = list(chain(*batch.layout.mask.samples))
    grids = [[*entry["grid"]] for entries in plan.note["plan"] for entry in entries if entry["type"] == "vae_image"]
    ours = {
        "sample_lens": [*batch.layout.lengths],
        "split_lens": [block.length for block in blocks],
        "attn_modes": ["noise" if not block.visible else "full" if block.full else "causal" for block in blocks],
        "random_draws": plan.n_random,
        "timestep_draws": plan.n_timesteps,
    }
    for name, value in ours.items():
        if name in plan.note:
            case.compare_note(f"{group}: {name}", value, plan.note[name])
    if "random_sequence" not in plan.note and "vae_latent_shapes" in plan.note:
        case.compare_note(f"{group}: vae_latent_shapes", grids, plan.note["vae_latent_shapes"])


def check_losses(case: Case, model: Bagel, group: str, batch: PackedBatch) -> None:
    """Losses of every token, their means, and every parameter's gradient."""
    losses = model(batch, case.input(f"{group}.flow_noise"))
    case.compare(f"{group}.ce", losses.ce)
    case.compare(f"{group}.mse", losses.mse)
    weights = batch.label_weights[batch.labels != IGNORE_INDEX]
    ce, mse = losses.ce.mean(), losses.mse.mean()
    means = {"ce": ce, "mse": mse, "ce_reweighted": (losses.ce * weights).sum() / weights.sum()}
    total = ce + mse
    for name, stored in case.input_note(f"{group}.loss", {}).items():
        if scale := re.fullmatch(r"total_(\d)(\d*)", name):
            total = float(f"{scale[1]}.{scale[2] or 0}") * ce + mse
        ours = float(means.get(name, total).detach())
        case.compare_scalar(f"{group}.loss: {name}", ours, stored, largest=abs(stored))
    check_gradients(case, model, group, total)


def check_gradients(case: Case, model: Bagel, group: str, total: Tensor) -> None:
    """Gradients by their released names. A norm that the mathematics makes 0 (a key's bias) is held to the largest."""
    parameters = {key: p for name, p in model.named_parameters() for key in KEY_MAP.released_tensors(name)}
    names = [key for key, p in parameters.items() if p.requires_grad]
    found = torch.autograd.grad(total, [parameters[key] for key in names], allow_unused=True)
    grads = dict(zip(names, found, strict=True))
    for name in case.names(rf"{group}\.grad\..*"):
        key = name.removeprefix(f"{group}.grad.")
        if grads.get(key) is None:
            case.miss(name, "ours has no gradient")
        else:
            case.compare(name, grads[key])
    stored = case.input_note(f"{group}.grad_norm", {})
    most = max(filter(None, stored.values()), default=0.0)
    for key, norm in stored.items():
        ours = None if grads.get(key) is None else float(grads[key].norm())
        case.compare_scalar(f"{group}.grad_norm: {key}", ours, norm, largest=max(norm or 0.0, 1e-3 * most))
    for key in grads.keys() - stored.keys() if stored else ():
        case.miss(f"{group}.grad_norm: {key}", "no norm is stored for this parameter of ours")
