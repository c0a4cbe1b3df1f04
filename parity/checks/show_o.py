"""What a Show-o case stores, computed by unimm.models.show_o.model: one function a group of stored outputs.

docs/originals/show_o.md; docs/originals/index.md, "What a stored case holds". Rows of pads are compared nowhere: the
library has none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from parity.case import Case
from parity.checks.janus import run_groups
from parity.checks.vq import pixels as as_bytes
from unimm.generation.masked import MaskedNoise, MaskedSampling, masked_step
from unimm.kernels import attention
from unimm.models.common.cfg_branches import CFGBranches
from unimm.models.show_o.extension import Extension
from unimm.models.show_o.model import ShowO
from unimm.models.show_o.processor import show_o_image_part
from unimm.nn.rope import rope_cos_sin
from unimm.sequence.packing import PackedBatch, pack_sequences
from unimm.sequence.parts import IGNORE_INDEX, Part, text_part
from unimm.vlms.llama_layout import EXPERT

EXPECTS = 'config.json with _class_name "Showo"'
# what a run's number of steps is called by, where it is not "cosine"
GREEDY = MaskedSampling(temperature=0.0, token_temperature=0.0)


def recognise(folder: Path) -> bool:
    """Whether a case's files are a Show-o's."""
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
    return config.get("_class_name") == "Showo"


def check(case: Case) -> None:
    """Compare every group that the case stores. A group that cannot run is a failed row, the others still run."""
    notes = json.loads((case.outputs / "io.json").read_text())
    model = load(case.folder, notes)
    groups = {
        "preproc": check_images,
        "vq": check_codes,
        "lm": check_language_model,
        "masks": check_masks,
        **dict.fromkeys(("t2i", "t2i_sampled", "t2i_plain", "inpaint"), check_generation),
        "extrapolate": check_extension,
        "und_codes": check_understanding,
        "train": check_training,
    }
    run_groups(case, model, groups, notes)
    if (case.folder / "w_clip_vit").is_dir():
        with_clip = load(case.folder, notes, with_clip=True)
        run_groups(
            case,
            with_clip,
            {"clip": check_clip, "und_clip": check_understanding, "train_clip": check_training},
            notes,
        )


def load(folder: Path, notes: dict[str, Any], *, with_clip: bool = False) -> ShowO:
    """A case's model, whose prompts are cut where the case's are. with_clip: the one that understands by CLIP."""
    parts = {"vq": folder / "magvitv2", "tokenizer": folder / "phi"}
    if with_clip:
        model = ShowO.from_pretrained(folder / "w_clip_vit", components={**parts, "clip": folder / "clip"})
    else:
        model = ShowO.from_pretrained(folder, components=parts)
    model.config = replace(model.config, max_prompt_ids=notes["max_seq_length"] + 1)
    return model


def picture(case: Case, name: str) -> Image.Image:
    """A stored picture."""
    return Image.fromarray(case.input(f"preproc/{name}_rgb").numpy())


def run_backbone(model: ShowO, batch: PackedBatch) -> Tensor:
    """Last hidden states of a pack [N, D]."""
    return model.backbone(batch, lambda layer, q, k, v: attention(q, k, v, batch.layout.mask))[EXPERT]


def real_rows(model: ShowO, ids: Tensor) -> Tensor:
    """Which ids of a row are no pads [L] bool."""
    return ids != model.config.special_tokens.pad


def generation_row(model: ShowO, ids: Tensor) -> list[Part]:
    """The parts of a stored row of a prompt and an image, without its pads [L]."""
    ids = ids[real_rows(model, ids)]
    at = ids.tolist().index(model.config.special_tokens.soi)
    return [
        text_part(ids[:at].tolist()),
        model.processor.gen_image_part(ids[at + 1 : -1] - model.config.first_code_id),
    ]


def in_place(case: Case, name: str, ours: Sequence[Tensor], real: Sequence[Tensor], *, stored: Tensor | None = None):
    """Compare rows without pads, [n, ...] a sample, with those of a stored tensor [B, L, ...] that are no pads."""
    expected = case.tensors[name] if stored is None else stored
    whole = expected.clone()
    for i, rows in enumerate(ours):
        whole[i, real[i]] = rows.to(whole.dtype)
    case.compare(name, whole, note="rows that are no pads")


def dense_in_place(case: Case, name: str, masks: Sequence[Tensor], real: Sequence[Tensor]) -> None:
    """The same of masks [n, n] a sample with a stored one [B, L, L]."""
    whole = case.tensors[name].clone()
    for i, mask in enumerate(masks):
        rows = real[i].nonzero().squeeze(1)
        whole[i, rows] = 0
        whole[i, rows[:, None], rows[None]] = mask.to(torch.uint8)
    case.compare(name, whole, note="rows that are no pads")


# ---- images, codes, CLIP


def check_images(case: Case, model: ShowO, group: str, notes: dict) -> None:
    """Pictures as the image tokenizer gets them, and as CLIP does."""
    with_clip = load(case.folder, notes, with_clip=True) if case.names("preproc/._clip") else model
    for name in case.names(r"preproc/._vq"):
        case.compare(name, model.processor.image_pixels(picture(case, name[8])))
    for name in case.names(r"preproc/._clip"):
        case.compare(name, with_clip.required_clip.image_processor.preprocess(picture(case, name[8])))


def check_codes(case: Case, model: ShowO, group: str, notes: dict) -> None:
    """The image tokenizer, both ways, and its terms to train by."""
    vq = model.required_vq
    encoder, decoder = vq.encoder, vq.decoder
    image = case.input("vq/image")
    x = encoder.conv_in(image)
    for level, part in enumerate(encoder.down):
        x = part(x)
        case.compare(f"vq/down{level}", x[:1])
    middle = encoder.mid.attn_1(encoder.mid.block_1(x))
    case.compare("vq/mid_attn", middle)
    middle = encoder.mid.block_2(middle)
    case.compare("vq/enc_mid", middle)
    case.compare("vq/enc_conv_out", encoder.conv_out(torch.nn.functional.silu(encoder.norm_out(middle))))
    z = vq.encode(image)
    case.compare("vq/z", z)
    ids = case.tensors["vq/ids"]
    case.compare("vq/ids", vq.encode_ids(image))
    out = vq.quantize(z)
    case.compare("vq/zq", out.codes)
    grid = tuple(z.shape[2:])
    x = decoder.post_quant_conv(vq.quantize.lookup(ids, grid, z.dtype))
    case.compare("vq/dec_post_quant", x)
    x = decoder.mid(decoder.conv_in(x))
    case.compare("vq/dec_mid", x)
    case.compare("vq/dec_up_last", decoder.up[len(decoder.up) - 1](x)[:1])
    case.compare("vq/pixels", vq.decode(ids, grid=grid))
    wide = case.input("vq/wide_ids")
    case.compare("vq/wide_pixels", vq.decode(wide, grid=(grid[0], wide.shape[1] // grid[0])))
    losses = notes["vq"]
    # the original weighs both by 0.1, and the commitment by 1 and a quarter
    case.compare_scalar("vq: quantizer_loss", 0.1 * 1.25 * float(out.commitment), losses["quantizer_loss"], largest=1.0)
    entropy = 0.1 * float(out.entropy - out.mean_entropy)
    case.compare_scalar("vq: entropy_loss", entropy, losses["entropy_loss"], largest=1.0)


def check_clip(case: Case, model: ShowO, group: str, notes: dict) -> None:
    """CLIP's tower from pixels to rows of the decoder."""
    clip, images = model.required_clip, case.input("clip/pixel_values")
    case.compare("clip/embed", clip.embed_patches(images))
    case.compare("clip/layer0", clip.hidden_states(images, 1))
    features = clip(images)
    case.compare("clip/features", features)
    assert model.projector is not None, "a model with CLIP"
    case.compare("clip/projected", model.projector(features))


