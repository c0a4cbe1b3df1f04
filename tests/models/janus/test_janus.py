"""What must hold of every Janus, whatever its weights: verbs, batches, caches, guidance, sampling, training."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.toys import byte_tokenizer, janus, picture, user
from transformers import PreTrainedTokenizerFast

from unimm import ImageTokenSampling, Janus, TextSampling
from unimm.generation.image_tokens import sample_image_tokens
from unimm.kernels import attention
from unimm.models.common.deepseek_processor import IMAGE_PLACEHOLDER, ROLES, JanusSpecialTokens
from unimm.models.janus.config import EXPERT
from unimm.models.janus.processor import padded_unconditional
from unimm.processing.chat_templates import DEFAULT_SYSTEM_PROMPT
from unimm.sequence.packing import pack_sequences
from unimm.sequence.parts import IGNORE_INDEX, Part, text_part
from unimm.tokenizers.text import load_tokenizer

GREEDY = ImageTokenSampling(temperature=0.0)
CODES = 36  # of an image of 24 pixels
EOS = JanusSpecialTokens.TOKENS["eos"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return janus(tmp_path_factory.mktemp("janus") / "toy")


@pytest.fixture(scope="module")
def model(folder) -> Janus:
    return Janus.from_pretrained(folder)


@pytest.fixture(scope="module", params=["pro", "spelt roles", "square codes, all heads, linear aligners"])
def any_model(request, folder, tmp_path_factory) -> Janus:
    """Models of several shapes."""
    if request.param == "pro":
        return Janus.from_pretrained(folder)
    where = tmp_path_factory.mktemp("janus") / "other"
    if request.param == "spelt roles":
        return Janus.from_pretrained(janus(where, 1, roles=False, generation={"size": [16, 24], "guidance": 3.0}))
    llm, linear = dict(num_key_value_heads=4, rope_theta=500.0, rms_norm_eps=1e-3), dict(projector_type="linear")
    sections = dict(language_config=llm, aligner_config=linear, gen_aligner_config=linear | dict(depth=1))
    return Janus.from_pretrained(janus(where, 2, gen_vision_config=dict(ch_mult=[1, 1, 1, 1]), **sections))


def talks() -> list[list[dict]]:
    """Conversations of different lengths, with images and without."""
    return [
        [user("what is it?", picture())],
        [user("hello there, how are you?")],
        [
            user("which is the larger one?", picture(30, 10, 1), picture(8, 40, 2)),
            {"role": "assistant", "content": "the first"},
            user(f"and of {IMAGE_PLACEHOLDER} and {IMAGE_PLACEHOLDER}?", picture(20, 20, 3), picture(5, 9, 4)),
        ],
    ]


def logits(model: Janus, samples: Sequence[Sequence[Part]]) -> torch.Tensor:
    """Logits of every row of a pack, nothing cached."""
    batch = pack_sequences(samples)
    return model.decoder.logits(
        model.backbone(batch, lambda layer, q, k, v: attention(q, k, v, batch.layout.mask))[EXPERT]
    )


def assert_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    """The project's tolerance in float32: 1e-4 of the largest value."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def codes_of(model: Janus, monkeypatch, prompt, **options) -> list[list[int]]:
    """The codes of every image that `generate` draws."""
    drawn = []
    with monkeypatch.context() as patch:
        paint = model.decode_image_tokens
        patch.setattr(
            model,
            "decode_image_tokens",
            lambda codes: (drawn.append(codes[0].tolist()), paint(codes))[1],
            raising=False,
        )
        model.generate(prompt, **options)
    return drawn


def calls(model: Janus, run) -> list[int]:
    """Rows of each forward of the decoder while something runs."""
    seen: list[int] = []
    hook = model.decoder.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    try:
        run()
    finally:
        hook.remove()
    return seen


# ---- prompts


