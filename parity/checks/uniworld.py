"""What a case of UniWorld stores: what is read, seen, decided and told; every step of drawing; references; the loss."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from parity.case import Case
from unimm.denoisers.flux import flux_position_ids
from unimm.denoisers.mmdit import PATCH_SIZE, patchify_latents
from unimm.generation.flow import dynamic_shift, flow_timesteps, shift_timesteps
from unimm.models.uniworld.model import UniWorld
from unimm.models.uniworld.network import MLLMOutput
from unimm.models.uniworld.processor import ASSISTANT

EXPECTS = 'config.json with model_type "univa_qwen2p5vl"'
# gradients are stored under names with the dots replaced
OURS = {"denoise_projector": "mllm_projector", "siglip_projector": "siglip_projector", "vae_projector": "vae_projector"}
LAYERS = {"0": "fc1", "2": "fc2"}
PADDED = "the original attends to padding, and projects it; here a row of a batch is what it is alone"


def recognise(folder: Path) -> bool:
    """Whether a case's files are UniWorld's."""
    config = folder / "config.json"
    return config.exists() and json.loads(config.read_text()).get("model_type") == "univa_qwen2p5vl"


def check(case: Case) -> None:
    """Compare every run, the padded batch, references, and the loss."""
    notes = json.loads((case.outputs / "io.json").read_text())
    model = UniWorld.from_pretrained(case.folder)
    limits = {name: notes[name] for name in ("min_pixels", "max_pixels") if name in notes}
    reader = model.config.mllm
    model.config = replace(
        model.config, mllm=replace(reader, image_processor=replace(reader.image_processor, **limits))
    )
    model.mllm.config = model.config.mllm
    images = [Image.fromarray(case.input(name).numpy()) for name in sorted(case.names(r"image\d+\.raw_uint8"))]
    check_notes(case, model, notes)
    runs = {name: check_run(case, model, name, images, notes) for name in notes["runs"]}
    if "batch.input_ids" in case:
        check_batch(case, model, runs)
    check_references(case, model, runs, notes)
    if "loss.x0" in case:
        check_loss(case, model, runs, notes)


def check_notes(case: Case, model: UniWorld, notes: dict[str, Any]) -> None:
    """Ids that are looked up by their strings, and the widths that no config says."""
    words = model.mllm.processor.text_tokenizer
    case.compare_note("assistant_token_id", words.encode(ASSISTANT), [notes["assistant_token_id"]])
    for string, stored in notes.get("special_ids", {}).items():
        case.compare_note(f"special_ids: {string}", words.token_id(string), stored)
    linears = {"siglip_projector": model.siglip_projector, "denoise_projector": model.mllm_projector,
               "vae_projector": model.vae_projector, "task_head": model.task_head}  # fmt: skip
    for name, stored in notes.get("tiny_widths", {}).items():
        one = linears[name]
        ours = [] if one is None else [one.fc1.in_features, one.fc1.out_features, one.fc2.out_features]
        case.compare_note(f"tiny_widths: {name}", ours, stored)


@torch.inference_mode()
def check_run(case: Case, model: UniWorld, name: str, images: list[Image.Image], notes: dict[str, Any]) -> MLLMOutput:
    """One prompt: its ids and patches, what is read and told, and the way from noise."""
    run = notes["runs"][name]
    shown = images[: run["images"]]
    (reading,) = model.encode_prompts([model.processor.prompt_parts(run["text"], shown)])
    looks = model.auxiliary.encode_siglip(shown) if shown else None
    case.compare(f"{name}.input_ids", ids(model, reading)[None])
    resize = model.config.mllm.image_processor
    once = [resize(image) for image in shown]
    case.compare_note(f"{name}.first_resize", [[one.height, one.width] for one in once], run["first_resize"])
    if once:
        patches, grids = zip(*(resize.to_patches([one]) for one in once), strict=True)
        case.compare(f"{name}.pixel_values", torch.cat(patches))
        case.compare(f"{name}.image_grid_thw", torch.tensor(grids))
        case.compare(f"{name}.siglip_hidden", looks)
    case.compare(f"{name}.vlm_hidden", reading.hidden_states[None])
    case.compare(f"{name}.task_vector", model.task_head_state([reading.parts], [reading.hidden_states]))
    case.compare(f"{name}.task_logits", model.route_logits(reading))
    (told,) = model.condition([reading.parts], [reading.hidden_states], looks)
    case.compare(f"{name}.condition", told[None])
    check_drawing(case, model, name, told, notes)
    return reading


def ids(model: UniWorld, reading: MLLMOutput) -> Tensor:
    """A sample's ids as the original has them: a placeholder for each of an image's cells."""
    image = model.config.mllm.special_tokens.image_pad
    return torch.cat([torch.cat((one.ids, torch.full((one.n_tokens,), image))) for one in reading.parts])


def check_drawing(case: Case, model: UniWorld, name: str, told: Tensor, notes: dict[str, Any]) -> None:
    """Every step with T5's states behind what is told, or before it, and the end without them."""
    noise, pooled, t5 = (case.input(one) for one in (f"{name}.noise", "pooled", "t5_embeds"))
    times = check_times(case, f"{name}.sigmas", noise.shape[2] * noise.shape[3] // PATCH_SIZE**2, notes)
    joined, how = torch.cat((told, t5[0])), {"pooled": pooled, "guidance": notes["guidance_scale"]}
    way = [*path(model, joined, noise, times, **how)]
    for i, x in enumerate(way):
        case.compare(f"{name}.latents.{i}", x)
    *_, plain = path(model, told, noise, times, **how)
    case.compare(f"{name}.latents_final_no_t5", plain)
    v = model.velocity([joined], noise, torch.tensor([0.44]), pooled=pooled, guidance=1.0)
    case.compare(f"{name}.velocity_t044_g1", patchify_latents(v))
    *_, first = path(model, torch.cat((t5[0], told)), noise, times, **how)
    # the order of what is told does not matter: both differences are rounding
    apart, stored = float((first - way[-1]).abs().max()), notes["runs"][name]["t5_first_max_abs_diff"]
    case.compare_scalar(f"{name}.t5_first_max_abs_diff", apart, stored, largest=float(way[-1].abs().max()))


def check_times(case: Case, name: str, tokens: int, notes: dict[str, Any]) -> Tensor:
    """The sampler's times by the stored scheduler; with the released numbers they are those of the library."""
    times = flow_timesteps(notes["num_inference_steps"], shift_of(tokens, notes))
    case.compare(name, times)
    return times


def shift_of(tokens: int, notes: dict[str, Any]) -> float:
    """The shift of the stored scheduler for so many tokens."""
    told = notes["scheduler"]
    low = (told["base_image_seq_len"], told["base_shift"])
    high = (told["max_image_seq_len"], told["max_shift"])
    return dynamic_shift(tokens, low=low, high=high) if told["use_dynamic_shifting"] else told["shift"]


def path(
    model: UniWorld, told: Tensor, noise: Tensor, times: Tensor, *, pooled: Tensor, guidance: float
) -> list[Tensor]:
    """Patchified latents after every step."""
    h, w = noise.shape[2:]
    denoiser = model.latent_denoiser([told], (h, w), pooled=pooled, guidance=guidance, schedule=times[:-1])
    x, found = patchify_latents(noise), []
    for t, t_next in pairwise(times):
        x = model.denoise_step(denoiser, x, t[None], t_next[None])
        found.append(x)
    return found


@torch.inference_mode()
def check_batch(case: Case, model: UniWorld, runs: dict[str, MLLMOutput]) -> None:
    """Prompts of several lengths in one pack: each as it is alone, with nothing of the padding."""
    stored, mask = case.input("batch.input_ids"), case.input("batch.attention_mask").bool()
    rows = []
    for row, seen in zip(stored, mask, strict=True):
        same = [name for name, one in runs.items() if torch.equal(ids(model, one), row[seen])]
        if not same:
            case.miss("batch.condition", "a row of the batch is no run's prompt")
            return
        rows.append(same[0])
    readings = model.encode_prompts([runs[name].parts for name in rows])
    looks = [case.tensors[f"{name}.siglip_hidden"] for name in rows if f"{name}.siglip_hidden" in case]
    told = model.condition(
        [one.parts for one in readings], [one.hidden_states for one in readings], torch.cat(looks) if looks else None
    )
    alone = [case.tensors[f"{name}.condition"][0] for name in rows]
    longest = max(len(one) for one in alone)
    for name, ours, apart in (
        ("batch.condition", right(told, longest), right(alone, longest)),
        ("batch.returned_mask", right_mask(told, longest), right_mask(alone, longest)),
    ):
        case.better(name, ours, apart, why=PADDED)


def right(rows: list[Tensor], length: int) -> Tensor:
    """Rows [m, C] behind zeros, as one batch."""
    return torch.stack([torch.cat((row.new_zeros(length - len(row), row.shape[1]), row)) for row in rows])


def right_mask(rows: list[Tensor], length: int) -> Tensor:
    """1 where `right` put a row."""
    return torch.stack([(torch.arange(length) >= length - len(row)).long() for row in rows])


@torch.inference_mode()
def check_references(case: Case, model: UniWorld, runs: dict[str, MLLMOutput], notes: dict[str, Any]) -> None:
    """Latents of references beside the image: their places, the times, and where the way ends."""
    for group in sorted({name.partition(".")[0] for name in case.names(r"ref\w*\.noise")}):
        noise, below = case.input(f"{group}.noise"), case.input(f"{group}.ref_latents")
        h, w = noise.shape[2:]
        below = torch.cat([*below], 1)[None]
        rows = (h + below.shape[2]) // PATCH_SIZE
        case.compare(f"{group}.img_ids", flux_position_ids(rows, w // PATCH_SIZE))
        times = check_times(case, f"{group}.sigmas", rows * w // PATCH_SIZE, notes)
        about = notes["tensors"][f"{group}.latents_final"]["about"]
        run = re.search(r"condition = (\w+)\.condition", about)
        told = case.tensors[f"{run[1] if run else 'edit'}.condition"][0]
        pooled = case.input("pooled")
        denoiser = model.latent_denoiser(
            [told],
            (h, w),
            pooled=pooled,
            guidance=notes["guidance_scale"],
            reference_latents=below,
            schedule=times[:-1],
        )
        final = model.denoise(denoiser, noise, times)
        case.compare(f"{group}.latents_final", torch.cat((patchify_latents(final), patchify_latents(below)), 1))


def check_loss(case: Case, model: UniWorld, runs: dict[str, MLLMOutput], notes: dict[str, Any]) -> None:
    """The time of the draw, the velocity there, the weighted loss, and its gradients."""
    x0, noise, gauss, weights = (case.input(f"loss.{name}") for name in ("x0", "noise", "gaussian", "weight_map"))
    times = shift_timesteps(gauss.sigmoid(), shift_of(x0.shape[2] * x0.shape[3] // PATCH_SIZE**2, notes))
    case.compare("loss.sigma", times)
    run = "edit" if "edit" in runs else [*runs][-1]
    looks = case.tensors.get(f"{run}.siglip_hidden")
    pooled = case.input("pooled")
    told = model.condition([runs[run].parts], [runs[run].hidden_states], looks)
    noised = (1 - times) * x0 + times * noise
    case.compare("loss.pred", model.velocity(told, noised, times, pooled=pooled, guidance=1.0))
    loss = model(told, x0, noise, times, pooled=pooled, weights=weights).mean()
    case.compare("loss.loss", loss)
    loss.backward()
    for name in case.names(r"loss\.grad_\w+"):
        part, layer, kind = name.removeprefix("loss.grad_").rsplit("_", 2)
        case.compare(name, model.get_parameter(f"{OURS[part]}.{LAYERS[layer]}.{kind}").grad)