# ---- the language model and its masks


def check_language_model(case: Case, model: ShowO, group: str, notes: dict) -> None:
    """Rows in, the first layer, rows out, logits."""
    ids = case.input("lm/input_ids")
    real = [real_rows(model, row) for row in ids]
    batch = pack_sequences([generation_row(model, row) for row in ids])
    lengths = list(batch.layout.lengths)
    dense_in_place(case, "lm/allowed", [batch.layout.mask.dense_sample(i) for i in range(len(ids))], real)
    x = model.embed(batch)
    in_place(case, "lm/embed", x.split(lengths), real)
    block = model.decoder.blocks[0]
    config = model.decoder.config
    attend = lambda layer, q, k, v: attention(q, k, v, batch.layout.mask)  # noqa: E731
    positions = torch.cat([mine.nonzero().squeeze(1) for mine in real])
    cos_sin = rope_cos_sin(positions, config.rotary_dim, config.rope_theta, x.dtype)
    q, k, _ = block.project_qkv(block.norm(x), cos_sin)
    for name, rows in (("lm/q0", q), ("lm/k0", k)):
        whole = case.tensors[name].clone()
        whole[0][:, real[0]] = rows[: lengths[0]].transpose(0, 1)
        case.compare(name, whole, note="rows that are no pads")
    in_place(case, "lm/layer0", block(x, cos_sin, attend).split(lengths), real)
    hidden = run_backbone(model, batch)
    in_place(case, "lm/last_hidden", model.decoder.norm(hidden).split(lengths), real)
    rows = case.input("lm/rows")
    logits = []
    for mine, sample in zip(real, model.decoder.logits(hidden).split(lengths), strict=True):
        whole = sample.new_zeros(len(mine), sample.shape[1])
        whole[mine] = sample
        logits.append(whole[rows])
    case.compare("lm/logits", torch.stack(logits))


