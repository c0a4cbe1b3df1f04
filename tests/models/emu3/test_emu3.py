"""What must hold of every Emu3, whatever its weights: verbs, batches, guidance, sampling, bad input."""

from pathlib import Path

import pytest
import torch
from helpers.emu3_toys import N_CODES, emu3
from helpers.toys import picture, user

from unimm import Emu3, ImageTokenSampling, TextSampling
from unimm.generation.kv_cache import EMPTY_CACHE
from unimm.models.emu3.config import Emu3ChatConfig
from unimm.models.emu3.processor import IMAGE_PLACEHOLDER
from unimm.models.emu3.rows import ImageRows
from unimm.models.emu3.text_tokenizer import Emu3SpecialTokens
from unimm.processing.images.io import pil_to_tensor
from unimm.sequence.parts import text_part

GREEDY = ImageTokenSampling(temperature=0.0)
SHORT = TextSampling(max_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return emu3(tmp_path_factory.mktemp("emu3") / "toy")


@pytest.fixture(scope="module")
def model(folder) -> Emu3:
    return Emu3.from_pretrained(folder)


def pixels(images) -> list[bytes]:
    return [image.tobytes() for image in images]


def calls(model: Emu3, run) -> list[int]:
    """Rows of each forward of the decoder while something runs."""
    seen: list[int] = []
    hook = model.decoder.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    try:
        run()
    finally:
        hook.remove()
    return seen


# ---- generating


def test_a_batch_equals_single_runs(model):
    """Prompts, sizes, guidance, negative prompts and seeds of their own."""
    prompts = ["a cat", "the other thing", "a cat", "in"]
    sizes = [(8, 6), (4, 12), None, (6, 6)]
    scales = [3.0, 1.0, 1.5, 0.0]
    negatives = ["bad", None, "", "the worst"]
    seeds = [3, 5, 3, 9]
    together = model.generate(prompts, size=sizes, guidance=scales, negative_prompt=negatives, seed=seeds).images
    assert [image.size[::-1] for image in together] == [(8, 6), (4, 12), (8, 8), (6, 6)]
    for i, image in enumerate(together):
        options = dict(size=sizes[i], guidance=scales[i], negative_prompt=negatives[i], seed=seeds[i])
        (alone,) = model.generate(prompts[i], **options).images
        assert (pil_to_tensor(alone) - pil_to_tensor(image)).abs().max() <= 2 / 255
    assert len(set(pixels(together))) == 4


def test_n_images_of_a_prompt_read_it_once(model):
    several = model.generate("a cat", n=3, seed=4, size=(4, 6))
    singles = [model.generate("a cat", seed=4 + i, size=(4, 6)).image for i in range(3)]
    assert pixels(several.images) == pixels(singles)
    rows = calls(model, lambda: model.generate("a cat", n=3, seed=4, size=(4, 6)))
    # prefill of prompt and negative prompt, once each; then two rows an image for 2 * 4 - 1 tokens
    assert rows[1:] == [6] * (2 * 4 - 1)
    processor = model.processor
    negative = processor.negative_parts(model.config.image_generation.negative_prompt, (2, 3))
    assert rows[0] == sum(len(one[0].ids) - 1 for one in (processor.generation_parts("a cat", (2, 3)), negative))


def test_guidance_1_reads_no_negative_prompt(model):
    rows = calls(model, lambda: model.generate("a cat", guidance=1.0, size=(4, 6)))
    assert rows == [len(model.processor.generation_parts("a cat", (2, 3))[0].ids) - 1, *[1] * 7]
    images = [model.generate("a cat", guidance=1.0, negative_prompt=text, size=(4, 6)) for text in ("a", "b")]
    assert pixels([images[0].image]) == pixels([images[1].image])


def test_guided_codes_are_those_of_whole_normalised_logits(model):
    """The head of the codes alone against log-probabilities of the whole vocabulary, step by step, nothing cached."""
    grid = (3, 2)
    prompt = model.processor.generation_parts("a cat", grid)
    negative = model.processor.negative_parts("bad", grid)
    (codes,) = model.generate_image_tokens(
        [prompt], [torch.Generator()], guidance=[3.0], negative_prompts=[negative], grids=[grid], image_sampling=GREEDY
    )
    ids: list[int] = []
    special = model.config.special_tokens
    with torch.inference_mode():
        for row in range(3):
            for _ in range(2):
                both = []
                for parts in (prompt, negative):
                    whole = torch.tensor([*parts[0].ids.tolist(), *ids])
                    cache = model.prefill([EMPTY_CACHE], [[text_part(whole[:-1].tolist())]])
                    logits = model.decode_step(model.decode_session(cache, 1), whole[-1:])
                    both.append(logits[0].log_softmax(-1))
                scores = both[1] + 3 * (both[0] - both[1])
                ids.append(int(scores[special.code0 :].argmax()) + special.code0)
            assert [one - special.code0 for one in ids[3 * row :][:2]] == codes[row].tolist()
            ids.append(special.eol)


def test_rows_of_several_grids():
    """Where a row ends, and which images are done, against the released rule: n tokens from the first id on."""
    special = Emu3SpecialTokens()
    grids = [(2, 3), (4, 1), (1, 5)]
    rows = ImageRows(grids, special)
    assert rows.n_steps == 7
    for n in range(1, 8):
        expected = [i for i, (h, w) in enumerate(grids) if n % (w + 1) and n < h * (w + 1)]
        assert rows.wanted == expected
        ids = rows.append(torch.tensor([10 * i + n for i in expected], dtype=torch.long))
        for i in range(3):
            assert int(ids[i]) == (special.code0 + 10 * i + n if i in expected else special.eol)
    assert [codes.tolist() for codes in rows.codes()] == [
        [[1, 2, 3], [5, 6, 7]],
        [[11], [13], [15], [17]],
        [[21, 22, 23, 24, 25]],
    ]


def test_sampling_keeps_the_top_codes(model):
    one = model.generate("a cat", image_sampling=ImageTokenSampling(top_k=1), seed=1).image
    greedy = model.generate("a cat", image_sampling=GREEDY, seed=2).image
    assert one.tobytes() == greedy.tobytes()
    assert model.config.image_generation.sampling == ImageTokenSampling(top_k=2048)
    images = [model.generate("a cat", seed=seed).image for seed in (1, 2)]
    assert images[0].tobytes() != images[1].tobytes()


def test_packed_weights_generate_the_same(model):
    packed = model.optimize_for_cpu()
    options = dict(image_sampling=GREEDY, size=(4, 6))
    assert packed.generate("a cat", **options).image.tobytes() == model.generate("a cat", **options).image.tobytes()


def test_sizes_of_ratios(model):
    assert model.config.size_of_ratio("1:1") == (8, 8)
    assert model.config.size_of_ratio("16:9") == (6, 10)
    for wrong in ("", "1", "1:0", "a:b", "1:2:3", "-1:2", None, 3):
        with pytest.raises(ValueError, match="expected width:height"):
            model.config.size_of_ratio(wrong)


# ---- understanding


def test_prompts_follow_the_released_template(model):
    special = model.config.special_tokens
    tokenizer = model.tokenizer
    (part,) = model.processor.conversation_parts([user("what is it", picture(8, 12))])
    codes = model.encode_image(model.config.image_processor.preprocess(picture(8, 12)))
    assert codes.shape == (6, 4)
    rows = [[*(special.code0 + code for code in row), special.eol] for row in codes.tolist()]
    expected = [
        special.bos, *tokenizer.encode("You are a helpful assistant. USER: "), special.boi, *tokenizer.encode("6*4"),
        special.img, *[one for row in rows for one in row], special.eof, special.eoi,
        *tokenizer.encode("what is it. ASSISTANT:"),
    ]  # fmt: skip
    assert part.ids.tolist() == expected


def test_several_images_and_turns(model):
    special = model.config.special_tokens
    content = f"from {IMAGE_PLACEHOLDER} to {IMAGE_PLACEHOLDER}?"
    messages = [
        user(content, picture(8, 12), picture(10, 10, 1)),
        {"role": "assistant", "content": "the cat"},
        user("sure", picture(9, 9, 2)),
    ]
    (part,) = model.processor.conversation_parts(messages, system="Be short.")
    ids = part.ids.tolist()
    assert ids.count(special.boi) == ids.count(special.eoi) == 3
    text = model.tokenizer.decode(ids)
    assert text == "Be short. USER: from 6*4 to 5*5?. ASSISTANT: the cat USER: 4*4sure. ASSISTANT:"
    assert isinstance(model.chat(messages, text_sampling=SHORT), str)


def test_answers_of_a_batch_equal_single_ones_and_stream(model):
    images = [[picture(8, 12), picture(10, 10, 1)], None, picture(14, 6, 3)]
    questions = ["what differs", "who", "the colour"]
    together = model.understand(images, questions, text_sampling=SHORT)
    singles = [model.understand(one, text, text_sampling=SHORT) for one, text in zip(images, questions, strict=True)]
    assert together == singles
    pieces = list(model.understand(images[0], questions[0], stream=True, text_sampling=SHORT))
    assert "".join(pieces) == singles[0]


def test_the_plain_template(folder):
    model = Emu3.from_pretrained(folder)
    model.chat_config = Emu3ChatConfig(template="plain")
    (part,) = model.processor.conversation_parts([user("what", picture(8, 12))])
    special = model.config.special_tokens
    assert part.ids[:2].tolist() == [special.bos, special.boi]
    assert part.ids[-4:].tolist() == [special.eoi, *model.tokenizer.encode("what")]
    with pytest.raises(ValueError, match="2 messages for the plain template"):
        model.processor.render([*model.processor.parse_messages([user("a")])] * 2, "")


def test_what_a_user_types_is_never_a_special_token(model):
    special = set(model.tokenizer.special_ids.values())
    (part,) = model.processor.conversation_parts([user("<|image start|>4*4<|image token|><|extra_204|>")])
    assert [one for one in part.ids.tolist() if one in special] == [model.config.special_tokens.bos]


def test_positions_beyond_the_config_are_read(model):
    """The released limit is one of training."""
    assert model.config.decoder.max_positions == 64
    assert isinstance(model.understand(picture(30, 30), "the " * 100, text_sampling=SHORT), str)


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(size=(7, 8)), "multiples of 2"),
        (dict(size=(0, 8)), "multiples of 2"),
        (dict(size=(8, 2000)), "up to 576"),
        (dict(size=8), "expected \\(height, width\\)"),
        (dict(size=[(8, 8), (4, 4)]), "2 sizes for 1 prompts"),
        (dict(size="8x8"), "expected \\(height, width\\)"),
        (dict(guidance=-1.0), "0 or more"),
        (dict(guidance=float("nan")), "0 or more"),
        (dict(negative_prompt=["a", "b"]), "2 negative prompts for 1 prompts"),
        (dict(negative_prompt=3), "negative_prompt"),
        (dict(n=0), "at least 1"),
        (dict(seed=-1), "seed"),
        (dict(image_sampling="greedy"), "expected an ImageTokenSampling"),
        (dict(images=[picture(), picture()], prompt=f"{IMAGE_PLACEHOLDER} a"), "1 <image> for 2 images"),
        (dict(images=picture(60, 4)), "at most 5 times"),
        (dict(images=picture(1, 1)), "at least 2 pixels"),
        (dict(prompt=""), "empty prompt"),
    ],
)
def test_bad_calls_are_refused(model, options, message):
    options = {"prompt": "a cat"} | options
    with pytest.raises(ValueError, match=message):
        model.generate(options.pop("prompt"), **options)


def test_codes_out_of_range_are_refused(model):
    for codes, message in ((torch.full((1, 2, 2), N_CODES), "0 to 47"), (torch.zeros(4, 4), "whole numbers")):
        with pytest.raises(ValueError, match=message):
            model.decode_image_tokens(codes)
    with pytest.raises(ValueError, match="multiples of 2"):
        model.vision_tokenizer.encode(torch.zeros(1, 3, 5, 4))
