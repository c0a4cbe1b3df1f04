"""Show-o by its verbs: batches equal single runs, a prompt is read once, what a mask keeps is kept, sides are extended."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.paths import GOLDEN
from helpers.toys import picture
from PIL import Image
from safetensors.torch import load_file, save_file

import unimm
from unimm import MaskedSampling, ShowO, TextSampling
from unimm.models.memory import plan_inference
from unimm.models.show_o.extension import Extension
from unimm.models.show_o.processor import square_crop
from unimm.processing.images.clip import CLIPImageProcessor

CASE = GOLDEN / "show_o" / "dev"
PARTS = {"vq": CASE / "magvitv2", "clip": CASE / "clip", "tokenizer": CASE / "phi"}
SHORT = TextSampling(max_tokens=8)
TABLES = json.loads((CASE / "tables.json").read_text())


@pytest.fixture(scope="module")
def model() -> ShowO:
    return unimm.load(CASE)


@pytest.fixture(scope="module")
def with_clip() -> ShowO:
    return ShowO.from_pretrained(CASE / "w_clip_vit", components=PARTS)


def pixels(generation) -> list[np.ndarray]:
    return [np.asarray(image).astype(int) for image in generation.images]


def white(box: tuple[int, int, int, int], size: tuple[int, int]) -> Image.Image:
    """A mask of this (width, height), white in a box."""
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


# ---- generating


def test_a_batch_equals_single_runs(model):
    prompts, scales, seeds = (
        ["a red cat", "two blue dogs, a green hill and the sun", "the sun"],
        [1.0, 2.5, 6.0],
        [3, 4, 9],
    )
    batch = pixels(model.generate(prompts, guidance=scales, seed=seeds, steps=4, n=2))
    for i, prompt in enumerate(prompts):
        alone = pixels(model.generate(prompt, guidance=scales[i], seed=seeds[i], steps=4, n=2))
        for k in range(2):
            assert abs(batch[2 * i + k] - alone[k]).max() <= 1


def test_a_prompt_is_read_once_and_nothing_is_padded(model):
    """Rows of the first block: each text once, then the image's at every step."""
    rows: list[int] = []
    hook = model.decoder.blocks[0].register_forward_hook(lambda module, args, out: rows.append(len(out)))
    model.generate("a red cat", n=2, steps=5, guidance=2.0)
    hook.remove()
    text = len(model.processor.prompt_ids("a red cat")) + len(model.processor.prompt_ids(""))
    image = model.config.image_tokens + 2
    assert rows == [text] + 5 * [4 * image]  # two images, two branches each


def test_without_guidance_there_is_one_branch(model):
    rows: list[int] = []
    hook = model.decoder.blocks[0].register_forward_hook(lambda module, args, out: rows.append(len(out)))
    model.generate("a red cat", steps=2, guidance=1.0)
    hook.remove()
    assert rows == [len(model.processor.prompt_ids("a red cat"))] + 2 * [model.config.image_tokens + 2]


def test_only_logits_of_codes_are_computed(model):
    hidden = torch.randn(5, model.config.decoder.dim)
    first = model.config.first_code_id
    whole = model.decoder.logits(hidden)[:, first : first + model.config.n_codes]
    assert torch.allclose(model.image_logits(hidden), whole, atol=1e-6)


def test_sizes(model):
    wide = model.generate("a red cat", size=(16, 32), steps=2).image
    assert wide.size == (32, 16)
    assert model.generate("a red cat", steps=2).image.size == (24, 24)


def test_a_prompt_that_is_too_long_loses_its_end(model):
    changed = replace(model.processor, max_prompt_ids=6)
    ids = changed.prompt_ids("two blue dogs, a green hill")
    assert len(ids) == 6 and ids[:5] == model.processor.prompt_ids("two blue dogs, a green hill")[:5]
    assert ids[-1] == model.processor.end_of_text


def test_special_tokens_stay_text(model):
    end = model.processor.end_of_text
    assert end not in model.processor.prompt_ids("<|endoftext|> a cat")[2:-1]
    assert model.config.special_tokens.soi not in model.processor.prompt_ids("<|soi|>")


# ---- masks


def test_what_a_mask_keeps_is_kept(model):
    image = picture(24, 24)
    mask = white((0, 0, 12, 24), (24, 24))
    known = model.encode_images([image])[0]
    places = model.processor.mask_places(mask)
    assert 0 < places.sum() < len(places)
    (start,) = model._masked_tokens(model.config.token_grid, [[image]], [places])
    drawn = model.complete_image_tokens(
        [model.processor.generation_parts("a cat")],
        start[None],
        [torch.Generator().manual_seed(0)],
        guidance=[2.0],
        steps=4,
        masked_sampling=MaskedSampling(),
    )[0]
    assert torch.equal(drawn[~places], known[~places]) and int(drawn.max()) < model.config.n_codes
    out = model.generate("a cat", images=image, mask=mask, guidance=2.0, steps=4, seed=0).image
    expected = model.decode_image_tokens(drawn[None])[0]
    assert abs(np.asarray(out) / 127.5 - 1 - expected.clamp(-1, 1).permute(1, 2, 0).numpy()).max() < 1 / 100