def check_masks(case: Case, model: ShowO, group: str, notes: dict) -> None:
    """Masks of small sequences of every kind that the model is given."""
    ids = case.input("masks/t2i_ids")
    masks = [pack_sequences([generation_row(model, row)]).layout.mask.dense() for row in ids]
    dense_in_place(case, "masks/t2i", masks, [real_rows(model, row) for row in ids])
    n = case.input("masks/lm_ids").shape[1]
    case.compare("masks/lm", pack_sequences([[text_part([0] * n)]]).layout.mask.dense()[None].to(torch.uint8))
    parts = understanding_row(model, case.input("masks/mmu_ids")[0])
    case.compare("masks/mmu", pack_sequences([parts]).layout.mask.dense()[None].to(torch.uint8))
    length = case.tensors["masks/mmu_vit"].shape[1]
    features = torch.zeros(length - 10, 1)
    parts = [text_part([0] * 5), show_o_image_part("und_image", features, ()), text_part([0] * 5)]
    case.compare("masks/mmu_vit", pack_sequences([parts]).layout.mask.dense()[None].to(torch.uint8))
    # of functions that no script of the original calls: the library has no such sequences
    for name in ("masks/t2i_keep_pad", "masks/lvg_ids", "masks/lvg", "masks/lvg_v2"):
        case.input(name)


def understanding_row(model: ShowO, ids: Tensor, labels: Tensor | None = None) -> list[Part]:
    """The parts of a stored row of an image's codes and a question, without pads behind. labels: of each row."""
    special = model.config.special_tokens
    row = ids.tolist()
    start, end = row.index(special.soi), row.index(special.eoi)
    codes = ids[start + 1 : end] - model.config.first_code_id
    image = replace(show_o_image_part("und_image", codes, (special.soi, special.eoi)), encoded=True)
    behind = [one for one in row[end + 1 :] if one != special.pad]
    if labels is None:
        return [text_part(row[:start]), image, text_part(behind)]
    given = labels.tolist()
    image = replace(image, labels=torch.tensor([given[start], given[end]]))
    return [
        text_part(row[:start], labels=given[:start]),
        image,
        text_part(behind, labels=given[end + 1 : end + 1 + len(behind)]),
    ]


# ---- generation


