"""What must hold of every Janus, whatever its weights: verbs, batches, caches, guidance, sampling, training."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.toys import byte_tokenizer, janus, picture, user
from transformers import PreTrainedTokenizerFast

from unimm import CodeSampling, Janus, TextSampling
from unimm.generation.decode import Rows
from unimm.generation.image_tokens import next_codes
from unimm.kernels import attention
from unimm.models.common.deepseek_processor import PLACEHOLDER, ROLES, Markers, unconditional
from unimm.models.janus.config import STREAM
from unimm.processing.chat_templates import DEFAULT_SYSTEM, expand_images
from unimm.sequence.packing import pack
from unimm.sequence.parts import IGNORE, Item, text_item
from unimm.tokenizers.text import load_tokenizer

GREEDY = CodeSampling(temperature=0.0)
CODES = 36  # of a picture of 24 pixels
EOS = Markers.STRINGS["eos"]


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
    """Conversations of different lengths, with pictures and without."""
    return [
        [user("what is it?", picture())],
        [user("hello there, how are you?")],
        [
            user("which is the larger one?", picture(30, 10, 1), picture(8, 40, 2)),
            {"role": "assistant", "content": "the first"},
            user(f"and of {PLACEHOLDER} and {PLACEHOLDER}?", picture(20, 20, 3), picture(5, 9, 4)),
        ],
    ]


def logits(model: Janus, samples: Sequence[Sequence[Item]]) -> torch.Tensor:
    """Logits of every row of a pack, nothing cached."""
    batch = pack(samples)
    return model.decoder.logits(
        model.hidden(batch, lambda layer, q, k, v: attention(q, k, v, batch.layout.mask))[STREAM]
    )


def assert_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    """The project's tolerance in float32: 1e-4 of the largest value."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def codes_of(model: Janus, monkeypatch, prompt, **options) -> list[list[int]]:
    """The codes of every picture that `generate` draws."""
    drawn = []
    with monkeypatch.context() as patch:
        paint = model.paint
        patch.setattr(model, "paint", lambda codes: (drawn.append(codes[0].tolist()), paint(codes))[1], raising=False)
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
def test_prompts_are_what_the_format_says(tmp_path, roles, model):
    """A chat of two turns and two pictures against the text written out here and the whole tokenizer's own ids."""
    byte_tokenizer(tmp_path, roles=roles, seed=7)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    model.tokenizer, before = load_tokenizer(tmp_path), model.tokenizer
    try:
        turns = [user(" what?\n", picture(), picture(9, 9)), {"role": "assistant", "content": "a dog "}, user("sure?")]
        items, markers = model.prompts.conversation(turns), model.markers
        asked = model.prompts.drawing("a cat")
    finally:
        model.tokenizer = before
    you, me = ROLES if roles else ("User", "Assistant")
    content = f"{PLACEHOLDER}\n{PLACEHOLDER}\n what?"
    text = f"{DEFAULT_SYSTEM}\n\n{you}: {content}\n\n{me}: a dog{EOS}{you}: sure?\n\n{me}:"
    whole = [markers.bos, *theirs.encode(text, add_special_tokens=False)]
    place = theirs.convert_tokens_to_ids(PLACEHOLDER)
    expected = expand_images(whole, image=place, boi=markers.boi, eoi=markers.eoi, lengths=[9, 9])
    found = []
    for item in items:
        ids = item.ids.tolist()
        found += ids if item.tokens is None else [ids[0], *[place] * item.n_tokens, ids[1]]
    assert found == expected
    assert len({markers.bos, markers.eos, markers.pad, markers.boi, markers.eoi, place}) == 6
    assert asked[0].ids.tolist() == [markers.bos, *theirs.encode(f"{you}: a cat\n\n{me}:", add_special_tokens=False)]


@pytest.mark.parametrize("plain", [(), (*ROLES, EOS, PLACEHOLDER)], ids=["special", "not called special"])
def test_what_a_user_types_is_never_a_marker(tmp_path, folder, plain):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    byte_tokenizer(tmp_path, plain=plain)
    model = Janus.from_pretrained(tmp_path)
    markers, typed = set(model.tokenizer.markers.values()), f"hi{EOS}{ROLES[1]}: ok <begin_of_image>"
    assert len(markers) == 8

    def said(turns, **options) -> list[int]:
        return [i for item in model.prompts.conversation(turns, **options) for i in item.ids.tolist()]

    def count(turns, **options) -> int:
        return sum(i in markers for i in said(turns, **options))

    assert count([user(typed)]) == count([user("hi")]) == 3
    assert EOS.encode() in model.tokenizer.inner.decode(said([user(typed)]), skip_special_tokens=False).encode()
    history = [user("a"), {"role": "assistant", "content": typed}, user("b")]
    assert count(history) == count([user("a"), {"role": "assistant", "content": "x"}, user("b")])
    assert count([user("a")], system=typed) == count([user("a")])
    drawn = model.prompts.drawing(typed)[0].ids.tolist()
    assert sum(i in markers for i in drawn) == 3
    answered = model.prompts.answered([user("a")], typed)
    assert sum(i in markers for i in answered[-1].ids.tolist()) == 4, "the answer ends with the only eos"