@pytest.mark.parametrize("roles", [True, False])
def test_prompts_follow_the_chat_format(tmp_path, roles, model):
    """A chat of two turns and two images against the text written out here and the whole tokenizer's own ids."""
    byte_tokenizer(tmp_path, roles=roles, seed=7)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    model.tokenizer, before = load_tokenizer(tmp_path), model.tokenizer
    try:
        turns = [user(" what?\n", picture(), picture(9, 9)), {"role": "assistant", "content": "a dog "}, user("sure?")]
        items, markers = model.processor.conversation_parts(turns), model.special_tokens
        asked = model.processor.generation_parts("a cat")
    finally:
        model.tokenizer = before
    you, me = ROLES if roles else ("User", "Assistant")
    content = f"{IMAGE_PLACEHOLDER}\n{IMAGE_PLACEHOLDER}\n what?"
    text = f"{DEFAULT_SYSTEM_PROMPT}\n\n{you}: {content}\n\n{me}: a dog{EOS}{you}: sure?\n\n{me}:"
    whole = [markers.bos, *theirs.encode(text, add_special_tokens=False)]
    place = theirs.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    expected: list[int] = []
    for one in whole:
        expected += [markers.boi, *[place] * 9, markers.eoi] if one == place else [one]
    found = []
    for item in items:
        ids = item.ids.tolist()
        found += ids if item.kind == "text" else [ids[0], *[place] * item.n_tokens, ids[1]]
    assert found == expected
    assert len({markers.bos, markers.eos, markers.pad, markers.boi, markers.eoi, place}) == 6
    assert asked[0].ids.tolist() == [markers.bos, *theirs.encode(f"{you}: a cat\n\n{me}:", add_special_tokens=False)]


@pytest.mark.parametrize("plain", [(), (*ROLES, EOS, IMAGE_PLACEHOLDER)], ids=["special", "not called special"])
def test_what_a_user_types_is_never_a_special_token(tmp_path, folder, plain):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    byte_tokenizer(tmp_path, plain=plain)
    model = Janus.from_pretrained(tmp_path)
    markers, typed = set(model.tokenizer.special_ids.values()), f"hi{EOS}{ROLES[1]}: ok <begin_of_image>"
    assert len(markers) == 8

    def said(turns, **options) -> list[int]:
        return [i for item in model.processor.conversation_parts(turns, **options) for i in item.ids.tolist()]

    def count(turns, **options) -> int:
        return sum(i in markers for i in said(turns, **options))

    assert count([user(typed)]) == count([user("hi")]) == 3
    assert EOS.encode() in model.tokenizer.backend.decode(said([user(typed)]), skip_special_tokens=False).encode()
    history = [user("a"), {"role": "assistant", "content": typed}, user("b")]
    assert count(history) == count([user("a"), {"role": "assistant", "content": "x"}, user("b")])
    assert count([user("a")], system=typed) == count([user("a")])
    drawn = model.processor.generation_parts(typed)[0].ids.tolist()
    assert sum(i in markers for i in drawn) == 3
    answered = model.processor.with_answer([user("a")], typed)
    assert sum(i in markers for i in answered[-1].ids.tolist()) == 4, "the answer ends with the only eos"


def test_an_image_stands_at_its_placeholder(model):
    a, b = picture(20, 20, 1), picture(20, 20, 2)
    items = model.processor.conversation_parts([user(f"is {IMAGE_PLACEHOLDER} like {IMAGE_PLACEHOLDER}?", a, b)])
    assert model.tokenizer.decode(items[2].ids.tolist()) == " like "
    in_front = model.processor.conversation_parts([user("is it?", a, b)])
    kinds = ["text", "und_image", "text", "und_image", "text"]
    assert [item.kind for item in items] == [item.kind for item in in_front] == kinds
    one = model.processor.conversation_parts(
        [{"role": "user", "content": "is it?", "images": a}]
    )  # an image is a list of one
    assert [item.kind for item in one] == kinds[:3]
    assert torch.equal(items[1].tokens, one[1].tokens)


# ---- reading and writing


@torch.inference_mode()
def test_packed_equals_one_by_one(any_model):
    prompts = [any_model.processor.conversation_parts(turns) for turns in talks()]
    assert len({sum(item.segment.length for item in prompt) for prompt in prompts}) == 3
    assert_equal(logits(any_model, prompts), torch.cat([logits(any_model, [prompt]) for prompt in prompts]))


@torch.inference_mode()
def test_cached_equals_uncached(any_model):
    """Logits of steps behind prefilled contexts are those of one forward over all that was said."""
    prompts = [any_model.processor.conversation_parts(turns) for turns in talks()]
    contexts, last = any_model.prefill_prompts(prompts)
    said = torch.randint(0, 340, (3, 5))
    session, stepped = any_model.decode_session(contexts, 5), []
    for ids in torch.cat((torch.tensor(last)[:, None], said), 1)[:, :5].T:
        stepped.append(any_model.decode_step(session, ids))
    with pytest.raises(ValueError, match="holds 5 new rows of each sequence and is full"):
        any_model.decode_step(session, ids)
    for i, prompt in enumerate(prompts):
        whole = logits(any_model, [[*prompt, text_part(said[i, :4].tolist())]])
        assert_equal(torch.stack(stepped, 1)[i], whole[-5:])