def run_notes(notes: dict, group: str) -> dict:
    """What a run was given; guidance as ours."""
    run = notes["runs"][group]
    return {**run, "guidance": run["guidance"] + 1}


def check_generation(case: Case, model: ShowO, group: str, notes: dict) -> None:
    """Every step of decoding an image: probabilities, drawn ids, masked places; then pixels."""
    run, processor = run_notes(notes, group), model.processor
    ids = case.input(f"{group}/input_ids")
    n_codes = model.config.n_codes
    rows = [generation_row(model, row) for row in ids]
    prompts = [parts[:1] for parts in rows]
    texts = notes["prompts"] if group != "inpaint" else [None] * len(ids)
    for ours, text in zip(prompts, texts, strict=False):
        if text is not None:
            case.compare_note(f"{group}: prompt {text[:20]}", ours[0].ids.tolist(), processor.prompt_ids(text))
    if f"{group}/uncond_ids" in case:
        row = case.input(f"{group}/uncond_ids")[0]
        free = generation_row(model, row)[0].ids.tolist()
        case.compare_note(f"{group}: empty prompt", processor.prompt_ids(""), free)
    tokens = torch.stack([parts[1].tokens for parts in rows])
    if group == "inpaint":
        places = inpainted_places(case, model)
        known = model.encode_images([picture(case, run["picture"].split()[-1])])
        ours = known.masked_fill(places, n_codes).expand_as(tokens)
        case.compare_note("inpaint: tokens", ours.tolist(), tokens.tolist())
    branches = CFGBranches.plan([run["guidance"]] * len(ids), model.device)
    session = model.masked_session(prompts, branches, tokens.shape[1])
    if f"{group}/allowed" in case:
        check_generation_masks(case, model, group)
    if f"{group}/logits0" in case:
        raw = model.image_logits(session.hidden(tokens[branches.images]))
        case.compare(f"{group}/logits0", raw)
    sampling = MaskedSampling(
        schedule=run.get("schedule", "cosine"),
        temperature=run["temperature"],
        token_temperature=float(f"{group}/exponential" in case),
    )
    found: dict[str, list[Tensor]] = {
        name: [] for name in ("sampled", "masking", "selected_probs", "probs", "mask_len")
    }
    for step in range(run["steps"]):
        logits = model.masked_logits(session, branches, tokens)
        stored = [
            case.input(name)[step] if (name := f"{group}/{one}") in case else None for one in ("exponential", "uniform")
        ]
        unknown = tokens == n_codes
        after = masked_step(
            logits,
            tokens,
            mask_token=n_codes,
            step=step,
            steps=run["steps"],
            sampling=sampling,
            noise=MaskedNoise(*stored),
        )
        # where a place was known the original draws an id all the same, and takes none of it
        theirs = case.tensors[f"{group}/sampled"][step]
        found["sampled"].append(torch.where(unknown, after.drawn, theirs))
        found["masking"].append((after.tokens == n_codes).to(torch.uint8))
        found["selected_probs"].append(after.probabilities)
        found["probs"].append(logits.softmax(-1))
        found["mask_len"].append((after.tokens == n_codes).sum(1))
        tokens = after.tokens
    for name, steps in found.items():
        case.compare(
            f"{group}/{name}", torch.stack(steps).reshape(case.tensors.get(f"{group}/{name}", torch.stack(steps)).shape)
        )
    case.compare(f"{group}/ids", after.drawn)
    case.compare(f"{group}/left_in_input", in_ids(case, model, group, tokens))
    compare_pixels(case, model, group, after.drawn, None)


def in_ids(case: Case, model: ShowO, group: str, tokens: Tensor) -> Tensor:
    """Image tokens as the stored ones: with the offset of the table, or without."""
    stored = case.tensors[f"{group}/left_in_input"]
    return tokens + model.config.first_code_id if int(stored.max()) > model.config.n_codes else tokens


