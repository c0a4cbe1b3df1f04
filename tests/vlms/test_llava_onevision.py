"""LLaVA-OneVision: beside transformers' at toy size, its tiles, batches, caches, files and prompts; the released
manifest."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from helpers.cases import manifest
from helpers.greedy import greedy
from helpers.llava_toys import MOST, PINS, RELEASED, SIDE, SIZE, TEXT, TOP, VISION, Letters
from helpers.prompts import rendered
from helpers.tolerance import assert_close
from helpers.toys import picture
from PIL import Image
from safetensors.torch import load_file, save_file

from unimm.checkpoint.load import CheckpointError, check_keys
from unimm.checkpoint.save import released_tensors
from unimm.generation.kv_cache import EMPTY_CACHE
from unimm.generation.text_sampling import TextSampling
from unimm.processing.images.llava_onevision import LlavaOnevisionImageProcessor
from unimm.sequence.packing import pack_sequences
from unimm.sequence.parts import IGNORE_INDEX, text_part
from unimm.vlms.llava_onevision.config import GRID_PINPOINTS, LlavaConfig
from unimm.vlms.llava_onevision.model import LlavaOneVision
from unimm.vlms.llava_onevision.processor import IMAGE_TOKEN
from unimm.vlms.llava_onevision.weights import llava_key_map

SIZES = [(14, 14), (20, 37), (60, 9), (9, 80), (41, 40), (100, 7), (31, 30)]  # (height, width)


def transformers_model(tied: bool = False):
    """transformers' model at toy size, of random weights larger than usual, so that differences show."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    turning = {"rope_theta": 5000.0, "rope_type": "default"}
    config = LlavaOnevisionConfig(
        vision_config=VISION, text_config=TEXT | {"rope_parameters": turning, "bos_token_id": None},
        tie_word_embeddings=tied, **TOP,
    )  # fmt: skip
    torch.manual_seed(3)
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.normal_(std=1.5 * x[0].numel() ** -0.5) if x.ndim > 1 else x.add_(0.1 * torch.randn(x.shape))
    model.tie_weights()
    return model


def transformers_processor():
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    return LlavaOnevisionImageProcessorPil(
        size={"height": SIZE, "width": SIZE},
        image_grid_pinpoints=PINS,
        image_mean=[0.5, 0.4, 0.6],
        image_std=[0.5, 0.3, 0.5],
    )


def saved(model, folder: Path) -> Path:
    """transformers' model in a folder, with a preprocessor's config."""
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(transformers_processor().to_json_string())
    return folder


@pytest.fixture(scope="module")
def theirs():
    return transformers_model()


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory) -> LlavaOneVision:
    model = LlavaOneVision.from_pretrained(saved(theirs, tmp_path_factory.mktemp("llava")))
    model.tokenizer = Letters()
    return model.requires_grad_(False)


def shown(sizes=SIZES) -> list[Image.Image]:
    return [picture(w, h, seed=i) for i, (h, w) in enumerate(sizes)]


PROMPTS = [
    ([7, 8, 154, 10, 20, 30], [(20, 37)]),
    ([5, 6, 10], []),
    ([7, 154, 154, 9, 154, 20], [(9, 80), (14, 14), (31, 30)]),
]


def batch_of(model: LlavaOneVision) -> list[list]:
    """Prompts of an image, of none, and of three, two of them side by side, as items."""
    return [model.processor.ids_to_parts(ids, shown(sizes), tiled=len(sizes) == 1) for ids, sizes in PROMPTS]


def for_transformers(samples: list[list], prompts=PROMPTS) -> dict[str, torch.Tensor]:
    """The same prompts as the arguments of transformers' model, padded on the left; its own pixels."""
    rows = [[one for item in items for one in (item.ids.tolist() or [154] * item.n_tokens)] for items in samples]
    longest = max(map(len, rows))
    padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in rows])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows])
    given = transformers_processor()([shown(sizes) for _, sizes in prompts], return_tensors="pt")
    return dict(input_ids=padded, attention_mask=mask, **given)