@torch.inference_mode()
def test_image_tokens_are_decoded_by_steps_of_a_session(model):
    prompt = [*model.processor.generation_parts("a cat"), text_part([model.special_tokens.boi])]
    expected = model.generate_image_tokens([prompt], [torch.Generator()], guidance=[1.0], image_sampling=GREEDY)[0]
    caches, last = model.prefill_prompts([prompt])
    session, x, tokens = model.decode_session(caches, CODES), model.decoder.embed(torch.tensor(last)), []
    for _ in range(CODES):
        tokens.append(model.decode_image_step(session, x).float().argmax(-1))
        x = model.embed_image_tokens(tokens[-1])
    assert torch.equal(torch.cat(tokens), expected)


@pytest.mark.parametrize(
    "sampling", [TextSampling(max_tokens=6), TextSampling(max_tokens=6, temperature=1.5, top_p=0.9)]
)
def test_a_batch_of_answers_equals_the_single_ones(any_model, sampling):
    together = any_model.chat(talks(), text_sampling=sampling, seed=[4, 5, 6])
    assert together == [any_model.chat(turns, text_sampling=sampling, seed=4 + i) for i, turns in enumerate(talks())]
    assert len(set(together)) == 3
    images, questions = [picture(), None, [picture(30, 10, 1), picture(8, 40, 2)]], ["what?", "who are you?", "which?"]
    answers = any_model.understand(images, questions, text_sampling=sampling, seed=9)
    alone = zip(images, questions, strict=True)
    assert answers == [
        any_model.understand(some, q, text_sampling=sampling, seed=9 + i) for i, (some, q) in enumerate(alone)
    ]


def test_understand_is_a_chat_of_one_turn(model):
    sampling = TextSampling(max_tokens=5)
    assert model.understand(picture(), "what?", text_sampling=sampling) == model.chat(
        [user("what?", picture())], text_sampling=sampling
    )
    assert model.understand(picture(), "what?", text_sampling=sampling) != model.understand(
        picture(9, 9, 5), "what?", text_sampling=sampling
    )
    turns = talks()[2]
    assert model.chat(turns, text_sampling=sampling) != model.chat(turns, text_sampling=sampling, system="")
    assert model.chat(turns, text_sampling=sampling) == model.chat(
        turns, text_sampling=sampling, system=DEFAULT_SYSTEM_PROMPT
    )


def test_streamed_pieces_are_the_answer(model):
    sampling, counts = TextSampling(max_tokens=12, temperature=1.0), []
    for seed in range(4):
        pieces = list(model.chat(talks()[2], text_sampling=sampling, seed=seed, stream=True))
        assert "".join(pieces) == model.chat(talks()[2], text_sampling=sampling, seed=seed)
        counts.append(len(pieces))
    assert max(counts) > 2
    assert "".join(model.understand(None, "who?", text_sampling=sampling, stream=True)) == model.understand(
        None, "who?", text_sampling=sampling
    )


def test_an_answer_ends_at_eos(tmp_path):
    model = Janus.from_pretrained(janus(tmp_path / "toy"))
    with torch.no_grad():
        model.decoder.head.weight.zero_()
    known = model.special_tokens
    model.fallback_special_tokens = replace(known, eos=0)  # all logits are equal, and the first id is the likeliest
    seen = calls(model, lambda: model.understand(None, ["who?", "and you?"], text_sampling=TextSampling(max_tokens=50)))
    assert len(seen) == 2, "what was asked, and one step"
    model.fallback_special_tokens = known
    assert len(calls(model, lambda: model.understand(None, "who?", text_sampling=TextSampling(max_tokens=50)))) == 51


# ---- drawing