def check_generation_masks(case: Case, model: ShowO, group: str) -> None:
    """The masks of conditional and unconditional rows."""
    rows = torch.cat((case.tensors[f"{group}/input_ids"], case.tensors[f"{group}/uncond_ids"]))
    masks = [pack_sequences([generation_row(model, row)]).layout.mask.dense() for row in rows]
    dense_in_place(case, f"{group}/allowed", masks, [real_rows(model, row) for row in rows])


def inpainted_places(case: Case, model: ShowO) -> Tensor:
    """The places of a mask."""
    mask = Image.fromarray(case.input("inpaint/mask_l").numpy())
    places = model.processor.mask_places(mask)
    case.compare("inpaint/places", places.to(torch.uint8).expand_as(case.tensors["inpaint/places"]))
    return places


def compare_pixels(case: Case, model: ShowO, group: str, tokens: Tensor, grid: tuple[int, int] | None) -> None:
    """Pixels of image tokens, as numbers and as bytes."""
    if f"{group}/pixels" in case:
        pixels = model.decode_image_tokens(tokens, grid=grid)
        case.compare(f"{group}/pixels", pixels)
        case.compare(f"{group}/uint8", torch.stack([as_bytes(one) for one in pixels]))


def check_extension(case: Case, model: ShowO, group: str, notes: dict) -> None:
    """An image extended beyond its sides, window by window."""
    run = run_notes(notes, group)
    side = model.config.token_grid[0]
    rounds = [(direction, None) for direction in run["directions"]]
    extension = Extension.plan(side, run["offset"], rounds, stride=model.required_vq.config.stride)
    canvas = model.encode_images([picture(case, run["picture"].split()[-1])]).unflatten(1, (side, side))
    prompts = run.get("prompts") or extension_prompts(case, model, notes)
    for i, (direction, _) in enumerate(rounds):
        canvas, ((rows, columns),) = extension.grow(canvas, direction, model.config.n_codes)
        window = canvas[:, rows, columns].flatten(1)
        offset = (
            model.config.first_code_id if int(case.tensors[f"{group}/{i}_window"].max()) > model.config.n_codes else 0
        )
        case.compare(f"{group}/{i}_window", window + offset)
        done = model.complete_image_tokens(
            [model.processor.generation_parts(prompts[i])],
            window,
            [torch.Generator()],
            guidance=[run["guidance"]],
            steps=run["steps"],
            masked_sampling=GREEDY,
        )
        case.compare(f"{group}/{i}_ids", done)
        canvas[:, rows, columns] = done.unflatten(1, (side, side))
    case.compare(f"{group}/canvas_ids", canvas.flatten(1))
    compare_pixels(case, model, group, canvas.flatten(1), (canvas.shape[1], canvas.shape[2]))


def extension_prompts(case: Case, model: ShowO, notes: dict) -> list[str]:
    """The prompts of the rounds, where a case does not say: its first."""
    return [notes["prompts"][0]] * len(notes["runs"]["extrapolate"]["directions"])


# ---- understanding


def check_understanding(case: Case, model: ShowO, group: str, notes: dict) -> None:
    """Rows of a question about a picture, and the answer, greedily."""
    run = notes["und"][group]
    image = picture(case, run["picture"].split()[-1])
    for i, question in enumerate(run["questions"]):
        message = {"role": "user", "content": question, "images": [image]}
        prompt = model.processor.conversation_parts([message])
        batch = pack_sequences([prompt])
        if f"{group}/{i}_input_ids" in case:
            assert batch.und_images is not None, "a question about a picture"
            ids = torch.zeros(len(batch.layout.position_ids), dtype=torch.long)
            ids[batch.id_rows] = batch.ids
            ids[batch.und_images.rows] = model.encode_image_tokens(batch.und_images) + model.config.first_code_id
            case.compare(f"{group}/{i}_input_ids", ids[None])
        case.compare(f"{group}/{i}_input_embeds", model.embed(batch)[None])
        case.compare(f"{group}/{i}_allowed", batch.layout.mask.dense().to(torch.uint8))
        logits = model.decoder.logits(run_backbone(model, batch))
        if f"{group}/{i}_prompt_logits" in case:
            case.compare(f"{group}/{i}_prompt_logits", logits[-len(case.tensors[f"{group}/{i}_prompt_logits"]) :])
        check_answer(case, model, f"{group}/{i}", prompt)


