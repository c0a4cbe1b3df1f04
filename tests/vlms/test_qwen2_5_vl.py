"""Qwen2.5-VL: beside transformers' at toy size, its windows, batches, caches, files and prompts; the released
manifests."""

import json
import re

import numpy as np
import pytest
import torch
from helpers.greedy import greedy
from helpers.prompts import rendered
from helpers.qwen_manifests import expanded
from helpers.qwen_toys import (
    IDS,
    LOOK,
    SIZES,
    TEXT,
    TURNING,
    VISION,
    Letters,
    files,
    saved,
    transformers_model,
)
from helpers.tolerance import assert_close
from helpers.toys import picture
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from unimm.checkpoint.load import CheckpointError, check_keys
from unimm.generation.decode import sampling_loop
from unimm.generation.kv_cache import EMPTY_CACHE
from unimm.generation.text_sampling import TextSampling
from unimm.kernels import attention
from unimm.nn.decoder import Decoder, DecoderConfig
from unimm.nn.rope import mrope_cos_sin, rope_cos_sin
from unimm.processing.images.qwen2_vl import Qwen2VLImageProcessor, smart_resize
from unimm.sequence.packing import pack_sequences
from unimm.sequence.parts import IGNORE_INDEX, text_part
from unimm.vlms.qwen2_5_vl.config import QwenSpecialTokens, QwenVisionConfig, QwenVLConfig
from unimm.vlms.qwen2_5_vl.model import QwenVL
from unimm.vlms.qwen2_5_vl.processor import IMAGE_PAD, video_frames
from unimm.vlms.qwen2_5_vl.vision import cell_positions, window_order
from unimm.vlms.qwen2_5_vl.weights import has_nested_names, qwen_key_map


@pytest.fixture(scope="module")
def theirs():
    return transformers_model()


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory) -> QwenVL:
    model = QwenVL.from_pretrained(saved(theirs, tmp_path_factory.mktemp("qwen")))
    model.tokenizer = Letters()
    return model.requires_grad_(False)


def shown(model: QwenVL, sizes=SIZES) -> list:
    """Patches and grids of images of noise."""
    return [model.config.image_processor.to_patches([picture(w, h, seed=i)]) for i, (h, w) in enumerate(sizes)]


def batch_of(model: QwenVL) -> list[list]:
    """Prompts of two images, of none, and of one, as items."""
    one, two, three = shown(model, [(20, 37), (24, 16), (16, 40)])
    look, end = [152, 154, 153], [10, 20, 30]
    rows = [([7, 8, *look, 9, *look, *end], [one, two]), ([5, 6, *end], []), ([*look, *end], [three])]
    return [model.processor.ids_to_parts(ids, some) for ids, some in rows]


def for_transformers(model: QwenVL, samples: list[list]) -> dict[str, torch.Tensor]:
    """The same prompts as the arguments of transformers' model, padded on the left."""
    rows, patches, grids, m = [], [], [], model.config.vision.spatial_merge_size
    for items in samples:
        ids: list[int] = []
        for item in items:
            ids += item.ids.tolist() + [154] * item.n_tokens
            if item.kind == "und_image":
                h, w = (item.image_position_ids[:, 1:].amax(0) + 1).tolist()
                grids.append([item.n_tokens // (h * w), h * m, w * m])
                patches.append(item.tokens.reshape(item.n_tokens * m * m, -1))
        rows.append(ids)
    longest = max(map(len, rows))
    padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in rows])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows])
    return dict(
        input_ids=padded, attention_mask=mask, mm_token_type_ids=(padded == 154).int(), pixel_values=torch.cat(patches),
        image_grid_thw=torch.tensor(grids),
    )  # fmt: skip


# ---- beside transformers


