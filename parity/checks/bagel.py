"""What a BAGEL case stores, computed by unimm.models.bagel.model: one function a group of stored outputs.

Every number comes from the case's own files. A group reads its inputs by name, and compares what is stored by name;
what it does not know stays "not compared" in the account. docs/originals/bagel.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from parity.case import Case
from parity.checks.bagel_plans import check_plan
from unimm.generation.flow import flow_timesteps
from unimm.generation.guidance import Guidance
from unimm.generation.kv_cache import KVCache
from unimm.generation.step_cache import parse_step_cache
from unimm.generation.text_sampling import TextSampling
from unimm.models.bagel.cfg_contexts import CFGContexts
from unimm.models.bagel.latent_denoiser import LatentDenoiser
from unimm.models.bagel.model import Bagel
from unimm.models.bagel.processor import BagelSpecialTokens
from unimm.nn.decoder import ExpertRouting
from unimm.nn.patches import patchify, unpatchify
from unimm.nn.pos_embed import grid_position_ids
from unimm.processing.images.io import pil_to_tensor, tensor_to_pil
from unimm.sequence.packing import pack_sequences
from unimm.sequence.parts import Part

EXPECTS = 'llm_config.json, or config.json with model_type "bagel"'
NUMBER = r"(\d*\.?\d+)"
Size = tuple[int, int]
ARGUMENTS = {  # of a run: our names, theirs
    "text": "cfg_text_scale",
    "image": "cfg_img_scale",
    "interval": "cfg_interval",
    "renorm": "cfg_renorm_type",
    "renorm_min": "cfg_renorm_min",
    "timesteps": "num_timesteps",
    "shift": "timestep_shift",
    "taylor": "enable_taylorseer",
}


def recognise(folder: Path) -> bool:
    """Whether a case's files are a BAGEL's."""
    if (folder / "llm_config.json").exists():
        return True
    config = folder / "config.json"
    return config.exists() and json.loads(config.read_text()).get("model_type") == "bagel"


def check(case: Case) -> None:
    """Compare every group that the case stores. A group that cannot run is a failed row, the others still run."""
    model = Bagel.from_pretrained(case.folder)
    if model.config.special_tokens is None and case.special:
        special_tokens = BagelSpecialTokens.from_json(case.special)
        model.config = replace(model.config, special_tokens=special_tokens)
    plans = {name: check_plan for name, note in case.meta.items() if isinstance(note, dict) and "plan" in note}
    for group, run in {**GROUPS, **plans}.items():
        if not case.names(re.escape(group) + r"\..*"):
            continue
        try:
            run(case, model, group)
        except (KeyError, ValueError, RuntimeError, AttributeError) as error:
            case.miss(f"{group}: the whole group", f"stopped at {type(error).__name__}: {error}")


# ---- reading a case


def text(case: Case, model: Bagel, name: str) -> Part:
    """Stored ids between bos and eos."""
    return model.processor.text_part(case.input(name).tolist())


def stored_image(case: Case, name: str) -> Image.Image:
    """Stored 8-bit pixels [h, w, 3]."""
    return Image.fromarray(case.input(name).numpy())


def args_in_words(words: str) -> dict[str, Any]:
    """What a description says of guidance and sampler, by our names; silent on what it leaves out."""
    found: dict[str, Any] = {}
    words_of = {
        "text": "text",
        "image": "img",
        "renorm_min": "renorm_min",
        "shift": "shift",
        "timesteps": "num_timesteps",
    }
    for name, word in words_of.items():
        if match := re.search(rf"\b(?:cfg_|timestep_)?{word} (off|{NUMBER})", words):
            found[name] = 1.0 if match[1] == "off" else float(match[1])
    if match := re.search(r"\b(text_channel|channel|global)\b", words):
        found["renorm"] = match[1]
    if match := re.search(rf"interval [(\[]?{NUMBER} *[-,] *{NUMBER}", words):
        found["interval"] = (float(match[1]), float(match[2]))
    elif "full interval" in words:
        found["interval"] = (0.0, 1.0)
    if match := re.search(r"(\d+) steps", words):
        found["timesteps"] = int(match[1]) + 1
    return found | ({"text": 1.0} if "no cfg" in words else {})


def args_in_name(name: str) -> dict[str, Any]:
    """What the name of a stored run says, as `t2i.v_cfg_global_img15`: the last digit of a scale is its tenth."""
    found: dict[str, Any] = {}
    if match := re.search(r"_(text_channel|channel|global)", name):
        found["renorm"] = match[1]
    for ours, theirs in (("image", "img"), ("text", "text"), ("renorm_min", "min")):
        if match := re.search(rf"_{theirs}(\d)(\d*)(?:_|$)", name):
            found[ours] = float(f"{match[1]}.{match[2] or 0}")
    return found


def stored_args(case: Case, name: str) -> dict[str, Any]:
    """The arguments of a run that `meta` holds, by our names."""
    args = case.input_note(f"{name}.args", {})
    return {ours: args[theirs] for ours, theirs in ARGUMENTS.items() if theirs in args}


def run_args(case: Case, name: str, like: Sequence[str] = ()) -> dict[str, Any]:
    """The arguments of a run: its own, or else those of the first of `like`, with what its name and words add."""
    if own := stored_args(case, name):
        return own
    base = next(filter(None, (stored_args(case, other) for other in like)), {})
    first = next((args_in_words(case.description(other)) for other in like if case.description(other)), {})
    return {**base, **first, **args_in_name(name), **args_in_words(case.description(name))}


def guidance(args: Mapping[str, Any]) -> Guidance:
    """The part of a run's arguments that is guidance."""
    fields = {key: args[key] for key in ("text", "image", "renorm", "renorm_min") if key in args}
    fields = {key + "_scale" if key in ("text", "image") else key: value for key, value in fields.items()}
    return Guidance(**fields, interval=tuple(args.get("interval", (0.4, 1.0))))