def check_answer(case: Case, model: ShowO, name: str, prompt: list[Part]) -> None:
    """The ids of an answer and the logits that each was taken from."""
    steps = len(case.tensors[f"{name}_ids"])
    caches, last = model.prefill_prompts([prompt])
    session = model.decode_session(caches, steps)
    ids, logits = [torch.tensor(last)], []
    for _ in range(steps):
        logits.append(model.decode_step(session, ids[-1]))
        ids.append(logits[-1].argmax(-1))
    case.compare(f"{name}_ids", torch.cat(ids[1:]))
    case.compare(f"{name}_logits", torch.cat(logits))


# ---- training


def check_training(case: Case, model: ShowO, group: str, notes: dict) -> None:
    """The three losses of a batch, their sum, and every parameter's gradient."""
    run, special = notes[group], model.config.special_tokens
    n_images, n_texts = run["batch"]["t2i"], run["batch"]["lm"]
    ids, labels = case.input(f"{group}/input_ids"), case.input(f"{group}/labels")
    for name in ("t", "order_noise", "drop_noise", "mask_prob", "allowed"):
        case.input(f"{group}/{name}")
    images = pack_sequences([generation_row(model, row) for row in ids[:n_images]])
    rows = labels[:n_images, -(model.config.image_tokens + 1) : -1]
    image_labels = torch.where(rows == IGNORE_INDEX, rows, rows - model.config.first_code_id).flatten()
    texts = [
        labelled_text(row, labels[n_images + i], special.pad)
        for i, row in enumerate(ids[n_images : n_images + n_texts])
    ]
    answers = understanding_rows(case, model, group, labels[n_images + n_texts :])
    with torch.enable_grad():
        losses = {
            "loss_t2i": model(images, image_labels).image.mean(),
            "loss_lm": model(pack_sequences(texts)).text.mean(),
            "loss_mmu": model(pack_sequences(answers)).text.mean(),
        }
        total = sum(weight * loss for weight, loss in zip(run["coeff"], losses.values(), strict=True))
        total.backward()
    for name, loss in {**losses, "loss": total}.items():
        case.compare_scalar(f"{group}: {name}", float(loss), run[name], largest=1.0)
    for key_map in list(model.key_maps().values())[:1]:
        for name, parameter in model.named_parameters():
            for released in key_map.released_tensors(name):
                if released in run["grad_norms"]:
                    assert parameter.grad is not None, released
                    ours = float(parameter.grad.norm())
                    case.compare_scalar(f"{group}: {released}", ours, run["grad_norms"][released], largest=1.0)
    model.zero_grad()


def labelled_text(ids: Tensor, labels: Tensor, pad: int) -> list[Part]:
    """The part of a stored row of text, without pads behind; each row predicts the id behind it."""
    n = int((ids != pad).sum())
    return [text_part(ids[:n].tolist(), labels=[*labels[1:n].tolist(), IGNORE_INDEX])]


def understanding_rows(case: Case, model: ShowO, group: str, labels: Tensor) -> list[list[Part]]:
    """The parts of the stored rows of understanding, with labels shifted to the rows that predict them."""
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    if not model.config.with_clip:
        ids = case.tensors[f"{group}/input_ids"][-len(labels) :]
        return [understanding_row(model, row, own) for row, own in zip(ids, shifted, strict=True)]
    features = case.tensors["clip/features"]
    pad = model.config.special_tokens.pad
    rows = []
    for i, (row, own) in enumerate(zip(case.input(f"{group}/mmu_ids"), shifted, strict=True)):
        behind = [one for one in row[2:].tolist() if one != pad]
        given = own.tolist()[2 + features.shape[1] :][: len(behind)]
        image = replace(show_o_image_part("und_image", features[i], ()), encoded=True)
        rows.append([text_part(row[:2].tolist()), image, text_part(behind, labels=given)])
    return rows