@pytest.mark.parametrize("tied", [False, True])
@torch.inference_mode()
def test_equals_transformers(tmp_path, tied):
    """Positions, hidden states, logits and greedy text of a batch, through the released layout."""
    theirs = transformers_model(tied)
    model = QwenVL.from_pretrained(saved(theirs, tmp_path))
    assert model.config.decoder.tie_word_embeddings == tied == ("decoder.head.weight" not in model.state_dict())
    samples = batch_of(model)
    given, batch = for_transformers(model, samples), pack_sequences(samples)
    real = given["attention_mask"].bool()
    out = theirs(**given, output_hidden_states=True)
    hidden = model.last_hidden_state(batch)
    assert_close(hidden, out.hidden_states[-1][real])
    assert_close(model.decoder.head(hidden), out.logits[real])
    assert torch.equal(
        greedy(model, samples), theirs.generate(**given, max_new_tokens=8, do_sample=False)[:, real.shape[1] :]
    )


@torch.inference_mode()
def test_images_of_any_size_equal_transformers(theirs, ours):
    """Cells at the edges of windows, a single cell, many images in one call."""
    patches, grids = zip(*shown(ours), strict=True)
    expected = theirs.model.visual(torch.cat(patches), grid_thw=torch.tensor(grids)).pooler_output
    assert_close(ours.vision(torch.cat(patches), grids), expected)
    alone = [ours.vision(x, [grid]) for x, grid in zip(patches, grids, strict=True)]
    assert_close(torch.cat(alone), expected)


@torch.inference_mode()
def test_a_video_equals_transformers(theirs, ours):
    """Frames in pairs, the last one twice; the clock of its frames runs with its seconds."""
    patches, grid = ours.config.image_processor.to_patches(video_frames([picture(40, 24, seed=i) for i in range(3)]))
    assert grid == (2, 6, 10)
    assert_close(
        ours.vision(patches, [grid]), theirs.model.visual(patches, grid_thw=torch.tensor([grid])).pooler_output
    )
    items = ours.processor.ids_to_parts([7, 152, 155, 153, 8], [(patches, grid)], seconds_per_frame=[0.5])
    ids = torch.tensor([[7, 152, *[155] * 30, 153, 8]])
    at, delta = theirs.model.get_rope_index(
        ids, (ids == 155).int() * 2, video_grid_thw=torch.tensor([grid]), second_per_grid_ts=torch.tensor([0.5])
    )
    batch = pack_sequences([items])
    assert ours.position_ids(batch)[2:32, 0].tolist() == [2] * 15 + [3] * 15, "0.5 seconds of 3 ticks, cut"
    # transformers 5 counts on from one frame's sides, 4.49 from the largest position: here the same
    assert torch.equal(ours.position_ids(batch), at[:, 0].T) and batch.layout.next_positions[0] == ids.shape[1] + int(
        delta
    )


def test_pixels_equal_transformers():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    theirs = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 640, "longest_edge": 1600}
    )
    rule = Qwen2VLImageProcessor.from_json(
        {"size": {"shortest_edge": 640, "longest_edge": 1600}}, patch_size=4, merge_size=2, temporal_patch_size=2
    )
    assert (rule.min_pixels, rule.max_pixels, rule.merged_patch_size) == (640, 1600, 8)
    assert (
        Qwen2VLImageProcessor.from_json(
            {"size": {"min_pixels": 640, "max_pixels": 1600}}, patch_size=4, merge_size=2, temporal_patch_size=2
        )
        == rule
    )
    for i, (h, w) in enumerate([*SIZES, (200, 31)]):
        image = picture(w, h, seed=i)
        expected = theirs(image, return_tensors="pt")
        patches, grid = rule.to_patches([image])
        assert [*grid] == expected["image_grid_thw"][0].tolist()
        assert_close(patches, expected["pixel_values"])


def test_loss_equals_transformers(theirs, ours):
    turn = {"role": "user", "content": "what?", "images": picture(20, 30)}
    items = ours.processor.with_answer([turn], "a b")
    batch = pack_sequences([items])
    assert (batch.labels != IGNORE_INDEX).sum() == 4, "three letters and the end"
    given = for_transformers(ours, [items])
    labels = given["input_ids"].clone()
    labels[0, :-4] = IGNORE_INDEX
    with torch.inference_mode():
        assert_close(ours(batch).mean(), theirs(**given, labels=labels).loss)


