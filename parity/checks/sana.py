"""What a case of the Sana transformer stores: velocities, what lies between, and images by both samplers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from parity.case import Case
from unimm.denoisers.sana import TIMESTEP_SCALE, SanaTransformer
from unimm.generation.flow import (
    Velocity,
    dpm_solver_pp,
    dpm_timesteps,
    euler,
    floor_timesteps,
    reshifted_timesteps,
)

EXPECTS = 'config.json with _class_name "SanaTransformer2DModel"'


def recognise(folder: Path) -> bool:
    """Whether a case's files are a Sana transformer's."""
    config = folder / "config.json"
    return config.exists() and json.loads(config.read_text()).get("_class_name") == "SanaTransformer2DModel"


@torch.inference_mode()
def check(case: Case) -> None:
    """Compare the transformer, its parts, and both samplers."""
    sana = SanaTransformer.from_pretrained(case.folder)
    latents, caption = case.input("hidden_states"), case.input("encoder_hidden_states")
    times = case.input("timestep").float() / TIMESTEP_SCALE
    seen = sana.condition(caption, case.input("encoder_attention_mask"))
    case.compare("velocity", sana(latents, times, seen))
    case.compare("velocity_nomask", sana(latents, times, sana.condition(caption)))
    x = rearrange(sana.patch_embed(latents), "B D h w -> B (h w) D")
    case.compare("stage.patch_embed", x)
    embedded, shifts = sana.embed_timesteps(times)
    case.compare("stage.time_embed", embedded)
    case.compare("stage.time_embed6", shifts.flatten(1))
    case.compare("stage.caption", seen.tokens)
    # these are of the stored patches, so that they stand alone
    x = case.tensors["stage.patch_embed"]
    block, height = sana.blocks[0], latents.shape[2] // sana.config.patch_size
    case.compare("stage.attn1_block0_of_patch_embed", block.attention(x))
    mixed = block.mlp(rearrange(x, "B (h w) D -> B h w D", h=height))
    case.compare("stage.ff_block0_of_patch_embed", rearrange(mixed, "B h w D -> B D h w"))
    check_sampling(case, sana, json.loads((case.outputs / "io.json").read_text()))


def check_sampling(case: Case, sana: SanaTransformer, notes: dict[str, Any]) -> None:
    """The times and the latents after every step, with the stored guidance."""
    noise, steps, schedulers = case.input("sampling.noise"), notes["steps"], notes["schedulers"]
    condition = sana.condition(case.input("sampling.condition"))
    v = guided(sana, condition.select_rows(torch.tensor([0] * len(noise) + [1] * len(noise))), notes["guidance_scale"])
    dpm_config, euler_config = schedulers["dpm"], schedulers["euler"]
    trained = dpm_config["num_train_timesteps"]
    knots = dpm_timesteps(steps, shift=dpm_config["flow_shift"], train_steps=trained)
    for name, times, sampler, cut in (
        ("dpm", knots, dpm_solver_pp, True),
        (
            "euler",
            reshifted_timesteps(steps, euler_config["shift"], train_steps=euler_config["num_train_timesteps"]),
            euler,
            False,
        ),
    ):
        told, path = [], []

        def recorded(x: Tensor, timesteps: Tensor, told: list = told, path: list = path) -> Tensor:
            told.append(TIMESTEP_SCALE * timesteps[0].item())
            path.append(x)
            return v(x, timesteps)

        def integer(x: Tensor, timesteps: Tensor, velocity: Velocity = recorded) -> Tensor:
            return velocity(x, floor_timesteps(timesteps, train_steps=trained))

        final = sampler(integer if cut else recorded, noise, times)
        case.compare(f"sampling.{name}.sigmas", times)
        case.compare(f"sampling.{name}.timesteps", torch.tensor(told))
        for i, x in enumerate([*path[1:], final]):
            case.compare(f"sampling.{name}.latents.{i}", x)


def guided(sana: SanaTransformer, condition: Any, scale: float) -> Velocity:
    """Guidance under a condition of twice the rows: first those without the caption."""

    def velocity(x: Tensor, timesteps: Tensor) -> Tensor:
        plain, told = sana(torch.cat((x, x)), timesteps.float().repeat(2), condition).chunk(2)
        return plain + scale * (told - plain)

    return velocity