def denoise(
    model: Bagel, contexts: Sequence[CFGContexts], noises: Sequence[Tensor], sizes: Sequence[Size], args: Mapping
) -> list[Tensor]:
    """One run for all contexts together. The original's defaults: 50 timesteps, which are 49 steps, and shift 3."""
    steps, shift = int(args.get("timesteps", 50)) - 1, args.get("shift", 3.0)
    step_cache = parse_step_cache(bool(args.get("taylor", False)))
    more = {"steps": steps, "timestep_shift": shift, "step_cache": step_cache}
    return model.denoise(contexts, noises, sizes, guidance=[guidance(args)] * len(contexts), **more)


def compare_context(case: Case, name: str, cache: KVCache) -> None:
    """Keys, values, length and next position of a cache."""
    if name in case.meta:
        case.compare_note(name, {"kv_len": cache.length, "rope": cache.next_position}, case.input_note(name))
    if cache.chunks:
        kv = torch.cat(cache.chunks, 2)
        case.compare(f"{name}.k", kv[:, 0])
        case.compare(f"{name}.v", kv[:, 1])


# ---- the parts apart


@torch.inference_mode()
def check_vae(case: Case, model: Bagel, group: str) -> None:
    """Posterior, latents and pixels; a padded batch, and its images apart."""
    if "vae.image" in case:
        image = case.input("vae.image")
        case.compare("vae.moments", torch.cat(model.vae.moments(image), 1))
        case.compare("vae.latent_mean", model.vae.encode(image))
        if "vae.eps" in case:
            latent = model.vae.encode(image, noise=case.input("vae.eps"))
            case.compare("vae.latent_sampled", latent)
            case.compare("vae.decoded", model.vae.decode(latent))
    if "vae.padded_images" in case:
        images, stride = case.input("vae.padded_images"), model.config.vae.stride
        note = "the VAE given the padded batch; the library encodes each picture apart (unpadded_moments)"
        case.compare("vae.padded_moments", torch.cat(model.vae.moments(images), 1), note=note)
        for name in case.names(r"vae\.unpadded_moments_\d+"):
            i, (h, w) = int(name.split("_")[-1]), case.tensors[name].shape[2:]
            case.compare(name, torch.cat(model.vae.moments(images[i : i + 1, :, : h * stride, : w * stride]), 1))