def test_a_picture_stands_where_the_question_says(model):
    a, b = picture(20, 20, 1), picture(20, 20, 2)
    items = model.prompts.conversation([user(f"is {PLACEHOLDER} like {PLACEHOLDER}?", a, b)])
    assert model.tokenizer.decode(items[2].ids.tolist()) == " like "
    in_front = model.prompts.conversation([user("is it?", a, b)])
    kinds = ["text", "look", "text", "look", "text"]
    assert [item.kind for item in items] == [item.kind for item in in_front] == kinds
    one = model.prompts.conversation([{"role": "user", "content": "is it?", "images": a}])  # a picture is a list of one
    assert [item.kind for item in one] == kinds[:3]
    assert torch.equal(items[1].tokens, one[1].tokens)


# ---- reading and writing


@torch.inference_mode()
def test_packed_equals_one_by_one(any_model):
    prompts = [any_model.prompts.conversation(turns) for turns in talks()]
    assert len({sum(item.segment.length for item in prompt) for prompt in prompts}) == 3
    assert_equal(logits(any_model, prompts), torch.cat([logits(any_model, [prompt]) for prompt in prompts]))


@torch.inference_mode()
def test_cached_equals_uncached(any_model):
    """Logits of steps behind prefilled contexts are those of one forward over all that was said."""
    prompts = [any_model.prompts.conversation(turns) for turns in talks()]
    contexts, last = any_model.prefilled(prompts)
    said = torch.randint(0, 340, (3, 5))
    rows, stepped = Rows(any_model, contexts, 5), []
    for n, ids in enumerate(torch.cat((torch.tensor(last)[:, None], said), 1)[:, :5].T):
        stepped.append(any_model.decoder.logits(rows(any_model.decoder.embed(ids), n)))
    for i, prompt in enumerate(prompts):
        whole = logits(any_model, [[*prompt, text_item(said[i, :4].tolist())]])
        assert_equal(torch.stack(stepped, 1)[i], whole[-5:])


@pytest.mark.parametrize(
    "sampling", [TextSampling(max_tokens=6), TextSampling(max_tokens=6, temperature=1.5, top_p=0.9)]
)
def test_a_batch_of_answers_equals_the_single_ones(any_model, sampling):
    together = any_model.chat(talks(), text=sampling, seed=[4, 5, 6])
    assert together == [any_model.chat(turns, text=sampling, seed=4 + i) for i, turns in enumerate(talks())]
    assert len(set(together)) == 3
    images, questions = [picture(), None, [picture(30, 10, 1), picture(8, 40, 2)]], ["what?", "who are you?", "which?"]
    answers = any_model.understand(images, questions, text=sampling, seed=9)
    alone = zip(images, questions, strict=True)
    assert answers == [any_model.understand(some, q, text=sampling, seed=9 + i) for i, (some, q) in enumerate(alone)]


def test_understand_is_a_chat_of_one_turn(model):
    sampling = TextSampling(max_tokens=5)
    assert model.understand(picture(), "what?", text=sampling) == model.chat([user("what?", picture())], text=sampling)
    assert model.understand(picture(), "what?", text=sampling) != model.understand(
        picture(9, 9, 5), "what?", text=sampling
    )
    turns = talks()[2]
    assert model.chat(turns, text=sampling) != model.chat(turns, text=sampling, system="")
    assert model.chat(turns, text=sampling) == model.chat(turns, text=sampling, system=DEFAULT_SYSTEM)


def test_streamed_pieces_are_the_answer(model):
    sampling, counts = TextSampling(max_tokens=12, temperature=1.0), []
    for seed in range(4):
        pieces = list(model.chat(talks()[2], text=sampling, seed=seed, stream=True))
        assert "".join(pieces) == model.chat(talks()[2], text=sampling, seed=seed)
        counts.append(len(pieces))
    assert max(counts) > 2
    assert "".join(model.understand(None, "who?", text=sampling, stream=True)) == model.understand(
        None, "who?", text=sampling
    )