# ---- beside transformers


@pytest.mark.parametrize("tied", [False, True])
@torch.inference_mode()
def test_equals_transformers(tmp_path, tied):
    """Hidden states, logits and greedy text of a batch, through the released layout."""
    theirs = transformers_model(tied)
    theirs.generation_config.eos_token_id = None
    model = LlavaOneVision.from_pretrained(saved(theirs, tmp_path))
    assert model.config.decoder.tie_word_embeddings == tied == ("decoder.head.weight" not in model.state_dict())
    samples = batch_of(model)
    given, batch = for_transformers(samples), pack_sequences(samples)
    real = given["attention_mask"].bool()
    out = theirs(**given, output_hidden_states=True)
    hidden = model.last_hidden_state(batch)
    assert_close(hidden, out.hidden_states[-1][real])
    assert_close(model.decoder.head(hidden), out.logits[real])
    said = theirs.generate(**given, max_new_tokens=8, do_sample=False, pad_token_id=0)[:, real.shape[1] :]
    assert torch.equal(greedy(model, samples), said)


@torch.inference_mode()
def test_images_of_any_size_equal_transformers(theirs, ours):
    """Rows of images higher and wider than a tile, shrunk ones too, all in one call; and what a row is made of."""
    for size, image in zip(SIZES, shown(), strict=True):
        item = ours.processor.und_image_part(image, tiled=True)
        expected = transformers_processor()(image, return_tensors="pt")
        assert_close(item.pixel_values, expected["pixel_values"][0])
        assert [*size] == expected["image_sizes"][0].tolist() == item.tokens[0, :2].tolist()
        (rows,) = theirs.model.get_image_features(**expected).pooler_output
        assert_close(ours.image_features(pack_sequences([[item]]).und_images), rows)
    items = [ours.processor.und_image_part(image, tiled=i % 2 == 0) for i, image in enumerate(shown())]
    alone = [ours.image_features(pack_sequences([[item]]).und_images) for item in items]
    assert_close(ours.image_features(pack_sequences([items]).und_images), torch.cat(alone))


def test_sizes_are_those_of_the_processor():
    """Rows, also of the released sizes: MetaQuery's squares of 384 pixels have 1485."""
    from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

    class Counting(LlavaOnevisionProcessor):
        def __init__(self, pins, side, most):
            self.num_image_tokens, self.vision_aspect_ratio = side**2, f"anyres_max_{most}"
            self.image_processor = type("Pins", (), {"image_grid_pinpoints": [list(pin) for pin in pins]})

    released = LlavaOnevisionImageProcessor(tile_size=384, tile_side=27, grid_pinpoints=GRID_PINPOINTS, max_tiles=9)
    assert (
        released.n_image_tokens(384, 384, tiled=True) == 1485 and released.n_image_tokens(384, 384, tiled=False) == 730
    )
    for rule in (
        released,
        LlavaOnevisionImageProcessor(
            tile_size=SIZE, tile_side=SIDE, grid_pinpoints=tuple(map(tuple, PINS)), max_tiles=MOST
        ),
    ):
        counting = Counting(rule.grid_pinpoints, rule.tile_side, rule.max_tiles)
        for i in range(1, 60):
            h, w = 17 * i % 301 * 8 + 5, 29 * i % 307 * 8 + 3
            assert rule.n_image_tokens(h, w, tiled=True) == counting._get_number_of_features(
                h, w, rule.tile_size, rule.tile_size
            )


def test_loss_equals_transformers(theirs, ours):
    turn = {"role": "user", "content": "what?", "images": picture(20, 30)}
    items = ours.processor.with_answer([turn], "a b")
    batch = pack_sequences([items])
    assert (batch.labels != IGNORE_INDEX).sum() == 4, "three letters and the end"
    given = for_transformers([items])
    given |= transformers_processor()(picture(20, 30), return_tensors="pt")
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
    assert torch.equal(greedy(ours, samples), torch.cat([greedy(ours, [sample]) for sample in samples]))


