"""What a case of the FLUX transformer stores: packing, velocity and the sampler's path, in both layouts of the
weights."""

from __future__ import annotations

import json
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parity.case import Case
from unimm.checkpoint.load import read_shapes
from unimm.denoisers.flux import FluxConfig, FluxTransformer, flux_position_ids
from unimm.denoisers.mmdit import modulation_per_step, patchify_latents, unpatchify_latents
from unimm.generation.flow import dynamic_shift, euler, flow_timesteps
from unimm.nn.rope import ROPE_THETA

EXPECTS = 'config.json with _class_name "FluxTransformer2DModel"'
BFL = "model_bfl.safetensors"


def recognise(folder: Path) -> bool:
    """Whether a case's files are a FLUX transformer's."""
    config = folder / "config.json"
    return config.exists() and json.loads(config.read_text()).get("_class_name") == "FluxTransformer2DModel"


@torch.inference_mode()
def check(case: Case) -> None:
    """Compare places, packing, and all that the transformer gives, from each layout that is there."""
    notes = json.loads((case.outputs / "io.json").read_text())
    noise = case.input("noise")
    height, width = noise.shape[2:]
    case.compare("packed", patchify_latents(noise))
    case.compare("img_ids", flux_position_ids(height // 2, width // 2))
    times = check_times(case, notes, height * width // 4)
    for path in (case.folder, case.folder / BFL):
        if path.exists():
            check_model(case, FluxTransformer.from_pretrained(path), times, height=height, width=width)
    if (case.folder / BFL).exists():
        check_sizes(case, notes["bfl_params"])


def check_times(case: Case, notes: dict[str, Any], tokens: int) -> Tensor:
    """The sampler's times, by the stored scheduler."""
    told = notes["scheduler"]
    shift = told["shift"]
    if told["use_dynamic_shifting"]:
        low = (told["base_image_seq_len"], told["base_shift"])
        shift = dynamic_shift(tokens, low=low, high=(told["max_image_seq_len"], told["max_shift"]))
        case.compare_scalar("mu", log(shift), notes["mu"], largest=abs(notes["mu"]))
    times = flow_timesteps(notes["num_steps"], shift)
    case.compare("sampling.sigmas", times)
    case.compare("sampling.timesteps", told["num_train_timesteps"] * times[:-1])
    return times


def check_model(case: Case, flux: FluxTransformer, times: Tensor, *, height: int, width: int) -> None:
    """The velocity at the stored times, and every step from noise."""
    text, pooled = case.input("encoder_hidden_states"), case.input("pooled_projections")
    guidance = case.input("guidance") if "guidance" in case else None
    condition = flux.condition(text, case.tensors["img_ids"], text_position_ids=case.input("txt_ids"))
    (at_stored,) = flux.modulations(case.input("timestep")[None], pooled, guidance=guidance)
    case.compare("velocity", flux(case.tensors["packed"], condition, at_stored))
    steps = modulation_per_step(flux, condition, flux.modulations(times[:-1], pooled, guidance=guidance))
    path = []

    def recorded(x: Tensor, timesteps: Tensor) -> Tensor:
        path.append(x)
        return steps(x, timesteps)

    final = euler(recorded, case.tensors["packed"], times)
    for i, x in enumerate([*path[1:], final]):
        case.compare(f"sampling.latents.{i}", x)
    case.compare("sampling.final_unpacked", unpatchify_latents(final, height=height, width=width))


def check_sizes(case: Case, told: dict[str, Any]) -> None:
    """The stored parameters of Black Forest Labs' layout, as the shapes of the tensors tell them."""
    axes = tuple(told["axes_dim"])
    config = FluxConfig.from_shapes(read_shapes([case.folder / BFL]), axes)
    files = json.loads((case.folder / "config.json").read_text())
    case.compare_note("bfl_params: config.json", config, FluxConfig.from_json(files))
    ours = {
        "in_channels": config.in_channels,
        "vec_in_dim": config.pooled_dim,
        "context_in_dim": config.text_dim,
        "hidden_size": config.mmdit.dim,
        "mlp_ratio": config.mlp_ratio,
        "num_heads": config.n_heads,
        "depth": config.n_double_blocks,
        "depth_single_blocks": config.n_single_blocks,
        "guidance_embed": config.guidance_embeds,
        "qkv_bias": True,
        "theta": ROPE_THETA,
    }
    for name, number in ours.items():
        case.compare_note(f"bfl_params: {name}", number, told[name])