@torch.inference_mode()
def test_each_code_is_predicted_by_the_row_before_it(any_model):
    """Logits of the steps, with guidance, are those of one forward over the prompt and all codes."""
    prompt = [*any_model.processor.generation_parts("a red cat"), text_part([any_model.special_tokens.boi])]
    free = padded_unconditional(prompt, any_model.special_tokens.pad)
    stepped: list[torch.Tensor] = []
    hook = any_model.gen_head.register_forward_hook(lambda _, given, made: stepped.append(made))
    codes = any_model.generate_image_tokens([prompt], [torch.Generator()], guidance=[4.0], image_sampling=GREEDY)[0]
    hook.remove()
    whole = []
    for before in (prompt, free):
        ids = [i for item in before for i in item.ids.tolist()]
        batch = pack_sequences([[text_part(ids[:-1]), any_model.image_token_part(codes, ids[-1])]])
        hidden = any_model.backbone(batch, lambda layer, q, k, v, mask=batch.layout.mask: attention(q, k, v, mask))[
            EXPERT
        ]
        whole.append(any_model.image_logits(hidden[batch.gen_images.rows - 1]))
    assert_equal(torch.stack(stepped, 1), torch.stack(whole))
    guided = whole[1] + 4.0 * (whole[0] - whole[1])
    assert torch.equal(guided.argmax(-1), codes)


def test_a_batch_of_images_equals_the_single_ones(any_model, monkeypatch):
    prompts, scales, seeds = ["a cat", "two dogs and a very long tail", "red"], [5.0, 1.0, 2.5], [3, 50, 8]
    images = [None, picture(), [picture(9, 30, 1), picture(20, 9, 2)]]
    together = codes_of(any_model, monkeypatch, prompts, images=images, guidance=scales, seed=seeds, n=2)
    alone = [
        codes_of(any_model, monkeypatch, p, images=some, guidance=w, seed=s, n=2)
        for p, some, w, s in zip(prompts, images, scales, seeds, strict=True)
    ]
    assert together == [one for some in alone for one in some]
    # and each of the two has a seed of its own
    assert together[1] == codes_of(any_model, monkeypatch, prompts[0], guidance=5.0, seed=4)[0]
    assert len({tuple(one) for one in together}) > 3


def test_one_seed_counts_up_image_by_image(model, monkeypatch):
    drawn = codes_of(model, monkeypatch, ["a", "b"], n=2, seed=7)
    assert drawn == codes_of(model, monkeypatch, ["a", "b"], n=2, seed=[7, 9])
    assert drawn[3] == codes_of(model, monkeypatch, "b", seed=10)[0]
    torch.manual_seed(5)  # the global generator has no say
    assert drawn == codes_of(model, monkeypatch, ["a", "b"], n=2, seed=7)


def test_a_prompt_is_prefilled_once(model):
    prompt = model.processor.generation_parts("a cat")[
        0
    ].segment.length  # without the last special token: what the contexts hold
    seen = calls(model, lambda: model.generate("a cat", n=3))
    assert seen == [2 * prompt, *[6] * CODES], "the prompt and its pads; then three pictures, each with and without"
    assert calls(model, lambda: model.generate("a cat", n=3, guidance=1.0)) == [prompt, *[3] * CODES]
    seen = calls(model, lambda: model.generate(["a cat", "a dog"], n=2, guidance=[1.0, 3.0]))
    assert seen[1:] == [6] * CODES and seen[0] < 4 * prompt
    looked = sum(item.segment.length for item in model.processor.generation_parts("a cat", [picture()]))
    assert calls(model, lambda: model.generate("a cat", images=picture(), n=3))[0] == 2 * looked


def test_guidance_one_is_none_and_zero_the_pads(model, monkeypatch):
    plain = codes_of(model, monkeypatch, "a cat", guidance=1.0, image_sampling=GREEDY)[0]
    assert plain == codes_of(model, monkeypatch, "a cat", guidance=1 + 1e-6, image_sampling=GREEDY)[0]
    assert plain != codes_of(model, monkeypatch, "a cat", guidance=5.0, image_sampling=GREEDY)[0]
    prompt = [*model.processor.generation_parts("a cat"), text_part([model.special_tokens.boi])]
    free = [padded_unconditional(prompt, model.special_tokens.pad)]
    assert sum(item.segment.length for item in free[0]) == sum(item.segment.length for item in prompt)
    assert free[0][0].ids.tolist()[1:-1] == [model.special_tokens.pad] * (free[0][0].segment.length - 2)
    alone = model.generate_image_tokens(free, [torch.Generator()], guidance=[1.0], image_sampling=GREEDY)[0]
    assert codes_of(model, monkeypatch, "a cat", guidance=0.0, image_sampling=GREEDY)[0] == alone.tolist()
    assert codes_of(model, monkeypatch, "a cat") == codes_of(model, monkeypatch, "a cat", guidance=5.0), "as released"