def test_masks_in_a_batch(model):
    image = picture(30, 40)
    mask = white((0, 0, 20, 15), image.size)
    both = pixels(model.generate(["a cat", "a dog"], images=[image, None], mask=[mask, None], seed=[1, 2], steps=3))
    alone = pixels(model.generate("a cat", images=image, mask=mask, seed=1, steps=3))
    plain = pixels(model.generate("a dog", seed=2, steps=3))
    assert abs(both[0] - alone[0]).max() <= 1 and abs(both[1] - plain[0]).max() <= 1


# ---- extending


@pytest.mark.parametrize("directions", ["left", "right", "up", "down"])
def test_each_side_grows_by_half_and_keeps_what_is_there(model, directions):
    side = model.config.token_grid[0]
    image = picture(24, 24)
    known = model.encode_images([image])[0].unflatten(0, (side, side))
    out = model.extend("a wide sea", images=image, directions=directions, steps=2)
    width, height = out.image.size
    assert (width, height) == ((36, 24) if directions in ("left", "right") else (24, 36))
    canvas = grown_tokens(model, image, [directions])
    inside = {
        "left": canvas[:, -side:],
        "right": canvas[:, :side],
        "up": canvas[-side:],
        "down": canvas[:side],
    }[directions]
    assert torch.equal(inside, known)


def grown_tokens(model, image, directions) -> torch.Tensor:
    """The tokens of an extended image [h, w], whatever is drawn."""
    side = model.config.token_grid[0]
    extension = Extension.plan(side, 0, [(one, None) for one in directions], stride=4)
    canvas = model.encode_images([image]).unflatten(1, (side, side))
    for one in directions:
        canvas, windows = extension.grow(canvas, one, model.config.n_codes)
        for rows, columns in windows:
            window = canvas[:, rows, columns]
            assert window.shape[1:] == (side, side) and (window < model.config.n_codes).any()
            canvas[:, rows, columns] = window.masked_fill(window == model.config.n_codes, 0)
    assert int(canvas.max()) < model.config.n_codes, "every place was in a window"
    return canvas[0]


def test_all_sides_in_any_order(model):
    image = picture(24, 24)
    for directions in (["left", "up", "right", "down"], ["down", "down", "left", "up"]):
        sideways = sum(one in ("left", "right") for one in directions)
        out = model.extend("a sea", images=image, directions=directions, steps=1, guidance=1.0).image
        assert out.size == (24 + 12 * sideways, 24 + 12 * (len(directions) - sideways))
        grown_tokens(model, image, directions)


def test_extending_in_a_batch_equals_alone(model):
    images = [picture(24, 24), picture(24, 24, 1)]
    rounds = ["right", ("down", "a green hill")]
    batch = pixels(model.extend(["a sea", "a hill"], images=images, directions=rounds, seed=[1, 5], steps=2, n=2))
    alone = pixels(model.extend("a hill", images=images[1], directions=rounds, seed=5, steps=2, n=2))
    assert max(abs(a - b).max() for a, b in zip(batch[2:], alone, strict=True)) <= 1


# ---- understanding


@pytest.mark.parametrize("kind", ["codes", "clip"])
def test_batches_and_streams_of_answers_equal_single_ones(kind, model, with_clip):
    chosen = model if kind == "codes" else with_clip
    images, questions = [picture(24, 24), None, picture(40, 30, 1)], ["what is this?", "who", "is it unusual?"]
    batch = chosen.understand(images, questions, text_sampling=SHORT)
    alone = [chosen.understand(i, q, text_sampling=SHORT) for i, q in zip(images, questions, strict=True)]
    assert batch == alone
    assert "".join(chosen.understand(images[0], questions[0], stream=True, text_sampling=SHORT)) == alone[0]


def test_a_conversation_goes_on(model):
    messages = [
        {"role": "user", "content": "what is this?", "images": [picture(24, 24)]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "of which colour?"},
    ]
    parts = model.processor.conversation_parts(messages)
    end = model.processor.end_of_text
    encode = model.tokenizer.encode
    expected = [
        end, *encode("USER: \nwhat is this? ASSISTANT: a cat"), end, *encode("USER: of which colour? ASSISTANT:"),
    ]  # fmt: skip
    assert parts[-1].ids.tolist() == expected
    assert isinstance(model.chat(messages, text_sampling=SHORT), str)