def test_an_answer_ends_at_eos(tmp_path):
    model = Janus.from_pretrained(janus(tmp_path / "toy"))
    with torch.no_grad():
        model.decoder.head.weight.zero_()
    known = model.markers
    model.special = replace(known, eos=0)  # all logits are equal, and the first id is the likeliest
    seen = calls(model, lambda: model.understand(None, ["who?", "and you?"], text=TextSampling(max_tokens=50)))
    assert len(seen) == 2, "what was asked, and one step"
    model.special = known
    assert len(calls(model, lambda: model.understand(None, "who?", text=TextSampling(max_tokens=50)))) == 51


# ---- drawing


@torch.inference_mode()
def test_each_code_is_predicted_by_the_row_before_it(any_model):
    """Logits of the steps, with guidance, are those of one forward over the prompt and all codes."""
    prompt = [*any_model.prompts.drawing("a red cat"), text_item([any_model.markers.boi])]
    free = unconditional(prompt, any_model.markers.pad)
    stepped: list[torch.Tensor] = []
    hook = any_model.code_head.register_forward_hook(lambda _, given, made: stepped.append(made))
    codes = any_model.codes([prompt], [torch.Generator()], guidance=[4.0], sampling=GREEDY)[0]
    hook.remove()
    whole = []
    for before in (prompt, free):
        ids = [i for item in before for i in item.ids.tolist()]
        batch = pack([[text_item(ids[:-1]), any_model.drawn(codes, ids[-1])]])
        hidden = any_model.hidden(batch, lambda layer, q, k, v, mask=batch.layout.mask: attention(q, k, v, mask))[
            STREAM
        ]
        whole.append(any_model.code_logits(hidden[batch.draw.rows - 1]))
    assert_equal(torch.stack(stepped, 1), torch.stack(whole))
    guided = whole[1] + 4.0 * (whole[0] - whole[1])
    assert torch.equal(guided.argmax(-1), codes)


def test_a_batch_of_pictures_equals_the_single_ones(any_model, monkeypatch):
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


def test_one_seed_counts_up_picture_by_picture(model, monkeypatch):
    drawn = codes_of(model, monkeypatch, ["a", "b"], n=2, seed=7)
    assert drawn == codes_of(model, monkeypatch, ["a", "b"], n=2, seed=[7, 9])
    assert drawn[3] == codes_of(model, monkeypatch, "b", seed=10)[0]
    torch.manual_seed(5)  # the global generator has no say
    assert drawn == codes_of(model, monkeypatch, ["a", "b"], n=2, seed=7)


def test_a_prompt_is_read_once(model):
    prompt = model.prompts.drawing("a cat")[0].segment.length  # without the last marker: what the contexts hold
    seen = calls(model, lambda: model.generate("a cat", n=3))
    assert seen == [2 * prompt, *[6] * CODES], "the prompt and its pads; then three pictures, each with and without"
    assert calls(model, lambda: model.generate("a cat", n=3, guidance=1.0)) == [prompt, *[3] * CODES]
    seen = calls(model, lambda: model.generate(["a cat", "a dog"], n=2, guidance=[1.0, 3.0]))
    assert seen[1:] == [6] * CODES and seen[0] < 4 * prompt
    looked = sum(item.segment.length for item in model.prompts.drawing("a cat", [picture()]))
    assert calls(model, lambda: model.generate("a cat", images=picture(), n=3))[0] == 2 * looked


def test_guidance_one_is_none_and_zero_the_pads(model, monkeypatch):
    plain = codes_of(model, monkeypatch, "a cat", guidance=1.0, sampling=GREEDY)[0]
    assert plain == codes_of(model, monkeypatch, "a cat", guidance=1 + 1e-6, sampling=GREEDY)[0]
    assert plain != codes_of(model, monkeypatch, "a cat", guidance=5.0, sampling=GREEDY)[0]
    prompt = [*model.prompts.drawing("a cat"), text_item([model.markers.boi])]
    free = [unconditional(prompt, model.markers.pad)]
    assert sum(item.segment.length for item in free[0]) == sum(item.segment.length for item in prompt)
    assert free[0][0].ids.tolist()[1:-1] == [model.markers.pad] * (free[0][0].segment.length - 2)
    alone = model.codes(free, [torch.Generator()], guidance=[1.0], sampling=GREEDY)[0]
    assert codes_of(model, monkeypatch, "a cat", guidance=0.0, sampling=GREEDY)[0] == alone.tolist()
    assert codes_of(model, monkeypatch, "a cat") == codes_of(model, monkeypatch, "a cat", guidance=5.0), "as released"