# ---- batches and caches


@torch.inference_mode()
def test_a_batch_equals_singles(ours):
    samples = batch_of(ours)
    for got, sample in zip(ours.encode(samples), samples, strict=True):
        assert_close(got, ours.encode([sample])[0])
    together = greedy(ours, samples)
    assert torch.equal(together, torch.cat([greedy(ours, [sample]) for sample in samples]))


@torch.inference_mode()
def test_cached_equals_uncached(ours):
    """A prefix read once, an image among it; and text written row by row equals text read at once."""
    samples = batch_of(ours)
    whole = ours.encode(samples)
    kept = [3, 0, 1]
    contexts = ours.prefill([EMPTY_CACHE] * 3, [items[:n] for items, n in zip(samples, kept, strict=True)])
    rest = ours.encode([items[n:] for items, n in zip(samples, kept, strict=True)], caches=contexts)
    for got, expected in zip(rest, whole, strict=True):
        assert_close(got, expected[-len(got) :])
    said = greedy(ours, samples)
    for items, ids in zip(samples, said, strict=True):
        (hidden,) = ours.encode([[*items, text_part(ids.tolist())]])
        assert torch.equal(ours.decoder.head(hidden)[-9:-1].argmax(-1), ids)


def test_optimized_for_cpu_answers_the_same(ours):
    samples = batch_of(ours)
    ready = ours.optimize_for_cpu()
    assert ready is not ours and ready.decoder.embed.weight is ours.decoder.embed.weight
    assert torch.equal(greedy(ready, samples), greedy(ours, samples))


def test_windows_see_only_themselves(ours):
    """A changed cell reaches its window in the first layer, and all of its frame in the second."""
    patches, grid = shown(ours, [(24, 40)])[0]
    order, lengths = window_order([cell_positions(grid, 2)], 2)
    assert lengths == [4, 4, 2, 2, 2, 1] and order[:4].tolist() == [0, 1, 5, 6] and order[-1] == 14
    changed = patches.clone()
    changed[:4] += 1  # the first cell
    seen: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda module, args, out: seen.append(out)) for block in ours.vision.blocks[:2]
    ]
    with torch.inference_mode():
        ours.vision(patches, [grid])
        ours.vision(changed, [grid])
    for hook in hooks:
        hook.remove()
    touched = [(seen[i] != seen[i + 2]).any(-1) for i in range(2)]
    assert touched[0].nonzero().flatten().tolist() == list(range(16)) and touched[1].all()


# ---- the decoder's part


def test_equal_axes_turn_as_one(ours):
    cfg, at = ours.config.decoder, torch.arange(9) * 7
    rope = (cfg.head_dim, cfg.rope_theta, cfg.rope_sections)
    one = mrope_cos_sin(at, *rope, torch.float32)
    assert torch.equal(one, rope_cos_sin(at, cfg.head_dim, cfg.rope_theta, torch.float32))
    assert torch.equal(mrope_cos_sin(at[:, None].expand(-1, 3), *rope, torch.float32), one)
    axes = mrope_cos_sin(torch.stack((at, at + 1, at + 2), 1), *rope, torch.float32)
    parts = [mrope_cos_sin(at + i, *rope, torch.float32).split(cfg.rope_sections, -1)[i] for i in range(3)]
    assert torch.equal(axes, torch.cat(parts, -1))