@torch.inference_mode()
def check_und(case: Case, model: Bagel, group: str) -> None:
    """An image and a question: resizes, ViT, contexts, greedy text, and text after a system prompt."""
    image = stored_image(case, "und.image")
    resized = model.config.vae_transform(image)
    case.compare("und.vae_resized", to_tensor_u8(resized))
    case.compare("und.vit_pixels", pil_to_tensor(model.config.vit_transform(resized)))
    case.compare("und.vit_pixels_direct", pil_to_tensor(model.config.vit_transform(image)))
    items, size = model.image_parts(image, noise=None, latents=False)
    images = pack_sequences([items]).und_images
    case.compare("und.vit_patches", images.content)
    case.compare("und.vit_position_ids", images.image_position_ids)
    case.compare("und.vit_hidden", model.vision(images.content, images.image_position_ids, images.lengths))
    case.compare("und.vit_tokens", model.encode_vit(images))
    with_image = model.append_images([CFGContexts()], [[(items, size)]])
    compare_context(case, "und.kv_image", with_image[0].full)
    if "und.prompt_ids" not in case:
        return
    prompt = text(case, model, "und.prompt_ids")
    cache = model.append_text(with_image, [prompt])[0].full
    compare_context(case, "und.kv", cache)
    compare_text(case, model, cache)
    decode_after(case, model, cache, "und.inferencer_text")
    if "und.think_system_ids" in case:
        contexts = model.append_text([CFGContexts()], [text(case, model, "und.think_system_ids")], system=True)
        contexts = model.append_text(model.append_images(contexts, [[(items, size)]]), [prompt])
        decode_after(case, model, contexts[0].full, "und.think_text")


def to_tensor_u8(image: Image.Image) -> Tensor:
    """An image as [h, w, 3] uint8."""
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def greedy(model: Bagel, contexts: Sequence[KVCache], tokens: int) -> list[list[int | None]]:
    """The ids that follow each context, at most `tokens`, one row a step."""
    return list(model.decode_after(contexts, TextSampling(max_tokens=tokens), [0] * len(contexts)))


def compare_text(case: Case, model: Bagel, context: KVCache) -> None:
    """Ids fed (bos first) and logits of every step; the original stops after as many ids fed as are stored."""
    if "und.generated" not in case:
        return
    logits: list[Tensor] = []
    hook = model.decoder.head.register_forward_hook(lambda module, args, out: logits.append(out))
    n = len(case.tensors["und.generated"])
    fed = [model.processor.special_tokens.bos, *(row[0] for row in greedy(model, [context], n))]
    hook.remove()
    case.compare("und.generated", torch.tensor(fed[:n]))
    case.compare("und.logits", torch.cat(logits))


def decode_after(case: Case, model: Bagel, context: KVCache, name: str) -> list[int]:
    """The model's own text. The stored one may have been cut, at a length that is not stored: as many ids are
    compared."""
    if name not in case.meta:
        return []
    stored, m = case.input_note(name), model.processor.special_tokens
    n = len(stored.split())
    # a special token that the model writes ends the text: the original splits it there
    ids = list(takewhile(lambda i: i not in (m.bos, m.eos), (row[0] for row in greedy(model, [context], n + 1))))[:n]
    case.compare_note(name, "".join(f" {i}" for i in ids), stored)
    return ids


@torch.inference_mode()
def check_vit2(case: Case, model: Bagel, group: str) -> None:
    """Two images in one ViT call."""
    first = model.image_parts(stored_image(case, "und.image"), noise=None, latents=False)[0]
    more = [model.processor.vit_part(case.input(name)) for name in sorted(case.names(r"vit2\.pixels_\w+"))]
    images = pack_sequences([[*first, *more]]).und_images
    case.compare("vit2.position_ids", images.image_position_ids)
    case.compare("vit2.tokens", model.encode_vit(images))