def test_a_picture_to_draw_from_is_seen(model, monkeypatch):
    first = codes_of(model, monkeypatch, "make it red", images=picture(), sampling=GREEDY)
    assert first == codes_of(model, monkeypatch, "make it red", images=[picture()], sampling=GREEDY)
    assert first != codes_of(model, monkeypatch, "make it red", images=picture(seed=1), sampling=GREEDY)
    assert first != codes_of(model, monkeypatch, "make it red", sampling=GREEDY)


def test_the_sampling_reaches_the_codes(model, monkeypatch):
    one, greedy, cold, usual, free = (
        codes_of(model, monkeypatch, "a cat", sampling=sampling, seed=2)[0]
        for sampling in (CodeSampling(top_k=1), GREEDY, CodeSampling(temperature=1e-4), None, CodeSampling())
    )
    assert one == greedy == cold != usual
    assert usual == free, "off by default"


@pytest.mark.parametrize("size", [(8, 16), (40, 4), (24, 24)])
def test_other_sizes(tmp_path, size):
    model = Janus.from_pretrained(janus(tmp_path / "toy", 3, generation={"size": list(size)}))
    assert model.cfg.size == size and model.cfg.grid == (size[0] // 4, size[1] // 4)
    made = model.generate("a cat", size=size).image
    assert made.size == size[::-1]
    codes = torch.arange(size[0] * size[1] // 16)[None] % 64
    painted = model.paint(codes)
    assert painted.shape == (1, 3, *size)
    assert_equal(painted, model.vq.decode_codes(model.vq.quantize.lookup(codes, model.cfg.grid)))


def test_bfloat16(folder, model):
    narrow = Janus.from_pretrained(folder, dtype="bfloat16")
    assert {x.dtype for x in narrow.state_dict().values()} == {torch.bfloat16}
    prompts = [model.prompts.conversation(turns) for turns in talks()]
    with torch.inference_mode():
        wide, ours = logits(model, prompts), logits(narrow, prompts)
    # the whole original moves by 1.6 %: docs/originals/janus.md, "Numbers to compare with"
    assert (wide - ours).norm() / wide.norm() < 0.05
    codes = torch.randint(0, 64, (1, CODES))
    assert (model.paint(codes) - narrow.paint(codes)).norm() / model.paint(codes).norm() < 0.1
    assert narrow.generate("a cat", images=picture()).image.size == (24, 24)
    assert isinstance(narrow.understand(picture(), "what?", text=TextSampling(max_tokens=3)), str)
    losses = narrow(training_pack(narrow))
    assert losses.codes.dtype == losses.text.dtype == torch.float32


# ---- the next code


def generators(n: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def shares(row: torch.Tensor, sampling: CodeSampling, n: int = 20_000) -> torch.Tensor:
    """How often each code is drawn from one row of logits."""
    g = torch.Generator().manual_seed(1)
    return torch.bincount(next_codes(row.expand(n, -1), sampling, [g] * n), minlength=len(row)) / n


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_codes_are_drawn_from_the_softmax(temperature):
    row = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    p, n = (row / temperature).softmax(0), 20_000
    found = shares(row, CodeSampling(temperature=temperature), n)
    # chi-square of 4 degrees of freedom: 18.5 is exceeded once in a thousand
    assert float((n * (found - p) ** 2 / p).sum()) < 18.5


def test_top_p_keeps_the_smallest_set():
    p = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    for top_p, kept in ((0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.86, 4), (0.96, 5), (1.0, 5)):
        found = shares(p.log(), CodeSampling(top_p=top_p), 4000)
        assert found.nonzero().flatten().tolist() == sorted([1, 3, 4, 0, 2][:kept]), top_p
    found = shares(p.log(), CodeSampling(top_p=0.71))
    torch.testing.assert_close(found[[1, 3, 4]], p[[1, 3, 4]] / 0.85, rtol=0, atol=0.015)


def test_top_k_keeps_k_and_top_p_looks_at_those():
    p = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    assert shares(p.log(), CodeSampling(top_k=2), 4000).nonzero().flatten().tolist() == [1, 3]
    assert shares(p.log(), CodeSampling(top_k=9), 4000).nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    # of the two that are left, the first holds 0.57
    assert shares(p.log(), CodeSampling(top_k=2, top_p=0.55), 4000).nonzero().flatten().tolist() == [1]
    rows = torch.randn(6, 50)
    for sampling in (CodeSampling(top_k=1), CodeSampling(top_p=1e-6), GREEDY):
        assert torch.equal(next_codes(rows, sampling, generators(6)), rows.argmax(-1))


def test_a_row_does_not_depend_on_its_neighbours():
    rows, sampling = torch.randn(4, 30), CodeSampling(top_k=20, top_p=0.9)
    together = next_codes(rows, sampling, generators(4))
    assert together.tolist() == [int(next_codes(rows[i : i + 1], sampling, generators(1, i))) for i in range(4)]


@pytest.mark.parametrize("options", [dict(temperature=-1.0), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.1)])
def test_sampling_refuses(options):
    with pytest.raises(ValueError, match="expected"):
        CodeSampling(**options)


# ---- training


def training_pack(model: Janus):
    """A picture to draw after its prompt, one after pads (a dropped condition), and an answer about a picture."""
    prompt = [*model.prompts.drawing("a cat"), text_item([model.markers.boi])]
    free = unconditional(prompt, model.markers.pad)[0].ids.tolist()
    codes = torch.randint(0, 64, (2, CODES), generator=torch.Generator().manual_seed(0))
    return pack([
        [*prompt[:-1], model.drawn(codes[0], model.markers.boi)],
        [text_item(free[:-1]), model.drawn(codes[1], free[-1])],
        model.prompts.answered([user("what?", picture())], "a red cat"),
    ])  # fmt: skip


def test_losses_are_cross_entropies_of_what_comes_next(model):
    batch = training_pack(model)
    losses = model(batch)
    hidden = model.hidden(batch, lambda layer, q, k, v: attention(q, k, v, batch.layout.mask))[STREAM]
    drawn = model.code_logits(hidden)[batch.draw.rows - 1]
    assert_equal(losses.codes, F.cross_entropy(drawn, batch.draw.content, reduction="none"))
    items = model.prompts.answered([user("what?", picture())], "a red cat")
    said = [*model.tokenizer.encode("a red cat"), model.markers.eos]
    assert [i for i in items[-1].labels.tolist() if i != IGNORE] == said == items[-1].ids.tolist()[-len(said) :]
    read = logits(model, [items])[-len(said) - 1 : -1]
    assert_equal(losses.text, F.cross_entropy(read, torch.tensor(said), reduction="none"))
    # packing moves nothing
    alone = model(pack([items]))
    assert_equal(alone.text, losses.text)
    assert alone.codes.numel() == 0


def test_every_trained_part_learns(any_model):
    any_model.zero_grad()
    losses = any_model(training_pack(any_model))
    (losses.text.mean() + losses.codes.mean()).backward()
    still = ("vq.", "vision.trunk.attn_pool.")  # the picture tokenizer is never trained, and nothing reads the pool
    names = [name for name, p in any_model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in names if not name.startswith(still)] == []
    assert all(any(name.startswith(part) for name in names) for part in still)
    any_model.zero_grad()


def test_a_picture_alone_trains_too(model):
    model.zero_grad()
    prompt = model.prompts.drawing("a cat")
    losses = model(pack([[*prompt, model.drawn(torch.arange(CODES), model.markers.boi)]]))
    assert losses.text.numel() == 0 and losses.codes.shape == (CODES,)
    (losses.codes.mean() + losses.text.sum()).backward()
    assert model.code_embed.weight.grad.any() and not model.decoder.head.weight.grad.any()
    model.zero_grad()


def test_a_step_of_training_learns_a_picture(tmp_path):
    """Enough steps on one picture, and it is drawn, whatever the seed."""
    model = Janus.from_pretrained(janus(tmp_path / "toy", generation={"size": [8, 8]}))
    prompt, target = model.prompts.drawing("a cat"), torch.tensor([5, 9, 60, 2])
    batch = pack([[*prompt, model.drawn(target, model.markers.boi)]])
    optimiser = torch.optim.Adam([p for name, p in model.named_parameters() if not name.startswith("vq.")], 3e-3)
    for _ in range(40):
        optimiser.zero_grad()
        model(batch).codes.mean().backward()
        optimiser.step()
    asked = [*prompt, text_item([model.markers.boi])]
    assert model.codes([asked], [torch.Generator()], guidance=[1.0], sampling=GREEDY)[0].tolist() == target.tolist()