def test_a_tied_head_is_the_table():
    cfg = DecoderConfig(
        dim=12, n_layers=1, n_heads=2, n_kv_heads=1, mlp_dim=8, vocab_size=20, max_positions=64, rope_theta=1e4, norm_eps=1e-6,
        act="silu", qkv_bias=True, qk_norm=False, experts=("all",), tie_word_embeddings=True,
    )  # fmt: skip
    decoder, x = Decoder(cfg), torch.randn(3, 12)
    assert decoder.head.weight is decoder.embed.weight and not [name for name in decoder.state_dict() if "head" in name]
    assert torch.equal(decoder.head(x), x @ decoder.embed.weight.T)
    decoder.logits(x).sum().backward()
    assert decoder.embed.weight.grad.any()
    moved = decoder.to(torch.float64)
    assert moved.head(x.double()).dtype == torch.float64


def test_every_parameter_gets_a_gradient(theirs, tmp_path):
    model = QwenVL.from_pretrained(saved(theirs, tmp_path)).train()
    model.tokenizer = Letters()
    turn = {"role": "user", "content": "?", "images": picture(20, 30)}
    model(pack_sequences([model.processor.with_answer([turn], "yes")])).mean().backward()
    assert not [name for name, x in model.named_parameters() if x.grad is None or not x.grad.any()]


# ---- files


def newer(key: str) -> str:
    """A released name in the newer spelling."""
    return re.sub(r"^visual\.", "model.visual.", re.sub(r"^model\.", "model.language_model.", key))


@pytest.mark.parametrize(
    ("name", "numbers", "tensors", "parameters"),
    [("qwen2.5-vl-3b", (2048, 36, 16, 2, 11008, 151936, True), 824, 3_754_622_976),
     ("qwen2.5-vl-7b", (3584, 28, 28, 4, 18944, 152064, False), 729, 8_292_166_656)],
)  # fmt: skip
def test_manifests_fit_the_released_models(name, numbers, tensors, parameters):
    """Every released key meets a parameter of the same shape, every parameter a key, in both spellings."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    text = dict(zip((*names, "vocab_size", "tie_word_embeddings"), numbers, strict=True))
    config = QwenVLConfig.from_json(text | {"vision_config": {"hidden_size": 1280, "out_hidden_size": numbers[0]}}, {})
    assert (
        config.decoder.head_dim == 128
        and config.decoder.rope_sections == (16, 24, 24)
        and config.vision.window_cells == 4
    )
    with torch.device("meta"):
        model = QwenVL(config)
    manifest, state = expanded(name), model.state_dict()
    assert len(manifest) == tensors and sum(x.numel() for x in state.values()) == parameters
    head = not config.decoder.tie_word_embeddings
    assert not has_nested_names(manifest)
    found = check_keys(manifest, qwen_key_map(head=head), state, "here")
    assert {ours for one in found.values() for ours in one.our_names} == set(state)
    deeper = {newer(key): shape for key, shape in manifest.items()}
    assert (
        has_nested_names(deeper)
        and len(check_keys(deeper, qwen_key_map(head=head, nested=True), state, "here")) == tensors
    )
    inside = {f"part.{key}": shape for key, shape in manifest.items()}
    held = nn.ModuleDict({"reader": model}).state_dict()
    assert (
        len(check_keys(inside, qwen_key_map(head=head, prefix="part.", module_prefix="reader."), held, "here"))
        == tensors
    )
    del manifest["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"missing keys: model\.norm\.weight"):
        check_keys(manifest, qwen_key_map(head=head), state, "here")


@pytest.mark.parametrize("tied", [False, True])
@torch.inference_mode()
def test_round_trip(tmp_path, tied):
    """What is saved loads equal, in either spelling and dtype; transformers reads it, too."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    first = QwenVL.from_pretrained(saved(transformers_model(tied), tmp_path / "theirs"))
    first.save_pretrained(tmp_path / "ours")
    again = QwenVL.from_pretrained(tmp_path / "ours")
    assert again.config == first.config
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in first.state_dict().items())
    state = load_file(tmp_path / "ours" / "model.safetensors")
    assert ("lm_head.weight" in state) != tied and any(key.startswith("visual.") for key in state)
    samples = batch_of(first)
    expected = first.last_hidden_state(pack_sequences(samples))
    given = for_transformers(first, samples)
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    out = theirs(**given, output_hidden_states=True)
    assert_close(out.hidden_states[-1][given["attention_mask"].bool()], expected)
    save_file({newer(key): x for key, x in state.items()}, tmp_path / "ours" / "model.safetensors")
    assert torch.equal(QwenVL.from_pretrained(tmp_path / "ours").last_hidden_state(pack_sequences(samples)), expected)
    half = QwenVL.from_pretrained(tmp_path / "ours", dtype="bfloat16")
    assert {x.dtype for x in half.parameters()} == {torch.bfloat16}
    # eight bits of a number, through five layers
    assert (half.last_hidden_state(pack_sequences(samples)).float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_config_round_trip():
    config = QwenVLConfig.from_json(files(tie_word_embeddings=True), LOOK)
    written = config.to_json()
    assert QwenVLConfig.from_json(written["config.json"], written["preprocessor_config.json"]) == config
    nested_ = {
        "text_config": TEXT | {"rope_parameters": TURNING},
        "vision_config": VISION,
        "tie_word_embeddings": True,
        **IDS,
    }
    assert QwenVLConfig.from_json(nested_, LOOK) == config
    assert config.special_tokens == QwenSpecialTokens(
        im_end=151, vision_start=152, vision_end=153, image_pad=154, video_pad=155
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision_config": None}, "describes no Qwen2.5-VL: expected a vision_config"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling of type yarn, which no release does"),
        ({"use_sliding_window": True}, "use_sliding_window, which no release does"),
        ({"rope_scaling": {"mrope_section": [1, 2]}}, r"got rotary sections \(1, 2\).*expected a sum of 6"),
        ({"rope_scaling": {"mrope_section": [3, 3]}}, "expected three numbers"),
        ({"vision_config": VISION | {"out_hidden_size": 40}}, "got out_hidden_size 40.*expected 72"),
        ({"vision_config": VISION | {"num_heads": 4}}, "expected heads of a multiple of 4"),
        ({"vision_config": VISION | {"fullatt_block_indexes": [7]}}, "full attention in layers .7,.*layers 0 to 2"),
        (
            {"vision_config": VISION | {"temporal_patch_size": 1}},
            "got temporal_patch_size 2, expected 1 by the rest of preprocessor_config",
        ),
    ],
)
def test_wrong_configs(changes, words):
    found = {key: value for key, value in files(**changes).items() if value is not None}
    with pytest.raises(ValueError, match=words):
        QwenVLConfig.from_json(found, LOOK)