def check_und_batch(case: Case, model: Bagel, group: str) -> None:
    """Prompts decoded together. The original goes on until its first sample ends, ours ends each at its own eos."""
    prompts = [text(case, model, name) for name in sorted(case.names(r"und_batch\.prompt_\w+"))]
    contexts = model.prefill([KVCache()] * len(prompts), [[prompt] for prompt in prompts])
    stored, m = case.tensors["und_batch.generated"], model.processor.special_tokens
    rows, ended = [[m.bos] * len(prompts)], [False] * len(prompts)
    for ours, old in zip(greedy(model, contexts, len(stored)), stored[1:].tolist(), strict=False):
        # what stands behind a row's eos nobody reads
        rows.append([i if i is not None else o if end else m.eos for i, o, end in zip(ours, old, ended, strict=True)])
        ended = [i is None for i in ours]
    case.compare("und_batch.generated", torch.tensor(rows))


def check_posids(case: Case, model: Bagel, group: str) -> None:
    """Ids of a grid in the ViT's table, both ways; the grid stands in a description."""
    words = " ".join(case.description(name) for name in case.names(r"posids\..*"))
    grid = re.search(r"(\d+)x(\d+) patches", words)
    h, w = (int(grid[1]), int(grid[2])) if grid else (5, 3)
    case.compare("posids.extrapolate", grid_position_ids(h, w, model.config.vit_grid))
    case.compare("posids.interpolate", grid_position_ids(h, w, model.config.vit_grid, interpolate=True))


# ---- generation


@dataclass(frozen=True)
class Scene:
    """A conversation at the point where an image is generated: of which size, from which noise, and like which stored
    runs."""

    contexts: CFGContexts
    size: Size
    noise: Tensor
    like: tuple[str, ...] = ()


def t2i_scene(case: Case, model: Bagel) -> Scene:
    """A prompt."""
    (contexts,) = model.append_text([CFGContexts()], [text(case, model, "t2i.prompt_ids")])
    size = tuple(case.input_note("t2i")["image_hw"])
    return Scene(contexts, size, case.input("t2i.noise"), ("t2i.v_cfg_global", "t2i.x_global"))


def append_stored_image(case: Case, model: Bagel, contexts: CFGContexts, image: str, noise: str) -> CFGContexts:
    """A stored image, encoded with stored posterior noise, appended."""
    items, size = model.image_parts(stored_image(case, image), noise=case.input(noise)[0], latents=True)
    return model.append_images([contexts], [[(items, size)]])[0]


def edit_scene(case: Case, model: Bagel) -> Scene:
    """An image and an instruction."""
    contexts = append_stored_image(case, model, CFGContexts(), "edit.image", "edit.vae_eps")
    compare_context(case, "edit.kv_image", contexts.no_text)
    (contexts,) = model.append_text([contexts], [text(case, model, "edit.prompt_ids")])
    return Scene(contexts, contexts.image_size, case.input("edit.noise"), ("edit.x_global", "edit.x_channel"))


def think_scene(case: Case, model: Bagel, group: str) -> Scene:
    """A system prompt, perhaps an image, a prompt, and the model's own text."""
    source, like = ("edit", "edit.x_text_channel") if group == "think_edit" else ("t2i", "t2i.x_app")
    system = f"{group}.system_ids" if f"{group}.system_ids" in case else "think_t2i.system_ids"
    (contexts,) = model.append_text([CFGContexts()], [text(case, model, system)], system=True)
    if source == "edit":
        contexts = append_stored_image(case, model, contexts, "edit.image", "edit.vae_eps")
    (contexts,) = model.append_text([contexts], [text(case, model, f"{source}.prompt_ids")])
    ids = decode_after(case, model, contexts.full, f"{group}.text")
    (contexts,) = model.append_reasoning([contexts], [model.processor.text_part(ids)])
    size = contexts.image_size or tuple(case.input_note("t2i")["image_hw"])
    return Scene(contexts, size, case.input(f"{source}.noise"), (like,))


def inter_scene(case: Case, model: Bagel) -> Scene:
    """Texts and images in the order that `meta` tells, as ["text_a", "und.image (posterior noise edit.vae_eps)"]."""
    contexts = CFGContexts()
    for entry in case.input_note("inter")["order"]:
        name = entry.split()[0] if entry.split()[0] in case else f"inter.{entry.split()[0]}"
        if noise := re.search(r"noise ([\w.]+)", entry):
            contexts = append_stored_image(case, model, contexts, name, noise[1])
        else:
            (contexts,) = model.append_text([contexts], [text(case, model, name)])
    caches = {"main": contexts.full, "text": contexts.no_text, "img": contexts.no_image}
    ours = {name: [cache.length, cache.next_position] for name, cache in caches.items()} | {
        "shape": [*contexts.image_size]
    }
    if "inter.kvlen_rope" in case.meta:
        case.compare_note("inter.kvlen_rope", ours, case.input_note("inter.kvlen_rope"))
    like = ("t2i.x_channel_int", "edit.x_channel", "t2i.x_app")
    return Scene(contexts, contexts.image_size, case.input("inter.noise"), like)