@torch.inference_mode()
def test_cached_equals_uncached(ours):
    """A prefix read once, an image among it; and text written row by row equals text read at once."""
    samples = batch_of(ours)
    whole, kept = ours.encode(samples), [2, 0, 3]
    contexts = ours.prefill([EMPTY_CACHE] * 3, [items[:n] for items, n in zip(samples, kept, strict=True)])
    rest = ours.encode([items[n:] for items, n in zip(samples, kept, strict=True)], caches=contexts)
    for got, expected in zip(rest, whole, strict=True):
        assert_close(got, expected[-len(got) :])
    for items, ids in zip(samples, greedy(ours, samples), strict=True):
        (hidden,) = ours.encode([[*items, text_part(ids.tolist())]])
        assert torch.equal(ours.decoder.head(hidden)[-9:-1].argmax(-1), ids)


def test_optimized_for_cpu_answers_the_same(ours):
    samples = batch_of(ours)
    assert torch.equal(greedy(ours.optimize_for_cpu(), samples), greedy(ours, samples))


def test_understand_and_stream(ours):
    short, images = TextSampling(max_tokens=5), shown()
    one = ours.understand(images[0], "what?", text_sampling=short)
    assert (
        isinstance(one, str) and "".join(ours.understand(images[0], "what?", text_sampling=short, stream=True)) == one
    )
    talks = [[images[0]], [images[1], images[2]], None]
    batch = ours.understand(talks, ["what?", "which?", "why?"], text_sampling=short)
    assert batch == [
        ours.understand(some, q, text_sampling=short)
        for some, q in zip(talks, ["what?", "which?", "why?"], strict=True)
    ]
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "he"},
    ]
    assert isinstance(ours.chat(turns, system="be brief", text_sampling=short), str)


def test_gradients_reach_every_parameter(tmp_path):
    model = LlavaOneVision.from_pretrained(saved(transformers_model(), tmp_path))
    model.tokenizer = Letters()
    items = model.processor.with_answer([{"role": "user", "content": "what?", "images": picture(30, 9)}], "a b")
    model(pack_sequences([items])).sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == ["vision.norm.weight", "vision.norm.bias"], (
        "the decoder looks at the layer before the tower's norm"
    )


# ---- prompts


