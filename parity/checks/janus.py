"""What a Janus case stores, computed by unimm.models.janus.model: one function a group of stored outputs.

A case of transformers' layout holds no outputs of its own: those of the folder beside it, whose name lacks _hf, are
its. docs/originals/janus.md; docs/originals/index.md, "What a stored case holds".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parity.case import Case
from parity.checks.vq import pixels as as_bytes
from parity.checks.vq import vq_checks
from unimm.checkpoint.save import released_state_dict
from unimm.generation.image_tokens import ImageTokenSampling
from unimm.kernels import attention
from unimm.models.common.deepseek_chat import DeepseekChatModel
from unimm.models.common.deepseek_processor import JanusSpecialTokens
from unimm.models.janus.model import Janus
from unimm.models.janus.processor import padded_unconditional
from unimm.sequence.packing import PackedBatch, pack_sequences
from unimm.sequence.parts import IGNORE_INDEX, Part, TextPart, text_part

EXPECTS = 'config.json with model_type "multi_modality" or "janus"'


def recognise(folder: Path) -> bool:
    """Whether a case's files are a Janus's."""
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
    return config.get("model_type") in ("multi_modality", "janus") and "vision_gen_enc_config" not in config


def check(case: Case) -> None:
    """Compare every group that the case stores. A group that cannot run is a failed row, the others still run."""
    model = Janus.from_pretrained(case.folder)
    special = json.loads((case.outputs / "special.json").read_text())
    model.fallback_special_tokens = JanusSpecialTokens(
        **{field.name: special[field.name] for field in fields(JanusSpecialTokens)}
    )
    if (case.folder / "keys.json").exists():
        shapes = {key: list(x.shape) for key, x in released_state_dict(model, *model.key_maps().values()).items()}
        case.compare_note(
            "keys.json: names and shapes as saved", shapes, json.loads((case.folder / "keys.json").read_text())
        )
    und = {name.partition("/")[0]: check_understanding for name in case.names(r"und\w*/input_ids")}
    groups = {"vision": check_vision, **und, "vq": check_codes, "gen": check_drawing, "tf": check_training}
    run_groups(case, model, groups, special)


def run_groups(case: Case, model: Any, groups: dict[str, Callable], special: dict[str, Any]) -> None:
    """Every group that the case stores, each apart from the others' failures."""
    for group, run in groups.items():
        if case.names(f"{group}/.*"):
            try:
                with torch.no_grad():
                    run(case, model, group, special)
            except (KeyError, ValueError, RuntimeError, AttributeError, StopIteration) as error:
                case.miss(f"{group}: the whole group", f"stopped at {type(error).__name__}: {error}")


def check_vision(case: Case, model: Janus, group: str, special: dict) -> None:
    """The tower, from pixels to rows of the language model."""
    trunk, images = model.vision.trunk, case.input("vision/pixel_values")
    case.compare("vision/embed", trunk.patch_embed(images) + trunk.pos_embed)
    case.compare("vision/block0", trunk.blocks[0](trunk.patch_embed(images) + trunk.pos_embed))
    features = model.vision(images)
    case.compare("vision/features", features)
    case.compare("vision/aligned", model.aligner(features))
    if model.checkpoint_layout == "transformers":
        case.input("vision/attn_pool")  # that layout leaves the pool out, and nothing reads it
    else:
        case.compare("vision/attn_pool", trunk.attn_pool(features))


# ---- understanding


def prompts_of(case: Case, model: DeepseekChatModel, group: str, special: dict) -> list[list[Part]]:
    """The items of each left-padded row of stored ids: its texts, and its images between their markers."""
    pixels, there = case.input(f"{group}/pixel_values"), case.input(f"{group}/images_emb_mask")
    mask, found = case.input(f"{group}/attention_mask").bool(), []
    for row, ids in enumerate(case.input(f"{group}/input_ids")):
        pictures = iter([image for image, mine in zip(pixels[row], there[row], strict=True) if mine.any()])
        left, items = ids[mask[row]].tolist(), []
        while special["image"] in left:
            start = left.index(special["image"]) - 1
            item = model.processor.und_image_part(next(pictures), (left[start], special["eoi"]))
            items += [text_part(left[:start]), item]
            assert left[start + item.n_tokens + 1] == special["eoi"], "the marker behind a picture"
            left = left[start + item.n_tokens + 2 :]
        found.append([*items, text_part(left)] if left else items)
    return found


def padded(rows: Tensor, mask: Tensor) -> Tensor:
    """Packed rows [N, ...] where the mask [B, T] is, zeros elsewhere: [B, T, ...]."""
    out = rows.new_zeros(*mask.shape, *rows.shape[1:])
    out[mask] = rows
    return out


def states(model: Any, batch: PackedBatch) -> Tensor:
    """Last hidden states of a pack, after the final norm [N, D]."""
    (hidden,) = model.backbone(batch, lambda layer, q, k, v: attention(q, k, v, batch.layout.mask)).values()
    return next(iter(model.decoder.norms.values()))(hidden)


