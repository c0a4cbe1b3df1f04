"""What a case of MetaQuery stores: prompts, the MLLM's answers, conditions, every step of an image, one step of
training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image

from parity.case import Case
from unimm.denoisers.sana import TIMESTEP_SCALE
from unimm.generation.flow import dpm_timesteps, floor_timesteps, integer_timesteps
from unimm.models.metaquery.model import MetaQuery
from unimm.models.metaquery.processor import ConditionBatch
from unimm.sequence.parts import ImagePart, Part, text_part

EXPECTS = 'config.json with model_type "metaquery"'
PAD = "<|endoftext|>"


def recognise(folder: Path) -> bool:
    """Whether a case's files are a MetaQuery's."""
    config = folder / "config.json"
    return config.exists() and json.loads(config.read_text()).get("model_type") == "metaquery"


@dataclass(frozen=True)
class Stored:
    """What the notes of a case say beside its tensors."""

    ids: dict[str, int]  # by their strings, and the first of the queries' by names of their own
    text: float
    image: float
    steps: int
    runs: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, notes: dict[str, Any]) -> Stored:
        """Read the notes."""
        scales = notes["guidance_scale"], notes["image_guidance_scale"]
        return cls(notes["special_ids"], *scales, notes["num_inference_steps"], notes["runs"])


def check(case: Case) -> None:
    """Compare every group that the case stores. A group that cannot run is a failed row, the others still run."""
    model = MetaQuery.from_pretrained(case.folder)
    notes = json.loads((case.outputs / "io.json").read_text())
    # the original sets the limits itself; a case of small numbers says which it had
    least, most = notes.get("mllm_pixels_override") or (model.config.min_pixels, model.config.max_pixels)
    model.config = replace(model.config, min_pixels=least, max_pixels=most)
    check_notes(case, model, notes)
    stored = Stored.of(notes)
    groups: dict[str, Any] = dict.fromkeys(stored.runs, check_run)
    groups |= {"vel": check_velocity} if case.names(r"vel\..*") else {}
    groups |= {"loss": check_training} if case.names(r"loss\..*") else {}
    for group, run in groups.items():
        try:
            run(case, model, group, stored)
        except (KeyError, ValueError, RuntimeError, StopIteration, AssertionError) as error:  # noqa: PERF203 a few groups
            case.miss(f"{group}: the whole group", f"stopped at {type(error).__name__}: {error}")


def check_notes(case: Case, model: MetaQuery, notes: dict[str, Any]) -> None:
    """Ids of the markers, the length of the MLLM's tokenizer, and how many released tensors are trained."""
    first = model.processor.begin_image_id
    ours = {"begin_of_img": first, "end_of_img": first + 1, "img0": first + 2}
    for name, stored in notes["special_ids"].items():
        case.compare_note(f"special_ids: {name}", ours.get(name, model.processor.text_tokenizer.token_id(name)), stored)
    if "tokenizer_len" in notes:
        case.compare_note(
            "tokenizer_len", model.processor.text_tokenizer.backend.get_vocab_size(), notes["tokenizer_len"]
        )
    if "trainable_parameters" in notes:
        (table,) = model.key_maps().values()
        names = [name for name, _ in model.named_parameters() if not name.startswith(("mllm.", "vae."))]
        trained = {key for name in names for key in table.released_tensors(name)}
        case.compare_note("trainable_parameters", len(trained), notes["trainable_parameters"])


def ids_of(items: Sequence[Part], pad: int) -> list[int]:
    """A sample's ids as the original has them: a placeholder for every cell of an image, behind its marker."""
    return [one for item in items for one in (*item.ids.tolist(), *[pad] * item.n_tokens)]


def check_run(case: Case, model: MetaQuery, group: str, stored: Stored) -> None:
    """Images from captions, or from images with a caption: everything from the prompt to the pixels."""
    run = stored.runs[group]
    captions = [run["caption"]] if isinstance(run["caption"], str) else run["caption"]
    counts = run["n_images"] if isinstance(run["n_images"], list) else [run["n_images"]] * len(captions)
    shown = [[Image.fromarray(case.input(f"image{i}.raw_uint8").numpy()) for i in range(n)] for n in counts]
    asked = ConditionBatch(model.processor)
    named = zip(captions, shown, strict=True)
    # the original reads every branch of every image, in that order, whether another has it or its weight is 0
    image = 3.0 if stored.image > 1 else 1.0
    every = [asked.guidance_branches(a, b, negative_prompt="", guidance=2.0, image_guidance=image) for a, b in named]
    order = [some[i][0] for i in range(len(every[0])) for some in every]
    named = zip(captions, shown, strict=True)
    branches = [
        asked.guidance_branches(a, b, negative_prompt="", guidance=stored.text, image_guidance=stored.image)
        for a, b in named
    ]
    samples = [asked.samples[row] for row in order]
    check_prompts(case, model, group, samples, stored)
    with torch.inference_mode():
        answers = model.query_states(asked.samples)
        case.compare(f"{group}.query_hidden", answers[order])
        case.compare(f"{group}.connector_out", model.connector(answers)[order])
        denoiser = model.latent_denoiser(model.condition(answers), branches)
    x = case.input(f"{group}.noise")
    scheduler = model.config.scheduler
    steps = dpm_timesteps(stored.steps, shift=scheduler.timestep_shift, train_steps=scheduler.n_train_timesteps)
    integer = floor_timesteps(steps[:-1], train_steps=scheduler.n_train_timesteps)
    case.compare(f"{group}.timesteps", (TIMESTEP_SCALE * integer).round().long())
    for i, (t, t_next) in enumerate(pairwise(steps)):
        with torch.inference_mode():
            velocity = model.guided_velocity(x, integer[i].float().expand(len(x)), denoiser.branches)
        case.compare(f"{group}.guided_velocity.{i}", velocity)
        x = model.denoise_step(denoiser, x, t.expand(len(x)), t_next.expand(len(x)))
        case.compare(f"{group}.latents.{i}", x)
    case.compare(f"{group}.image", (model.decode_latents(x) / 2 + 0.5).clamp(0, 1))