def check_t2i(case: Case, model: Bagel, group: str) -> None:
    """Text to image: contexts, embeddings, schedule, velocities, runs, pixels."""
    scene = t2i_scene(case, model)
    compare_context(case, "t2i.kv", scene.contexts.full)
    position_ids = denoiser_of(model, scene, Guidance()).position_ids
    case.compare("t2i.latent_position_ids", position_ids)
    case.compare("t2i.x_embed_t1", model.embed_latents(scene.noise, torch.ones(1), position_ids))
    if times := re.search(r"at t = ([\d., ]*\d)", case.description("t2i.time_embed")):
        case.compare("t2i.time_embed", model.time_embedder(torch.tensor([float(t) for t in times[1].split(",")])))
    if "t2i.timesteps" in case:
        args = {
            "timesteps": len(case.tensors["t2i.timesteps"]),
            "shift": 3.0,
            **args_in_words(case.description("t2i.timesteps")),
        }
        case.compare("t2i.timesteps", flow_timesteps(int(args["timesteps"]) - 1, args["shift"]))
    check_generation(case, model, group, scene)


def check_edit(case: Case, model: Bagel, group: str) -> None:
    """Editing: the image's pixels and latents, three contexts, velocities, runs, pixels."""
    image = model.config.vae_transform(stored_image(case, "edit.image"))
    latent = model.vae.encode(pil_to_tensor(image)[None], noise=case.input("edit.vae_eps"))
    case.compare("edit.vae_pixels", pil_to_tensor(image))
    case.compare("edit.latent", latent)
    case.compare("edit.latent_tokens", patchify(latent[0], model.config.latent_patch_size))
    scene = edit_scene(case, model)
    if note := case.input_note("edit"):
        case.compare_note("edit: image_hw", [*scene.size], note["image_hw"])
    compare_context(case, "edit.kv", scene.contexts.full)
    compare_context(case, "edit.kv_cfg_img", scene.contexts.no_image)
    check_generation(case, model, group, scene)


def check_think(case: Case, model: Bagel, group: str) -> None:
    """Generating after the model's own text."""
    check_generation(case, model, group, think_scene(case, model, group))


def check_inter(case: Case, model: Bagel, group: str) -> None:
    """Generating after several texts and images."""
    check_generation(case, model, group, inter_scene(case, model))


@torch.inference_mode()
def check_generation(case: Case, model: Bagel, group: str, scene: Scene) -> None:
    """Every stored velocity (v_*), run (x, x_*) and image of a group."""
    for name in case.names(rf"{group}\.v_\w+"):
        check_velocity(case, model, name, scene)
    latents = {}
    for name in case.names(rf"{group}\.x(_(?!embed)\w+)?"):
        args = run_args(case, name, scene.like)
        (latents[name],) = denoise(model, [scene.contexts], [scene.noise], [scene.size], args)
        case.compare(name, latents[name])
    check_pixels(case, model, group, scene, latents)


def denoiser_of(model: Bagel, scene: Scene, guided: Guidance) -> LatentDenoiser:
    """The state in which a scene's image is denoised."""
    return model.latent_denoiser([scene.contexts], [scene.size], guidance=[guided])