def compare_states(
    case: Case, model: DeepseekChatModel, group: str, prompts: Sequence[list[Part]], special: dict
) -> None:
    """Rows in, positions, rows out, logits: where the mask is 1."""
    mask, ids = case.tensors[f"{group}/attention_mask"].bool(), case.tensors[f"{group}/input_ids"]
    batch = pack_sequences(prompts)
    entered, stored = padded(model.embed(batch), mask), case.tensors[f"{group}/inputs_embeds"]
    case.compare(f"{group}/inputs_embeds", torch.where(mask[..., None], entered, stored), note="where the mask is 1")
    case.compare(f"{group}/position_ids", padded(batch.layout.position_ids, mask))
    assert batch.und_images is not None, "understanding without a picture"
    seen = torch.zeros(len(batch.layout.position_ids), dtype=torch.uint8)
    seen[batch.und_images.rows] = 1
    case.compare(f"{group}/images_seq_mask", padded(seen, mask) * (ids == special["image"]))
    hidden = states(model, batch)
    case.compare(f"{group}/last_hidden", padded(hidden, mask))
    case.compare(f"{group}/logits", padded(model.decoder.head(hidden), mask))


def check_understanding(case: Case, model: Janus, group: str, special: dict) -> None:
    """A batch of prompts, and what is said after them, greedily."""
    prompts = prompts_of(case, model, group, special)
    compare_states(case, model, group, prompts, special)
    if f"{group}/greedy_ids" in case:
        steps = case.tensors[f"{group}/greedy_ids"].shape[1]
        contexts, last = model.prefill_prompts(prompts)
        session = model.decode_session(contexts, steps)
        ids, logits = [torch.tensor(last)], []
        for _ in range(steps):
            logits.append(model.decode_step(session, ids[-1]))
            ids.append(logits[-1].argmax(-1))
        case.compare(f"{group}/greedy_ids", torch.stack(ids[1:], 1))
        case.compare(f"{group}/greedy_logits", torch.stack(logits, 1))


# ---- drawing


def check_codes(case: Case, model: Janus, group: str, special: dict) -> None:
    """The VQ tokenizer, both ways."""
    for name in ("vq/image", "vq/rand_ids"):
        case.input(name)
    for name, ours, note in vq_checks(model.vq, case.tensors):
        case.compare(name, ours, note=note)


def check_drawing(case: Case, model: Janus, group: str, special: dict) -> None:
    """Guided codes of a whole image, and the numbers of its first steps."""
    ids = case.input("gen/prompt_ids").tolist()
    prompt, w = [text_part(ids)], special["cfg_weight"]
    free = padded_unconditional(prompt, special["pad"])
    rows = torch.tensor([ids, free[0].ids.tolist()])
    case.compare("gen/tokens", rows)
    case.compare("gen/tokens_p2", rows.repeat(2, 1))
    case.compare("gen/prompt_embeds", model.decoder.embed(rows))
    codes = model.generate_image_tokens(
        [prompt],
        [torch.Generator()],
        guidance=[w],
        image_sampling=ImageTokenSampling(temperature=0.0),
        grid=(special["grid"],) * 2,
    )
    case.compare("gen/ids", codes[0])
    painted = model.decode_image_tokens(codes, grid=(special["grid"],) * 2)
    case.compare("gen/pixels", painted)
    case.compare("gen/uint8", torch.stack([as_bytes(image) for image in painted]))
    steps = case.tensors["gen/cfg_logits"].shape[0]
    session = model.decode_session(model.prefill_prompts([prompt, free])[0], steps)
    x, hidden = model.decoder.embed(rows[:, -1]), []
    for n in range(steps):
        hidden.append(session.append(x))
        x = model.embed_image_tokens(codes[0, n].expand(2))
    hidden = torch.stack(hidden, 1)
    case.compare("gen/step_hidden", next(iter(model.decoder.norms.values()))(hidden))
    logits = model.image_logits(hidden)
    case.compare("gen/step_logits", logits)
    case.compare("gen/cfg_logits", logits[1] + w * (logits[0] - logits[1]))


# ---- training


def check_training(case: Case, model: Janus, group: str, special: dict) -> None:
    """Teacher forcing: an image's codes after a prompt, and the labelled text of the understanding sample."""
    ids, codes = case.tensors["gen/prompt_ids"].tolist(), case.input("tf/image_ids")
    batch = pack_sequences([[text_part(ids[:-1]), model.image_token_part(codes, ids[-1])]])
    case.compare("tf/image_embeds", model.embed_image_tokens(codes)[None])
    assert batch.gen_images is not None, "a picture is drawn"
    case.compare("tf/hidden", states(model, batch)[None])
    (hidden,) = model.backbone(batch, lambda layer, q, k, v: attention(q, k, v, batch.layout.mask)).values()
    case.compare("tf/gen_logits", model.image_logits(hidden[batch.gen_images.rows - 1])[None])
    case.compare("tf/loss", model(batch).image.mean()[None])
    labels = F.pad(case.input("tf/text_labels")[1:], (0, 1), value=IGNORE_INDEX)
    case.compare("tf/text_loss", model(pack_sequences([labelled(case, model, labels, special)])).text.mean()[None])


def labelled(case: Case, model: Janus, labels: Tensor, special: dict) -> list[Part]:
    """The understanding sample with a label at each of its rows; rows of images have none."""
    items, at = [], 0
    for item in prompts_of(case, model, "und", special)[0]:
        n = item.segment.length
        given = labels[at : at + n].tolist()
        assert isinstance(item, TextPart) or set(given) == {IGNORE_INDEX}, "a label at a picture's row"
        items.append(text_part(item.ids.tolist(), labels=given) if isinstance(item, TextPart) else item)
        at += n
    return items