def test_the_released_template(ours):
    """Images first, behind the role; a newline before the text and none behind a turn; no system prompt of its own."""
    turns = [
        {"role": "user", "content": "one", "images": shown()[:2]},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    text = rendered(ours.processor, turns, system="be brief", image="<image>")
    assert text == (
        "<|im_start|>system \nbe brief<|im_end|><|im_start|>user <image><image>\none<|im_end|>"
        "<|im_start|>assistant \ntwo<|im_end|><|im_start|>user \nthree<|im_end|><|im_start|>assistant\n"
    )
    assert rendered(ours.processor, turns[2:]) == "<|im_start|>user \nthree<|im_end|><|im_start|>assistant\n"
    between = {"role": "user", "content": f"is {IMAGE_TOKEN} like {IMAGE_TOKEN}?", "images": shown()[:2]}
    text = rendered(ours.processor, [between], image="<image>")
    assert text.startswith("<|im_start|>user \nis <image> like <image>?<|im_end|>")


def test_several_images_are_not_tiled_unless_asked(ours):
    def rows(images, **how):
        processor = dataclasses.replace(ours.processor, **how)
        parts = processor.conversation_parts([{"role": "user", "content": "a", "images": images}])
        return [part.n_tokens for part in parts if part.kind == "und_image"]

    images = shown()[1:3]
    assert rows(images) == [SIDE**2 + 1] * 2 == rows(images, always_tiled=False)
    assert rows(images[:1]) + rows(images[1:]) == rows(images, always_tiled=True)
    assert all(n > SIDE**2 + 1 for n in rows(images, always_tiled=True))


@torch.inference_mode()
def test_features_of_whole_images_are_the_encoders_patch_by_patch(ours):
    """Without tiles, and without the newline behind each image."""
    parts = [[ours.processor.whole_image_part(image)] for image in shown()[:2]]
    features = ours.whole_image_features(pack_sequences(parts).und_images)
    pixels = torch.cat([ours.config.image_processor.preprocess(image, tiled=False) for image in shown()[:2]])
    assert len(pixels) == 2 and features.shape == (2, SIDE**2, ours.config.decoder.dim)
    assert_close(features, ours.projector(ours.vision.pre_norm_features(pixels)))


def test_special_tokens_typed_by_a_user_are_text(ours):
    (item,) = ours.processor.conversation_parts([{"role": "user", "content": "a<|im_end|>b<video>"}])
    assert item.ids.tolist().count(151) == 1 and 155 not in item.ids


# ---- files


def test_both_spellings(tmp_path, theirs, ours):
    """What transformers writes today, with and without the name around the encoder, and what we write: the older
    names."""
    newer = saved(theirs, tmp_path / "theirs")
    names = set(load_file(newer / "model.safetensors"))
    ours.save_pretrained(tmp_path / "ours")
    older = load_file(tmp_path / "ours" / "model.safetensors")
    assert "language_model.model.norm.weight" in older and "language_model.lm_head.weight" in older
    renamed = {
        key.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head", "lm_head"): x
        for key, x in older.items()
    }
    renamed = {key if key.startswith(("model.", "lm_head")) else f"model.{key}": x for key, x in renamed.items()}
    whole = "vision_tower.vision_model."
    bare = [{key.replace(whole, "vision_tower."): x for key, x in state.items()} for state in (older, renamed)]
    assert names == set(bare[0])
    for i, state in enumerate((renamed, *bare)):
        folder = tmp_path / str(i)
        ours.save_pretrained(folder)
        save_file(state, folder / "model.safetensors")
        again = LlavaOneVision.from_pretrained(folder)
        assert again.config == ours.config and all(
            torch.equal(x, ours.state_dict()[key]) for key, x in again.state_dict().items()
        )
    assert LlavaOneVision.from_pretrained(tmp_path / "ours", dtype="bfloat16").dtype == torch.bfloat16


def test_a_tied_head_in_the_files_is_left(tmp_path):
    model = LlavaOneVision.from_pretrained(saved(transformers_model(tied=True), tmp_path / "theirs"))
    model.save_pretrained(tmp_path / "ours")
    path = tmp_path / "ours" / "model.safetensors"
    save_file(load_file(path) | {"language_model.lm_head.weight": torch.zeros(160, 32)}, path)
    assert LlavaOneVision.from_pretrained(tmp_path / "ours").config == model.config


def test_manifest_fits_the_released_model():
    """MetaQuery's backbone: without a language head, the table enlarged by its 258 rows, here as more of the
    vocabulary."""
    shapes = manifest("metaquery_llavaov0p5_backbone")
    files = RELEASED | {"text_config": RELEASED["text_config"] | {"vocab_size": 152258}}
    with torch.device("meta"):
        model = LlavaOneVision(LlavaConfig.from_json(files, {}))
    assert len(shapes) == 716 and model.config.image_processor.n_image_tokens(384, 384, tiled=True) == 1485
    prefixed = {f"model.mllm_backbone.{key}": shape for key, shape in shapes.items()}
    for names, prefix in ((shapes, ""), (prefixed, "model.mllm_backbone.")):
        table, state = llava_key_map(model.config, names, prefix=prefix), model.state_dict()
        assert {name for one in check_keys(names, table, state, "here").values() for name in one.our_names} == set(
            state
        )
        assert {key: tuple(x.shape) for key, x in released_tensors(model, table).items()} == names
    without = {key: shape for key, shape in shapes.items() if key != "image_newline"}
    with pytest.raises(CheckpointError, match="missing keys: image_newline"):
        check_keys(without, llava_key_map(model.config, without), model.state_dict(), "here")


def test_config_round_trips(ours):
    files = json.loads(json.dumps(ours.config.to_json()))
    assert LlavaConfig.from_json(files["config.json"], files["preprocessor_config.json"]) == ours.config
    cfg = LlavaConfig.from_json(RELEASED, {})
    assert (
        cfg.decoder.rope_theta,
        cfg.decoder.tie_word_embeddings,
        cfg.special_tokens.im_end,
        cfg.special_tokens.image,
    ) == (1e6, True, 151645, 151646)
    assert cfg.image_processor.grid_pinpoints == GRID_PINPOINTS and cfg.image_processor.max_tiles == 9


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llava_next"}, "describes no LLaVA-OneVision: .*got 'llava_next'"),
        ({"vision_feature_layer": -2}, "got vision_feature_layer -2, expected -1"),
        ({"vision_feature_select_strategy": "default"}, "expected 'full'"),
        ({"vision_aspect_ratio": "square"}, "got vision_aspect_ratio 'square'"),
        ({"image_grid_pinpoints": [[14, 15]]}, r"got image_grid_pinpoints \[\(14, 15\)\].*whole tiles of 14"),
        ({"vision_aspect_ratio": "anyres_max_0"}, "a positive number of tiles"),
        ({"text_config": TEXT | {"use_sliding_window": True}}, "use_sliding_window"),
        ({"text_config": TEXT | {"rope_scaling": {"type": "yarn"}}}, "yarn"),
        ({"text_config": TEXT | {"model_type": "qwen3"}}, "expected a plain Qwen2"),
        ({"projector_hidden_act": "gelo"}, "got projector_hidden_act 'gelo'.*expected one of 'silu'"),
    ],
)
def test_wrong_configs(changes, words):
    with pytest.raises(ValueError, match=words):
        LlavaOneVision(LlavaConfig.from_json(TOP | {"text_config": TEXT, "vision_config": VISION} | changes, {}))


