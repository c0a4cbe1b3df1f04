"""What a JanusFlow case stores, computed by unimm.models.janusflow.model: one function a group of stored outputs.

Every number comes from the case's own files. What the model computes on its way is caught at its modules' doors.
docs/originals/janusflow.md. What a group does not know stays "not compared" in the account.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parity.case import Case
from unimm.kernels import attention
from unimm.models.janusflow.config import EXPERT
from unimm.models.janusflow.model import JanusFlow
from unimm.models.janusflow.processor import bos_unconditional
from unimm.nn.patches import patchify
from unimm.sequence.packing import PackedBatch, pack_sequences
from unimm.sequence.parts import Part, text_part

EXPECTS = "config.json with vision_gen_enc_config"


def recognise(folder: Path) -> bool:
    """Whether a case's files are a JanusFlow's."""
    config = folder / "config.json"
    return config.exists() and "vision_gen_enc_config" in json.loads(config.read_text())


@torch.inference_mode()
def check(case: Case) -> None:
    """Compare every group that the case stores. A group that cannot run is a failed row, the others still run."""
    model, special = JanusFlow.from_pretrained(case.folder), json.loads((case.folder / "special.json").read_text())
    if "gen/noise" in case:
        model.config = replace(model.config, latent_size=tuple(case.tensors["gen/noise"].shape[2:]))
    for group, run in {"und": check_understanding, "gen": check_drawing, "train": check_training}.items():
        if not case.names(f"{group}/.*"):
            continue
        try:
            run(case, model, special)
        except (KeyError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            case.miss(f"{group}: the whole group", f"stopped at {type(error).__name__}: {error}")


@contextmanager
def watched(**modules: torch.nn.Module) -> Iterator[dict[str, list[tuple[Any, Any]]]]:
    """(arguments, output) of every call of some modules, by name."""
    seen: dict[str, list[tuple[Any, Any]]] = {name: [] for name in modules}
    hooks = [
        module.register_forward_hook(lambda _, given, made, name=name: seen[name].append((given, made)))
        for name, module in modules.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def plain(batch: PackedBatch) -> Any:
    """An attention over a pack alone."""
    return lambda layer, q, k, v: attention(q, k, v, batch.layout.mask)


# ---- looking


def row_items(model: JanusFlow, ids: Sequence[int], pictures: Sequence[Tensor], *, image: int) -> list[Part]:
    """Stored ids without pads, placeholders in them, as items: an image takes its run of placeholders and both
    neighbours."""
    items: list[Part] = []
    at, n = 0, model.vision.grid_side**2
    for pixels in pictures:
        first = ids.index(image, at)
        items += [text_part(ids[at : first - 1])] if first - 1 > at else []
        items.append(model.processor.und_image_part(pixels, (ids[first - 1], ids[first + n])))
        at = first + n + 1
    return [*items, text_part(ids[at:])] if at < len(ids) else items


def check_understanding(case: Case, model: JanusFlow, special: dict) -> None:
    """Tower, rows of the language model, hidden states and logits of a left-padded batch."""
    ids, seen = case.input("und/input_ids"), case.input("und/attention_mask").bool()
    pixels, held = case.input("und/pixel_values"), case.input("und/images_emb_mask").bool()
    case.input("und/images_seq_mask")
    case.compare("und/features", model.vision(pixels.flatten(0, 1)))
    shown = [some[there.any(-1)] for some, there in zip(pixels, held, strict=True)]
    rows = [
        row_items(model, row[mask].tolist(), list(some), image=special["image"])
        for row, mask, some in zip(ids, seen, shown, strict=True)
    ]
    batch = pack_sequences(rows)
    hidden = model.backbone(batch, plain(batch))[EXPERT]
    last = model.decoder.norms[EXPERT](hidden)

    def padded(x: Tensor, pads: Tensor) -> Tensor:
        return pads.masked_scatter(seen.view(*seen.shape, *[1] * (pads.ndim - 2)), x)

    case.compare("und/inputs_embeds", padded(model.embed(batch), model.decoder.embed(ids)))
    case.compare("und/last_hidden", padded(last, torch.zeros(*ids.shape, last.shape[-1])))
    case.compare(
        "und/logits", padded(model.decoder.head(last), torch.zeros(*ids.shape, model.config.decoder.vocab_size))
    )
    # what stands at pads is nobody's business
    case.compare("und/position_ids", padded(batch.layout.position_ids, case.tensors["und/position_ids"]))


# ---- drawing


def check_drawing(case: Case, model: JanusFlow, special: dict) -> None:
    """Every step from noise to latents under guidance, and what passes between the modules at the first of them."""
    tokens, noise = case.input("gen/tokens"), case.input("gen/noise")
    n, steps = len(noise), len(case.tensors["gen/velocities"])
    prompts = [[text_part(row[:-1].tolist())] for row in tokens[:n]]
    case.compare("gen/prompt_embeds", model.decoder.embed(tokens[:, :-1]))
    height, width = (model.config.gen_encoder.grid_size(side) for side in noise.shape[2:])
    seen = torch.ones(len(tokens), tokens.shape[1] + height * width)
    for row, prompt in enumerate(prompts):
        first, gap = bos_unconditional(prompt)
        seen[n + row, first.segment.length : first.segment.length + gap.segment.advance] = 0
    case.compare("gen/attention_mask", seen.int())
    with watched(
        encoder=model.gen_encoder,
        norm=model.gen_decoder_norm,
        grid=model.gen_decoder_aligner,
        painter=model.gen_decoder,
    ) as calls:
        final = model.denoise(prompts, noise, guidance=[float(special["cfg_weight"])] * n, steps=steps)
    entered = [made for _, made in calls["encoder"]]
    case.compare("gen/enc_out0", twice(entered[0][0]))
    case.compare("gen/t_emb1", twice(entered[min(1, steps - 1)][1]))
    case.compare("gen/llm_hidden0", calls["norm"][0][0][0])
    case.compare("gen/dec_in0", calls["grid"][0][1])
    case.compare("gen/velocities", torch.stack([made for _, made in calls["painter"]]))
    given = [x for (x, _), _ in calls["encoder"]]
    case.compare("gen/latents", torch.stack([*given[1:], final]))
    case.compare("gen/final", final)
    case.compare("gen/vae_input", final / special["vae_scaling_factor"])


def twice(x: Tensor) -> Tensor:
    """The original computes both halves of the batch, with and without the prompt."""
    return torch.cat((x, x))


# ---- training


def check_training(case: Case, model: JanusFlow, special: dict) -> None:
    """Velocity and loss at the time that the description names; the original's time is one less ours."""
    clean, noise = case.input("train/x1"), case.input("gen/noise")
    stated = re.search(r"\bt=(\d*\.?\d+)", case.description("train/v"))
    if not stated:
        raise ValueError(f"no time in {case.description('train/v')!r}: expected t=...")
    prompts = case.input("gen/tokens")[: len(clean)]
    time = 1 - float(stated[1])
    drawn = [model.latent_part(latent, special["boi"], timestep=time) for latent in clean]
    batch = pack_sequences([[text_part(row[:-1].tolist()), item] for row, item in zip(prompts, drawn, strict=True)])
    noises = torch.cat([patchify(one, model.config.latent_patch_size) for one in noise])
    with watched(painter=model.gen_decoder) as calls:
        losses = model(batch, noises)
    case.compare("train/v", calls["painter"][0][1])
    case.compare("train/loss", losses.mse.mean()[None])