def check_velocity(case: Case, model: Bagel, name: str, scene: Scene) -> None:
    """A velocity under one context, with the hidden states of every layer, or one combined by guidance."""
    single = re.fullmatch(r"(\w+)\.v_(?:cfg_)?(cond|text|img)_t(\d)(\d*)", name)
    if single:
        group, context, whole, rest = single.groups()
        denoiser = denoiser_of(model, scene, Guidance())
        branches = [denoiser.canonical[0, {"cond": "full", "text": "no_text", "img": "no_image"}[context]]]
        timesteps = torch.tensor([float(f"{whole}.{rest or 0}")], dtype=torch.float64)
        with layers_of(model) as layers:
            (hidden,) = model.denoiser_states(denoiser, scene.noise, timesteps, branches)
        case.compare(name, model.llm_to_velocity(hidden))
        rows = denoiser.rows(branches)
        case.compare(f"{name}_hidden", torch.stack([ExpertRouting(rows.by_expert).join(parts) for parts in layers]))
        if context == "cond":
            case.compare(f"{group}.query_position_ids", rows.position_ids)
    elif not name.endswith("_hidden"):
        denoiser = denoiser_of(model, scene, guidance({**run_args(case, name, scene.like), "interval": (0.0, 1.0)}))
        time = re.search(rf"\bt ?= ?{NUMBER}", case.description(name))
        timesteps = torch.tensor([float(time[1]) if time else 1.0], dtype=torch.float64)
        case.compare(name, model.guided_velocity(denoiser, scene.noise, timesteps))


@contextmanager
def layers_of(model: Bagel) -> Iterator[list[dict[str, Tensor]]]:
    """What each block of the decoder gives, collected while the body runs."""
    out: list[dict[str, Tensor]] = []

    def keep(module: object, args: object, parts: dict[str, Tensor]) -> None:
        out.append(parts)

    hooks = [block.register_forward_hook(keep) for block in model.decoder.blocks]
    try:
        yield out
    finally:
        for hook in hooks:
            hook.remove()


def check_pixels(case: Case, model: Bagel, group: str, scene: Scene, latents: Mapping[str, Tensor]) -> None:
    """The latent grid, the VAE's output and the 8-bit image of the run that a description names."""
    words = " ".join(case.description(f"{group}.{name}") for name in ("pixels_u8", "latent_chw", "decoded"))
    run = re.search(rf"{group}\.x\w*", words)
    if run and run[0] in latents:
        x, height = latents[run[0]], scene.size[0] // model.config.latent_downsample
        pixels = model.decode_latents(x, scene.size)
        case.compare(f"{group}.latent_chw", unpatchify(x, model.config.latent_patch_size, height)[None])
        case.compare(f"{group}.decoded", pixels[None])
        case.compare(f"{group}.pixels_u8", to_tensor_u8(tensor_to_pil(pixels)))


def check_batch(case: Case, model: Bagel, group: str) -> None:
    """Images of several sizes in one batch: each as when it is alone. The original's global norm mixes them."""
    first = t2i_scene(case, model)
    more = sorted(case.names(r"batch\.prompt_\w+"))
    contexts = [
        first.contexts,
        *model.append_text([CFGContexts()] * len(more), [text(case, model, name) for name in more]),
    ]
    noises = [first.noise, *(case.input(name.replace("prompt", "noise")) for name in more)]
    sizes = [tuple(size) for size in case.input_note("batch")["sizes"]]
    for run in sorted({name.rpartition("_")[0] for name in case.names(r"batch\.x_\w+_\d+")}):
        alike = run.replace("batch.", "t2i.")
        args = run_args(case, run, (f"{alike}_int", alike, "t2i.x_global_int"))
        together = denoise(model, contexts, noises, sizes, args)
        for i, ours in enumerate(together):
            if args.get("renorm", "global") == "global" and args.get("text", 4.0) > 1:
                (alone,) = denoise(model, contexts[i : i + 1], noises[i : i + 1], sizes[i : i + 1], args)
                case.better(
                    f"{run}_{i}", ours, alone, why="the original's global norm mixes a batch; held to our single run"
                )
            else:
                case.compare(f"{run}_{i}", ours)


GROUPS: dict[str, Callable[[Any, Bagel, str], None]] = {
    "vae": check_vae,
    "und": check_und,
    "vit2": check_vit2,
    "und_batch": check_und_batch,
    "t2i": check_t2i,
    "batch": check_batch,
    "edit": check_edit,
    "think_t2i": check_think,
    "think_edit": check_think,
    "inter": check_inter,
    "posids": check_posids,
}