def test_the_system_prompt_and_the_words_behind_it_are_parted(with_clip):
    """By the image, or by a blank where none stands there."""
    processor = with_clip.processor
    blank = {"role": "user", "content": "who?"}
    (part,) = processor.conversation_parts([blank])
    mmu = with_clip.config.special_tokens.mmu
    system = processor.default_system
    encode = with_clip.tokenizer.encode
    assert part.ids.tolist() == [mmu, *encode(f"{system} USER: who? ASSISTANT:")]
    before, *_ = processor.conversation_parts([blank | {"images": picture(24, 24)}])
    assert before.ids.tolist()[: len(encode(system)) + 1] == [mmu, *encode(system)]
    within, *_ = processor.conversation_parts([blank | {"content": "is <image> he?", "images": picture(24, 24)}])
    assert with_clip.tokenizer.decode(within.ids.tolist()).startswith(f"<|mmu|>{system} USER: is ")


def test_ids_of_images_are_left_out_of_answers_and_special_ones_stay(model):
    special = model.config.special_tokens
    ids = [64, special.soi, model.config.first_code_id, special.pad, model.processor.end_of_text, 220]
    assert model.tokenizer.decode(ids) == model.tokenizer.decode([64]) + "<|soi|>" + model.tokenizer.decode([220])


# ---- files


@pytest.mark.parametrize("stem", ["pytorch_model", "diffusion_pytorch_model"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_of_either_writer_load(model, tmp_path, stem, suffix):
    """An index and two shards, as the original's loader takes them."""
    state = load_file(CASE / "pytorch_model.safetensors")
    keys = sorted(state)
    names = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    for i, name in enumerate(names):
        part = {key: state[key] for key in keys[i::2]}
        save_file(part, tmp_path / name) if suffix == "safetensors" else torch.save(part, tmp_path / name)
    index = {"metadata": {}, "weight_map": {key: names[i % 2] for i, key in enumerate(keys)}}
    (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_bytes((CASE / "config.json").read_bytes())
    shutil.copytree(CASE / "phi", tmp_path / "phi")
    loaded = ShowO.from_pretrained(tmp_path)
    ours = model.state_dict()
    assert all(torch.equal(x, ours[key]) for key, x in loaded.state_dict().items())


def test_binary_files_and_folders_of_the_hub_load(model, tmp_path):
    """`.bin` in place of safetensors, the parts beside, and a folder written by ourselves, which holds all."""
    for name, place in (("", tmp_path / "model"), ("magvitv2", tmp_path / "vq")):
        place.mkdir()
        torch.save(load_file(CASE / name / "pytorch_model.safetensors"), place / "pytorch_model.bin")
        (place / "config.json").write_bytes((CASE / name / "config.json").read_bytes())
    (tmp_path / "model" / "phi").mkdir()
    for file in (CASE / "phi").iterdir():
        (tmp_path / "model" / "phi" / file.name).write_bytes(file.read_bytes())
    loaded = ShowO.from_pretrained(tmp_path / "model", components={"vq": tmp_path / "vq"})
    ours = loaded.state_dict()
    assert all(torch.equal(x, ours[key]) for key, x in model.state_dict().items())
    loaded.save_pretrained(tmp_path / "saved")
    again = unimm.load(tmp_path / "saved")
    assert again.config == loaded.config and again.vq is not None
    assert again.understand(picture(), "what", text_sampling=SHORT) == model.understand(
        picture(), "what", text_sampling=SHORT
    )


def test_a_model_with_clip_is_saved_whole(with_clip, tmp_path):
    with_clip.save_pretrained(tmp_path)
    again = unimm.load(tmp_path)
    ours = with_clip.state_dict()
    assert again.config.clip_dim == 32 and again.state_dict().keys() == ours.keys()
    assert all(torch.equal(x, ours[key]) for key, x in again.state_dict().items())


def test_sizes_after_the_resize():
    """Of the released sizes: resized to, and cut from, as stored."""
    for row in TABLES["resize"]:
        image = Image.new("RGB", tuple(row["size"]))
        for side in (256, 512):
            with_places = recorded_crop(square_crop, image, side)
            assert with_places == (row[str(side)]["resized"], row[str(side)]["crop_left_top"]), row
        clip = recorded_crop(lambda one, side: CLIPImageProcessor(size=side)(one), image, 336)
        assert clip == (row["clip"]["resized"], row["clip"]["crop_left_top"]), row


def recorded_crop(crop, image, side) -> tuple[list[int], list[int]]:
    """The size after a resize, whose passes are two calls, and where the square begins."""
    found: list = []

    class Recorded:
        def __init__(self, size):
            self.size = self.width, self.height = size

        def resize(self, size, filter_):
            found.append(list(size))
            return Recorded(size)

        def crop(self, box):
            found.append(list(box[:2]))
            return image.resize((side, side))

    crop(Recorded(image.size), side)
    return found[-2], found[-1]


def test_the_memory_of_an_image_is_planned():
    """By a call without values, of which the decoding of pixels is told apart."""
    (plan,) = plan_inference(CASE)
    assert min(plan.kv_cache, plan.step, plan.decode) > 0