def test_wrong_preprocessors():
    files = TOP | {"text_config": TEXT, "vision_config": VISION}
    size_words = "tiles of 14 pixels and the image_grid_pinpoints"
    for preprocessor, words in (
        ({"size": {"height": 28, "width": 28}}, size_words),
        ({"image_grid_pinpoints": [[14, 14]]}, size_words),
        ({"do_rescale": False}, "got do_rescale False, expected True"),
    ):
        with pytest.raises(ValueError, match=words):
            LlavaConfig.from_json(files, preprocessor)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.understand("nowhere.png", "what?"), "no image at nowhere.png"),
        (lambda m: m.understand(picture(8, 8), " "), "got an empty prompt"),
        (lambda m: m.understand(picture(8, 8), "<image> or <image>?"), "got 2 <image> for 1 images"),
        (lambda m: m.chat([{"role": "assistant", "content": "a"}]), "the user to have the last word"),
        (lambda m: m.processor.ids_to_parts([154, 3], [], tiled=True), "got 1 placeholders for 0 images"),
        (lambda m: m.understand(None, "a" * 600), r"would reach position \d+, the model knows 512"),
    ],
)
def test_bad_input(ours, call, words):
    with pytest.raises(ValueError, match=words):
        call(ours)


def test_wrong_weights(tmp_path, ours):
    ours.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    save_file({key: x for key, x in state.items() if not re.search(r"layers\.1\.mlp\.up", key)}, path)
    with pytest.raises(CheckpointError, match=r"missing keys: language_model\.model\.layers\.1\.mlp\.up_proj\.weight"):
        LlavaOneVision.from_pretrained(tmp_path)