def test_wrong_weights(theirs, tmp_path):
    saved(theirs, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    key = next(key for key in state if key.endswith("merger.ln_q.weight"))
    save_file({name: x for name, x in state.items() if name != key}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="missing keys: .*merger.ln_q.weight"):
        QwenVL.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        QwenVL.from_pretrained(tmp_path)


# ---- images and prompts


def test_sizes():
    assert smart_resize(28, 84, 28, 784, 10**6) == (28, 84)
    assert smart_resize(42, 70, 28, 784, 10**6) == (56, 56), "halves go to even"
    assert smart_resize(1, 150, 28, 784, 10**6) == (28, 364), "no side is lost"
    assert smart_resize(20, 3000, 28, 784, 28 * 28 * 20)[0] == 28
    for bad in ((0, 5), (2, 401)):
        with pytest.raises(ValueError, match="expected at most 200 times as long as wide"):
            smart_resize(*bad, 28, 784, 10**6)
    with pytest.raises(ValueError, match="expected positive sizes"):
        Qwen2VLImageProcessor(patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=100, max_pixels=99)
    grey = Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    patches, grid = grey.to_patches([Image.fromarray(np.full((8, 8, 3), 255, np.uint8))])
    assert grid == (1, 2, 2) and patches.shape == (4, 96) and torch.equal(patches, torch.ones(4, 96))


def test_template(ours):
    turns_ = [{"role": "user", "content": "a", "images": picture()}, {"role": "assistant", "content": "b"},
              {"role": "user", "content": f"c {IMAGE_PAD} d", "images": picture()}]  # fmt: skip
    assert rendered(ours.processor, turns_) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n[image]a<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc [image] d<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered(ours.processor, turns_[2:], system="").startswith("<|im_start|>user")
    items = ours.processor.conversation_parts(turns_)
    assert [item.kind for item in items] == ["text", "und_image", "text", "und_image", "text"]
    # an image stands between <|vision_start|>, which is its part's, and <|vision_end|>
    assert items[1].ids.tolist() == [152] and items[2].ids.tolist()[0] == 153 and 152 not in items[0].ids.tolist()
    # a special token that a user types is words
    (item,) = ours.processor.conversation_parts([{"role": "user", "content": "<|im_end|>"}], system="")
    assert item.ids.tolist().count(151) == 1


def test_positions(ours):
    """Worked: 2 words, an image of 2 x 1 cells behind its special token, its end, a word."""
    shown_ = ours.config.image_processor.to_patches([picture(8, 16)])
    batch = pack_sequences([ours.processor.ids_to_parts([5, 6, 152, 154, 154, 153, 7], [shown_])])
    assert ours.position_ids(batch).tolist() == [[0] * 3, [1] * 3, [2] * 3, [3, 3, 3], [3, 4, 3], [5] * 3, [6] * 3]
    assert batch.layout.next_positions == (7,)


def test_verbs(ours):
    ask, look, short = "what is it?", picture(20, 30), TextSampling(max_tokens=6)
    one = ours.understand(look, ask, text_sampling=short)
    assert isinstance(one, str) and "".join(ours.understand(look, ask, text_sampling=short, stream=True)) == one
    turn = {"role": "user", "content": ask, "images": look}
    assert ours.chat([turn], text_sampling=short) == one
    assert ours.chat([[turn], [{"role": "user", "content": "b"}]], text_sampling=short)[0] == one
    assert ours.understand([[look], None], [ask, "b"], text_sampling=short)[0] == one
    assert ours.chat([turn], system="be brief", text_sampling=short) is not None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.chat([]), "expected a list of messages"),
        (lambda m: m.chat([[{"role": "user", "content": "a"}]] * 2, stream=True), "2 conversations to stream"),
        (lambda m: m.chat([{"role": "assistant", "content": "a"}]), "does not end with the user"),
        (lambda m: m.chat([{"role": "model", "content": "a"}]), "expected a dict of role"),
        (lambda m: m.understand(None, " "), "got an empty prompt"),
        (lambda m: m.understand(picture(), f"{IMAGE_PAD}{IMAGE_PAD}"), "for 1 images: expected one for each"),
        (lambda m: m.understand(picture(900, 4), "a"), "at most 200 times as long"),
        (lambda m: m.understand(None, "a" * 600), "would reach position .*the model knows 512"),
        (lambda m: m.encode([[text_part([1] * 600)]]), "would reach position 600"),
        (lambda m: m.processor.ids_to_parts([154, 3], shown(m, [(8, 8)])), "without <\\|vision_start\\|> before it"),
        (lambda m: m.processor.ids_to_parts([152, 154, 3], []), "got 1 placeholders for no image"),
        (
            lambda m: m.processor.ids_to_parts([152, 154, 154, 3], shown(m, [(40, 40)])),
            "2 placeholders for an image of 25 cells",
        ),
        (lambda m: m.processor.ids_to_parts([152, 3], shown(m, [(8, 8)])), "1 images and fewer placeholders"),
        (lambda m: video_frames([picture(8, 8), picture(8, 9)]), "of one size"),
    ],
)
def test_bad_input(ours, call, words):
    with pytest.raises(ValueError, match=words):
        call(ours)