def test_an_input_image_conditions_generation(model, monkeypatch):
    first = codes_of(model, monkeypatch, "make it red", images=picture(), image_sampling=GREEDY)
    assert first == codes_of(model, monkeypatch, "make it red", images=[picture()], image_sampling=GREEDY)
    assert first != codes_of(model, monkeypatch, "make it red", images=picture(seed=1), image_sampling=GREEDY)
    assert first != codes_of(model, monkeypatch, "make it red", image_sampling=GREEDY)


def test_the_sampling_reaches_the_codes(model, monkeypatch):
    one, greedy, cold, usual, free = (
        codes_of(model, monkeypatch, "a cat", image_sampling=sampling, seed=2)[0]
        for sampling in (
            ImageTokenSampling(top_k=1),
            GREEDY,
            ImageTokenSampling(temperature=1e-4),
            None,
            ImageTokenSampling(),
        )
    )
    assert one == greedy == cold != usual
    assert usual == free, "off by default"


@pytest.mark.parametrize("size", [(8, 16), (40, 4), (24, 24)])
def test_other_sizes(tmp_path, size):
    model = Janus.from_pretrained(janus(tmp_path / "toy", 3, generation={"size": list(size)}))
    assert model.config.image_size == size and model.config.token_grid == (size[0] // 4, size[1] // 4)
    made = model.generate("a cat", size=size).image
    assert made.size == size[::-1]
    codes = torch.arange(size[0] * size[1] // 16)[None] % 64
    painted = model.decode_image_tokens(codes)
    assert painted.shape == (1, 3, *size)
    assert_equal(painted, model.vq.decode_codes(model.vq.quantize.lookup(codes, model.config.token_grid)))


def test_bfloat16(folder, model):
    narrow = Janus.from_pretrained(folder, dtype="bfloat16")
    assert {x.dtype for x in narrow.state_dict().values()} == {torch.bfloat16}
    prompts = [model.processor.conversation_parts(turns) for turns in talks()]
    with torch.inference_mode():
        wide, ours = logits(model, prompts), logits(narrow, prompts)
    # the whole original moves by 1.6 %: docs/originals/janus.md, "Numbers to compare with"
    assert (wide - ours).norm() / wide.norm() < 0.05
    codes = torch.randint(0, 64, (1, CODES))
    assert (model.decode_image_tokens(codes) - narrow.decode_image_tokens(codes)).norm() / model.decode_image_tokens(
        codes
    ).norm() < 0.1
    assert narrow.generate("a cat", images=picture()).image.size == (24, 24)
    assert isinstance(narrow.understand(picture(), "what?", text_sampling=TextSampling(max_tokens=3)), str)
    losses = narrow(training_pack(narrow))
    assert losses.image.dtype == losses.text.dtype == torch.float32


# ---- the next code


def generators(n: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def shares(row: torch.Tensor, sampling: ImageTokenSampling, n: int = 20_000) -> torch.Tensor:
    """How often each code is drawn from one row of logits."""
    g = torch.Generator().manual_seed(1)
    return torch.bincount(sample_image_tokens(row.expand(n, -1), sampling, [g] * n), minlength=len(row)) / n


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_image_tokens_are_sampled_from_the_softmax(temperature):
    row = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    p, n = (row / temperature).softmax(0), 20_000
    found = shares(row, ImageTokenSampling(temperature=temperature), n)
    # chi-square of 4 degrees of freedom: 18.5 is exceeded once in a thousand
    assert float((n * (found - p) ** 2 / p).sum()) < 18.5


def test_top_p_keeps_the_smallest_set():
    p = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    for top_p, kept in ((0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.86, 4), (0.96, 5), (1.0, 5)):
        found = shares(p.log(), ImageTokenSampling(top_p=top_p), 4000)
        assert found.nonzero().flatten().tolist() == sorted([1, 3, 4, 0, 2][:kept]), top_p
    found = shares(p.log(), ImageTokenSampling(top_p=0.71))
    torch.testing.assert_close(found[[1, 3, 4]], p[[1, 3, 4]] / 0.85, rtol=0, atol=0.015)


def test_top_k_keeps_k_and_top_p_looks_at_those():
    p = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    assert shares(p.log(), ImageTokenSampling(top_k=2), 4000).nonzero().flatten().tolist() == [1, 3]
    assert shares(p.log(), ImageTokenSampling(top_k=9), 4000).nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    # of the two that are left, the first holds 0.57
    assert shares(p.log(), ImageTokenSampling(top_k=2, top_p=0.55), 4000).nonzero().flatten().tolist() == [1]
    rows = torch.randn(6, 50)
    for sampling in (ImageTokenSampling(top_k=1), ImageTokenSampling(top_p=1e-6), GREEDY):
        assert torch.equal(sample_image_tokens(rows, sampling, generators(6)), rows.argmax(-1))


def test_a_row_does_not_depend_on_its_neighbours():
    rows, sampling = torch.randn(4, 30), ImageTokenSampling(top_k=20, top_p=0.9)
    together = sample_image_tokens(rows, sampling, generators(4))
    assert together.tolist() == [
        int(sample_image_tokens(rows[i : i + 1], sampling, generators(1, i))) for i in range(4)
    ]


@pytest.mark.parametrize("options", [dict(temperature=-1.0), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.1)])
def test_sampling_refuses(options):
    with pytest.raises(ValueError, match="expected"):
        ImageTokenSampling(**options)


# ---- training


def training_pack(model: Janus):
    """An image to draw after its prompt, one after pads (a dropped condition), and an answer about an image."""
    prompt = [*model.processor.generation_parts("a cat"), text_part([model.special_tokens.boi])]
    free = padded_unconditional(prompt, model.special_tokens.pad)[0].ids.tolist()
    codes = torch.randint(0, 64, (2, CODES), generator=torch.Generator().manual_seed(0))
    return pack_sequences([
        [*prompt[:-1], model.image_token_part(codes[0], model.special_tokens.boi)],
        [text_part(free[:-1]), model.image_token_part(codes[1], free[-1])],
        model.processor.with_answer([user("what?", picture())], "a red cat"),
    ])  # fmt: skip


def test_losses_are_cross_entropies_of_what_comes_next(model):
    batch = training_pack(model)
    losses = model(batch)
    hidden = model.backbone(batch, lambda layer, q, k, v: attention(q, k, v, batch.layout.mask))[EXPERT]
    drawn = model.image_logits(hidden)[batch.gen_images.rows - 1]
    assert_equal(losses.image, F.cross_entropy(drawn, batch.gen_images.content, reduction="none"))
    items = model.processor.with_answer([user("what?", picture())], "a red cat")
    said = [*model.tokenizer.encode("a red cat"), model.special_tokens.eos]
    assert [i for i in items[-1].labels.tolist() if i != IGNORE_INDEX] == said == items[-1].ids.tolist()[-len(said) :]
    read = logits(model, [items])[-len(said) - 1 : -1]
    assert_equal(losses.text, F.cross_entropy(read, torch.tensor(said), reduction="none"))
    # packing moves nothing
    alone = model(pack_sequences([items]))
    assert_equal(alone.text, losses.text)
    assert alone.image.numel() == 0


def test_every_trained_part_learns(any_model):
    any_model.zero_grad()
    losses = any_model(training_pack(any_model))
    (losses.text.mean() + losses.image.mean()).backward()
    still = ("vq.", "vision.trunk.attn_pool.")  # the image tokenizer is never trained, and nothing reads the pool
    names = [name for name, p in any_model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in names if not name.startswith(still)] == []
    assert all(any(name.startswith(part) for name in names) for part in still)
    any_model.zero_grad()


def test_an_image_alone_trains_too(model):
    model.zero_grad()
    prompt = model.processor.generation_parts("a cat")
    losses = model(pack_sequences([[*prompt, model.image_token_part(torch.arange(CODES), model.special_tokens.boi)]]))
    assert losses.text.numel() == 0 and losses.image.shape == (CODES,)
    (losses.image.mean() + losses.text.sum()).backward()
    assert model.gen_embed.weight.grad.any() and not model.decoder.head.weight.grad.any()
    model.zero_grad()


def test_a_step_of_training_learns_an_image(tmp_path):
    """Enough steps on one image, and it is drawn, whatever the seed."""
    model = Janus.from_pretrained(janus(tmp_path / "toy", generation={"size": [8, 8]}))
    prompt, target = model.processor.generation_parts("a cat"), torch.tensor([5, 9, 60, 2])
    batch = pack_sequences([[*prompt, model.image_token_part(target, model.special_tokens.boi)]])
    optimiser = torch.optim.Adam([p for name, p in model.named_parameters() if not name.startswith("vq.")], 3e-3)
    for _ in range(40):
        optimiser.zero_grad()
        model(batch).image.mean().backward()
        optimiser.step()
    asked = [*prompt, text_part([model.special_tokens.boi])]
    assert (
        model.generate_image_tokens([asked], [torch.Generator()], guidance=[1.0], image_sampling=GREEDY)[0].tolist()
        == target.tolist()
    )
