"""What an Emu3 case stores, computed by unimm.models.emu3.model: one function a group of stored outputs.

A case of transformers' layout holds no outputs of its own: those of the folder beside it, whose name lacks _hf, are
its. docs/originals/emu3.md; docs/originals/index.md, "What a stored case holds".
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from parity.case import Case
from parity.checks.emu3_vq import check_codes
from parity.checks.janus import padded, run_groups, states
from parity.checks.vq import pixels as as_bytes
from unimm.checkpoint.save import released_state_dict
from unimm.generation.image_tokens import ImageTokenSampling
from unimm.generation.kv_cache import EMPTY_CACHE
from unimm.generation.prefill import plan_prefill
from unimm.kernels import AttentionMask, attention
from unimm.models.emu3.image_processor import Emu3ImageProcessor
from unimm.models.emu3.model import Emu3
from unimm.models.emu3.text_tokenizer import Emu3SpecialTokens
from unimm.processing.chat_templates import ChatMessage
from unimm.sequence.packing import pack_sequences
from unimm.sequence.parts import IGNORE_INDEX, Part, text_part
from unimm.tokenizers.text import encode_prompt

EXPECTS = 'config.json with model_type "Emu3" or "emu3"'
GREEDY = ImageTokenSampling(temperature=0.0)
# what the stored numbers leave room for, and what other notes describe
ABOUT_THE_CASE = (
    "vq_codes_used", "vq_mean_square", "vq_code_margin", "und_margin", "padding_image_differs", "gen_margin",
    "gen_decoded_kinds", "gen_uniform_gap", "gen_batch", "gen", "seed",
)  # fmt: skip


def recognise(folder: Path) -> bool:
    """Whether a case's files are an Emu3's."""
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
    return config.get("model_type") in ("Emu3", "emu3")


def check(case: Case) -> None:
    """Compare every group that the case stores. A group that cannot run is a failed row, the others still run."""
    model = Emu3.from_pretrained(case.folder)
    for name in ABOUT_THE_CASE:
        case.input_note(name)
    if (case.folder / "keys.json").exists():
        stored = json.loads((case.folder / "keys.json").read_text())
        names = set(released_state_dict(model, *model.key_maps().values()))
        case.compare_note("keys.json: names as saved", names, {entry["key"] for entry in stored.values()})
    und = {name.partition("/")[0]: check_answers for name in case.names(r"und/\d+/input_ids")}
    groups: dict[str, Callable] = {
        "pre": check_images, "vq": check_vq, "tf": check_states, **und, "und_batch": check_answer_batch,
        "gen": check_drawing, "gen_batch": check_drawing_batch, "train": check_training,
    }  # fmt: skip
    run_groups(case, model, groups, {})
    check_texts(case, model)


# ---- texts and images


def check_texts(case: Case, model: Emu3) -> None:
    """Special ids, tokenization, templates, sizes."""
    special = model.config.special_tokens
    ids = {f"{name}_token_id": getattr(special, name) for name in Emu3SpecialTokens.TOKENS}
    others = {"visual_0": special.code0, "n_visual": model.config.n_codes, "vocab": model.config.decoder.vocab_size}
    ours = ids | others | {"n_ranks": special.pad}
    case.compare_note("special_tokens", ours, case.meta["special_tokens"])
    apart = case.folder / "compare.json"
    equal = json.loads(apart.read_text())["tokenize equal"] if apart.exists() else {}
    for text, stored in case.meta["tokenize"]:
        # the library never reads special tokens out of text; the original does, and so does this split
        found = encode_prompt(model.processor.text_tokenizer, split_special(model, text))
        if equal.get(text, True):
            case.compare_note(f"tokenize: {text!r}", found, stored)
        else:  # transformers' tokenizer.json has other ids than the original for it
            case.compare_note(f"tokenize: {text!r}, not as the original", found != stored, True)
    templates = case.meta["templates"]
    message = ChatMessage("user", ["{image_prompt}", "{text_prompt}"])
    prompt = model.processor.render([message], model.processor.default_system)
    case.compare_note("templates: chat", "".join(one for one in prompt if isinstance(one, str)), templates["chat"])
    grid = model.processor.image_start((7, 12))[1]
    case.compare_note("templates: grid", grid, templates["grid"].format(H=7, W=12))
    for height, width, stride, least, most in (entry[0] for entry in case.meta["smart_resize"]):
        stored = next(
            size for given, size in case.meta["smart_resize"] if given == [height, width, stride, least, most]
        )
        images = Emu3ImageProcessor(stride=stride, min_pixels=least, max_pixels=most)
        case.compare_note(f"smart_resize: {height, width, stride}", resized(images, height, width), stored)
    for ratio, area, stride, stored in case.meta["generate_size"]:
        ours = size_of_ratio(model, ratio, area, stride)
        case.compare_note(f"generate_size: {ratio}, {area}", ours, stored)


def split_special(model: Emu3, text: str) -> list[str | int]:
    """The text with the special tokens that stand in it as ids."""
    known = {token: getattr(model.config.special_tokens, name) for name, token in Emu3SpecialTokens.TOKENS.items()}
    pieces = re.split("(" + "|".join(map(re.escape, known)) + ")", text)
    return [known.get(piece, piece) for piece in pieces if piece]


def resized(images: Emu3ImageProcessor, height: int, width: int) -> list[int] | str:
    """The size after the resize, or "error"."""
    try:
        return list(images.resized_size(height, width))
    except ValueError:
        return "error"


def size_of_ratio(model: Emu3, ratio: str, area: int, stride: int) -> list[int]:
    """The grid of a ratio at another area and stride than the model's."""
    ours = model.config.image_processor.stride
    # the same grid at the model's stride: areas scale with its square
    config = type(model.config)(**{**vars(model.config), "image_area": area * ours**2 // stride**2})
    return [side // ours for side in config.size_of_ratio(ratio)]


def stored_image(case: Case, i: int) -> Image.Image:
    """An image as the original was given it."""
    return Image.fromarray(case.input(f"pre/{i}/image").numpy())


def check_images(case: Case, model: Emu3, group: str, special: dict) -> None:
    """Images to understand, resized and normalised."""
    for i in range(len(case.names(r"pre/\d+/image"))):
        case.compare(f"pre/{i}/pixels", model.config.image_processor.preprocess(stored_image(case, i))[None])


def check_vq(case: Case, model: Emu3, group: str, special: dict) -> None:
    """The vision tokenizer, both ways, layer by layer."""
    check_codes(case, model.vision_tokenizer)


# ---- understanding


def check_states(case: Case, model: Emu3, group: str, special: dict) -> None:
    """Hidden states of a prompt, layer by layer."""
    batch = pack_sequences([[text_part(case.input("tf/input_ids")[0].tolist())]])
    found = [model.decoder.embed(batch.ids)]
    hooks = [
        block.register_forward_hook(lambda _, __, out: found.append(*out.values())) for block in model.decoder.blocks
    ]
    hidden = states(model, batch)
    for hook in hooks:
        hook.remove()
    for i, x in enumerate(found):
        case.compare(f"tf/hidden{i}", x[None])
    case.compare("tf/last_hidden", hidden[None])
    logits = model.decoder.head(hidden)
    case.compare("tf/logits", logits[None, -case.tensors["tf/logits"].shape[1] :])
    case.compare("tf/logits_rows", logits.logsumexp(-1))


def conversation(case: Case, model: Emu3, i: int) -> list[Part]:
    """A stored question about an image."""
    entry = case.input_note("und")[i]
    number = int(entry["image"].split("/")[1])
    message = {"role": "user", "content": entry["text"], "images": [stored_image(case, number)]}
    return model.processor.conversation_parts([message])


def greedy(model: Emu3, prompts: list[list[Part]], steps: int) -> tuple[Tensor, Tensor]:
    """Greedy ids [B, steps] after prompts, and the logits before each [B, steps, V]."""
    caches, last = model.prefill_prompts(prompts)
    session = model.decode_session(caches, steps)
    ids = [torch.tensor(last)]
    logits = []
    for _ in range(steps):
        logits.append(model.decode_step(session, ids[-1]))
        ids.append(logits[-1].argmax(-1))
    return torch.stack(ids[1:], 1), torch.stack(logits, 1)


def check_answers(case: Case, model: Emu3, group: str, special: dict) -> None:
    """Answers to single questions."""
    for i, entry in enumerate(case.meta["und"]):
        parts = conversation(case, model, i)
        (part,) = parts
        case.compare(f"und/{i}/input_ids", part.ids[None])
        stored = case.tensors[f"und/{i}/greedy_ids"]
        ids, logits = greedy(model, [parts], stored.shape[1])
        case.compare(f"und/{i}/greedy_ids", ids)
        case.compare(f"und/{i}/greedy_logits", logits[:, : case.tensors[f"und/{i}/greedy_logits"].shape[1]])
        case.compare_note(f"und: {i}", model.processor.text_tokenizer.decode(ids[0].tolist()), entry["answer"])


def padded_ids(rows: list[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Rows of ids, left-padded to one length, and where they are ids [B, T]."""
    length = max(map(len, rows))
    filled = [torch.cat((row.new_full((length - len(row),), pad), row)) for row in rows]
    return torch.stack(filled), torch.stack([torch.arange(length) >= length - len(row) for row in rows])


def check_answer_batch(case: Case, model: Emu3, group: str, special: dict) -> None:
    """Answers to several questions at once; the original pads them."""
    prompts = [conversation(case, model, i) for i in range(len(case.input_note("und")))]
    ids, mask = padded_ids([parts[0].ids for parts in prompts], model.config.special_tokens.pad)
    case.compare("und_batch/input_ids", ids)
    case.compare("und_batch/attention_mask", mask.long())
    batch = pack_sequences(prompts)
    positions = padded(batch.layout.position_ids, mask)
    case.compare("und_batch/position_ids", torch.where(mask, positions, 1))
    answers, logits = greedy(model, prompts, case.tensors["und_batch/greedy_ids"].shape[1])
    case.compare("und_batch/greedy_ids", answers)
    case.compare("und_batch/first_logits", logits[:, 0])
    ours = mask[0] & mask[0][:, None] & torch.ones(len(mask[0]), len(mask[0]), dtype=torch.bool).tril()
    stored = case.tensors["und_batch/allowed"]
    case.compare("und_batch/allowed", torch.where(mask[0][:, None], ours.to(stored.dtype), stored))
    case.better("und_batch/padded_image_ids", ids, case.tensors["und_batch/input_ids"], why="images are never padded")


# ---- drawing


def drawn(model: Emu3, requests: list[tuple[list[Part], list[Part], tuple[int, int]]], scale: float) -> list[Tensor]:
    """Greedy codes after prompts with negative prompts, of their grids."""
    prompts, negatives, grids = zip(*requests, strict=True)
    return model.generate_image_tokens(
        prompts,
        [torch.Generator() for _ in prompts],
        guidance=[scale] * len(prompts),
        negative_prompts=negatives,
        grids=grids,
        image_sampling=GREEDY,
    )


def request_of(
    model: Emu3, prompt: str, negative: str, grid: tuple[int, int]
) -> tuple[list[Part], list[Part], tuple[int, int]]:
    """A prompt, its negative prompt, its grid."""
    return model.processor.generation_parts(prompt, grid), model.processor.negative_parts(negative, grid), grid


def whole_ids(model: Emu3, codes: Tensor) -> Tensor:
    """All ids of an image, with the one that ends the sequence."""
    return torch.tensor([*model.processor.image_ids(codes), model.config.special_tokens.eos])


def check_drawing(case: Case, model: Emu3, group: str, special: dict) -> None:
    """A guided greedy image, a sampled one, one without guidance."""
    note = case.meta["gen"]
    prompt, negative, grid = request_of(model, note["prompt"], note["negative"], tuple(note["grid"]))
    ours = [side // model.config.image_processor.stride for side in model.config.size_of_ratio(note["ratio"])]
    if model.checkpoint_layout == "original":
        case.compare_note("gen: grid", ours, note["grid"])
    case.compare("gen/input_ids", prompt[0].ids[None])
    case.compare("gen/negative_ids", negative[0].ids[None])
    (codes,) = drawn(model, [(prompt, negative, grid)], note["guidance"])
    ids = whole_ids(model, codes)
    case.compare("gen/greedy_ids", ids[None])
    case.compare("gen/allowed_kind", torch.tensor([kind_of(model, int(one)) for one in ids]))
    case.compare("gen/image", as_bytes(model.decode_image_tokens(codes[None])[0]))
    (plain,) = drawn(model, [(prompt, negative, grid)], 1.0)
    case.compare("gen/greedy_ids_guidance1", whole_ids(model, plain)[None])
    case.compare_note("gen: steps", len(ids), note["steps"])
    check_steps(case, model, prompt, negative, note)
    check_sampling(case, model, prompt, negative, note)
    text = model.processor.text_tokenizer
    special_tokens = Emu3SpecialTokens.TOKENS
    before = text.decode(prompt[0].ids.tolist()[: -len(grid_ids(model, grid))])
    case.compare_note("gen_text_before", special_tokens["bos"] + before, case.meta["gen_text_before"])
    case.compare_note("gen_text_after", special_tokens["eos"], case.meta["gen_text_after"])


def grid_ids(model: Emu3, grid: tuple[int, int]) -> list[int]:
    """The ids that begin an image."""
    return encode_prompt(model.processor.text_tokenizer, model.processor.image_start(grid))


def kind_of(model: Emu3, one: int) -> int:
    """The kind of an id of an image, as the case stores it: a code, the ends of a row, a frame, an image, a sequence."""
    special = model.config.special_tokens
    return [special.eol, special.eof, special.eoi, special.eos].index(one) + 1 if one < special.code0 else 0


def teacher_forced(model: Emu3, prompt: list[Part], negative: list[Part], ids: Tensor) -> Tensor:
    """Logits after prompt and negative prompt before each of these ids [2, n, V]."""
    rows = [[text_part([*parts[0].ids.tolist(), *ids.tolist()])] for parts in (prompt, negative)]
    plan = plan_prefill(model.decoder, [EMPTY_CACHE] * 2, rows)
    (hidden,) = model.backbone(plan.batch, plan.attend).values()
    first, second = hidden.split([len(parts[0].ids) + len(ids) for parts in (prompt, negative)])
    return model.decoder.logits(torch.stack([one[-len(ids) - 1 : -1] for one in (first, second)]))


def guided(logits: Tensor, scale: float) -> Tensor:
    """Guidance as the original has it, of logits [2, ..., V] over the whole vocabulary."""
    conditional, unconditional = logits.log_softmax(-1)
    return scale * (conditional - unconditional) + unconditional


def check_steps(case: Case, model: Emu3, prompt: list[Part], negative: list[Part], note: dict) -> None:
    """Logits of the greedy run: the first steps' of all ids, and every step's of codes."""
    steps = len(case.tensors["gen/cond_logits"])
    caches, last = model.prefill_prompts([prompt, negative])
    session = model.decode_session(caches, steps)
    ids = torch.tensor(last)
    found = []
    for n in range(steps):
        found.append(model.decode_step(session, ids))
        ids = case.tensors["gen/greedy_ids"][0, n].expand(2)
    logits = torch.stack(found, 1)
    case.compare("gen/cond_logits", logits[0])
    case.compare("gen/uncond_logits", logits[1])
    case.compare("gen/guided", guided(logits, note["guidance"]))
    scores = guided(teacher_forced(model, prompt, negative, case.tensors["gen/greedy_ids"][0]), note["guidance"])
    case.compare("gen/guided_visual_all", scores[:, model.config.special_tokens.code0 :])


def check_sampling(case: Case, model: Emu3, prompt: list[Part], negative: list[Part], note: dict) -> None:
    """A sampled run: the probabilities of each step, and the code that the stored uniform picks of them."""
    stored = case.tensors["gen/sampled_ids"][0]
    logits = teacher_forced(model, prompt, negative, stored)
    code0 = model.config.special_tokens.code0
    # the logits of codes alone, not normalised: what the library samples by
    conditional, unconditional = logits[..., code0:]
    scores = unconditional + note["guidance"] * (conditional - unconditional)
    least = scores.topk(note["top_k"], -1).values[:, -1:]
    p = scores.masked_fill(scores < least, float("-inf")).softmax(-1)
    uniforms = case.input("gen/uniforms")
    picked = code0 + (p.double().cumsum(-1) <= uniforms[:, None]).sum(-1)
    ids = torch.where(stored >= code0, picked, stored)
    case.compare("gen/sampled_ids", ids[None])
    case.compare("gen/sampled_probs", p[: len(case.tensors["gen/sampled_probs"])])
    h, w = note["grid"]
    codes = ids[: h * (w + 1)].view(h, w + 1)[:, :w] - code0
    case.compare("gen/sampled_codes", codes)
    case.compare("gen/sampled_pixels", model.decode_image_tokens(codes[None]))


def check_drawing_batch(case: Case, model: Emu3, group: str, special: dict) -> None:
    """Two prompts of two grids at once; the original pads negative prompts without a mask, and draws another image."""
    note = case.meta["gen_batch"]
    one = case.meta["gen"]
    grids = [tuple(grid) for grid in note["grids"]]
    requests = [
        request_of(model, text, one["negative"], grid) for text, grid in zip(note["prompts"], grids, strict=True)
    ]
    pad = model.config.special_tokens.pad
    ids, mask = padded_ids([prompt[0].ids for prompt, _, _ in requests], pad)
    case.compare("gen_batch/input_ids", ids)
    case.compare("gen_batch/attention_mask", mask.long())
    case.compare("gen_batch/negative_ids", padded_ids([negative[0].ids for _, negative, _ in requests], pad)[0])
    batch = [whole_ids(model, codes) for codes in drawn(model, requests, one["guidance"])]
    alone = case.tensors["gen/greedy_ids"][0], case.tensors["gen_batch/single_ids"][0]
    case.compare("gen_batch/single_ids", batch[1][None])
    ours, apart = (torch.nn.utils.rnn.pad_sequence(list(rows), True, pad) for rows in (batch, alone))
    case.better("gen_batch/original_ids", ours, apart, why="as each prompt alone")


# ---- training


def check_training(case: Case, model: Emu3, group: str, special: dict) -> None:
    """The loss of an image behind its caption, with gradients, and that of all ids, pads too."""
    note = case.meta["train"]
    codes = case.input("train/codes")
    ids = case.tensors["train/input_ids"]
    mask = case.tensors["train/attention_mask"]
    special_tokens = model.config.special_tokens
    prompts = [
        [special_tokens.bos, text, *model.processor.codes_prompt(one)]
        for text, one in zip(note["captions"], codes, strict=True)
    ]
    rows = [torch.tensor(encode_prompt(model.processor.text_tokenizer, prompt)) for prompt in prompts]
    whole = torch.full_like(ids, special_tokens.pad)
    there = torch.zeros_like(mask)
    for i, row in enumerate(rows):
        whole[i, : len(row)] = row
        there[i, : len(row)] = 1
    case.compare("train/input_ids", whole)
    case.compare("train/attention_mask", there)
    is_code = whole >= special_tokens.code0
    case.compare("train/labels", torch.where(is_code, whole, IGNORE_INDEX))
    samples = [[text_part(row.tolist(), labels=shifted(row, row >= special_tokens.code0))] for row in rows]
    with torch.enable_grad():
        loss = model(pack_sequences(samples)).mean()
        loss.backward()
    largest = max(note["grad_norms"].values())
    case.compare_scalar("train: loss", float(loss), note["loss"], largest=note["loss"])
    norms = gradient_norms(model)
    for name, stored in note["grad_norms"].items():
        case.compare_scalar(f"train: {name}", norms.get(name), stored, largest=largest)
    model.zero_grad()
    ours = loss_of_all_ids(model, ids, mask)
    case.compare_scalar("train: loss_all_tokens", ours, note["loss_all_tokens"], largest=note["loss_all_tokens"])


def loss_of_all_ids(model: Emu3, ids: Tensor, mask: Tensor) -> float:
    """The original's option to learn all ids: pads too, which see the ids before them and no pad."""
    batch = pack_sequences([[text_part(row.tolist())] for row in ids])
    rows = torch.arange(ids.numel())
    ends = (rows // ids.shape[1] + 1) * ids.shape[1]
    there = mask.flatten().bool()
    # of each key the rows that attend to it: none to a pad
    visible = AttentionMask.from_ranges(torch.where(there, rows, 0), torch.where(there, ends, 0))
    (hidden,) = model.backbone(batch, lambda layer, q, k, v: attention(q, k, v, visible)).values()
    logits = model.decoder.logits(hidden).view(*ids.shape, -1)
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def shifted(ids: Tensor, learned: Tensor) -> list[int]:
    """The id that each row must predict [n], of those that are learned."""
    labels = torch.where(learned, ids, IGNORE_INDEX)
    return [*labels[1:].tolist(), IGNORE_INDEX]


def gradient_norms(model: Emu3) -> dict[str, float]:
    """The norm of each gradient, by the original's names."""
    squares: dict[str, float] = defaultdict(float)
    maps = model.original_key_maps()
    for name, parameter in model.named_parameters():
        for key_map in maps:
            for released in key_map.released_tensors(name):
                if parameter.grad is not None:
                    squares[released] += float(parameter.grad.double().square().sum())
    return {name: square**0.5 for name, square in squares.items()}