def test_no_tokenizer(theirs, tmp_path):
    model = QwenVL.from_pretrained(saved(theirs, tmp_path))
    with pytest.raises(ValueError, match="has no tokenizer"):
        model.understand(None, "a")


def test_a_given_attention_is_used(ours):
    """States through a caller's attention, at some rows: what a model built around the VLM asks for."""
    batch, calls = pack_sequences(batch_of(ours)), []

    def attend(layer, q, k, v):
        calls.append(layer)
        return attention(q, k, v, batch.layout.mask)

    with torch.inference_mode():
        some = ours.last_hidden_state(batch, attend, rows=torch.tensor([1, 5]))
        assert calls == [0, 1] and torch.equal(some, ours.last_hidden_state(batch)[[1, 5]])


def test_vision_config_names_what_it_lacks():
    with pytest.raises(ValueError, match="lacks hidden_size, out_hidden_size"):
        QwenVisionConfig.from_json({})


def test_where_a_config_is_silent():
    """As transformers has it: a config that was written as differences from its class means those numbers."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig

    said = files()
    for name in ("rms_norm_eps", "max_position_embeddings"):
        said.pop(name, None)
    vision = {key: value for key, value in said["vision_config"].items() if key != "tokens_per_second"}
    config = QwenVLConfig.from_json(said | {"vision_config": vision}, {})
    text, tower = Qwen2_5_VLTextConfig(), Qwen2_5_VLVisionConfig()
    assert config.decoder.norm_eps == text.rms_norm_eps and config.decoder.max_positions == text.max_position_embeddings
    assert config.vision.tokens_per_second == tower.tokens_per_second
    with pytest.raises(ValueError, match="expected a rope_theta of 10000"):
        QwenVLConfig.from_json(
            files(vision_config=said["vision_config"] | {"rope_parameters": {"rope_theta": 500.0}}), {}
        )


def test_several_ids_end_an_answer(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [ours.config.special_tokens.im_end, 7]})
    )
    both = QwenVL.from_pretrained(tmp_path)
    assert (
        both.config.special_tokens.im_end == ours.config.special_tokens.im_end
        and both.config.special_tokens.eos_ids == (ours.config.special_tokens.im_end, 7)
    )
    both.save_pretrained(tmp_path / "again")
    assert QwenVL.from_pretrained(tmp_path / "again").config == both.config
    short = TextSampling(max_tokens=2)
    for end, expected in (((9, 7), [[3, None], [4, None]]), (9, [[3, 7], [4, None]])):
        logits = iter(torch.nn.functional.one_hot(torch.tensor([[3, 7], [4, 9]]), 10).float())
        assert (
            list(sampling_loop(lambda ids, x=logits: next(x), [1, 1], end=end, sampling=short, seeds=[0, 0]))
            == expected
        )


def test_a_prompt_of_one_id(ours):
    contexts, last = ours.prefill_prompts([[text_part([5])]])
    assert contexts[0].length == 0 and last == [5]


def test_a_preprocessor_config_is_followed():
    rule = Qwen2VLImageProcessor.from_json({"resample": 2}, patch_size=4, merge_size=2, temporal_patch_size=2)
    assert rule.resample == 2 and rule.max_pixels == 28 * 28 * 1280
    assert Qwen2VLImageProcessor.from_json(rule.to_json(), patch_size=4, merge_size=2, temporal_patch_size=2) == rule
    image = picture(64, 48)
    expected = image.resize(rule.resized_size(image.height, image.width)[::-1], Image.Resampling.BILINEAR)
    assert np.array_equal(np.asarray(rule(image)), np.asarray(expected))
    for name in ("do_resize", "do_rescale", "do_normalize"):
        with pytest.raises(ValueError, match=f"got {name} False, expected True"):
            Qwen2VLImageProcessor.from_json({name: False}, patch_size=4, merge_size=2, temporal_patch_size=2)
    with pytest.raises(ValueError, match="got resample 9"):
        Qwen2VLImageProcessor.from_json({"resample": 9}, patch_size=4, merge_size=2, temporal_patch_size=2)