def check_prompts(case: Case, model: MetaQuery, group: str, samples: Sequence[Sequence[Part]], stored: Stored) -> None:
    """Ids, padded on the left, their text, and the images as patches."""
    rows = [ids_of(items, stored.ids["<|image_pad|>"]) for items in samples]
    longest = max(map(len, rows))
    pad = stored.ids[PAD]
    case.compare(f"{group}.input_ids", torch.tensor([[pad] * (longest - len(row)) + row for row in rows]))
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    case.compare(f"{group}.attention_mask", torch.tensor(mask))
    for i, text in enumerate(stored.runs.get(group, {}).get("decoded_prompts", [])):
        case.compare_note(
            f"{group}: decoded prompt {i}", spelt(model, [pad] * (longest - len(rows[i])) + rows[i]), text
        )
    pictures = [item for items in samples for item in items if isinstance(item, ImagePart)]
    if pictures:
        merge = model.config.mllm.vision.spatial_merge_size
        patches = [rearrange(item.tokens, "n (s f) -> (n s) f", s=merge**2) for item in pictures]
        case.compare(f"{group}.pixel_values", torch.cat(patches))
        grids = [item.image_position_ids.amax(0) + 1 for item in pictures]
        case.compare(f"{group}.image_grid_thw", torch.stack(grids) * torch.tensor([1, merge, merge]))


def spelt(model: MetaQuery, ids: Sequence[int]) -> str:
    """Ids as a text in which markers show."""
    prompts = model.processor
    queries = [f"<img{i}>" for i in range(prompts.n_queries)]
    names = {prompts.begin_image_id + i: name for i, name in enumerate(("<begin_of_img>", "<end_of_img>", *queries))}
    names |= {at: token for token, at in prompts.text_tokenizer.special_ids.items()}
    text, words = "", []
    for one in [*ids, None]:
        if one in names or one is None:
            text += prompts.text_tokenizer.decode(words) + names.get(one, "")
            words = []
        else:
            words.append(one)
    return text


def given(case: Case, model: MetaQuery, group: str) -> list[list[Part]]:
    """Samples of stored ids, which are texts alone."""
    mask = case.input(f"{group}.attention_mask").bool()
    return [[text_part(ids[real].tolist())] for ids, real in zip(case.input(f"{group}.input_ids"), mask, strict=True)]


@torch.inference_mode()
def check_velocity(case: Case, model: MetaQuery, group: str, stored: Stored) -> None:
    """One velocity of the transformer under stored captions."""
    answers = model.query_states(given(case, model, group))
    case.compare("vel.connector_out", model.connector(answers))
    times = case.input("vel.timestep").float() / TIMESTEP_SCALE
    case.compare("vel.velocity", model.denoiser(case.input("vel.latents"), times, model.condition(answers)))


def check_training(case: Case, model: MetaQuery, group: str, stored: Stored) -> None:
    """The loss of a batch, and gradients of the new rows and of the connector."""
    times = integer_timesteps(case.input("loss.u"))
    case.compare("loss.timesteps", TIMESTEP_SCALE * times)
    asking = model.processor.query_batch(given(case, model, group))
    with torch.no_grad():
        latents = model.vae.encode(case.input("loss.target"))
    model.mllm.requires_grad_(False)
    loss = model(asking, latents, case.input("loss.noise"), times, torch.arange(len(latents))).mean()
    loss.backward()
    case.compare("loss.loss", loss)
    first = model.connector.blocks[0]
    grads = {"embed_new_rows": model.queries.grad, "connector_norm": model.connector.norm.weight.grad}
    grads |= {"connector_q0": first.attention.qkv.weight.grad.chunk(3)[0], "q_norm_gamma": first.attention.q_scale.grad}
    for name, grad in grads.items():
        case.compare(f"loss.grad_{name}", grad)
