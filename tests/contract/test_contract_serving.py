"""The contract of serving: every bundled model's requests, batched step by step, give what its verbs give alone."""

from dataclasses import replace
from functools import partial

import pytest
from helpers.paths import GOLDEN
from helpers.serving import ROUNDING, asks, draws, levels_apart
from helpers.toys import picture
from walk import BUNDLED, loaded, verbs

import unimm
from unimm import TextSampling
from unimm.generation.stepwise import ModelRequest, RequestMessage
from unimm.models.base import UnifiedModel
from unimm.models.registry import FAMILIES
from unimm.serving.engine import Engine

WARM = TextSampling(temperature=1.0, max_tokens=6)


@pytest.mark.parametrize("name", BUNDLED)
def test_a_batch_is_what_the_verbs_give_alone(name):
    """Images at other steps, of other prompts, scales and inputs, and texts, in one engine."""
    model = loaded(name)
    few = [2, 4, 3] if model.supports_steps else [None] * 3
    steps = [{} if n is None else {"steps": n} for n in few]
    image = picture()
    with Engine({name: model}) as engine:
        first = engine.submit(name, draws("a red circle", seed=3, **steps[0]), previews=1)
        second = engine.submit(name, draws("a blue square left of a circle", seed=4, guidance=2.0, **steps[1]))
        third = engine.submit(name, draws(image, "make it green", seed=5, guidance=1.0, **steps[2]))
        answer = engine.submit(name, asks(image, "what is it", text_sampling=WARM, seed=6))
        short = engine.submit(name, asks("which?", text_sampling=TextSampling(max_tokens=2)))
        drawn = [ticket.result()[0].images[0] for ticket in (first, second, third)]
        texts = [ticket.result()[0].text for ticket in (answer, short)]
    expected = [
        model.generate("a red circle", seed=3, **steps[0]).image,
        model.generate("a blue square left of a circle", seed=4, guidance=2.0, **steps[1]).image,
        model.generate("make it green", images=image, seed=5, guidance=1.0, **steps[2]).image,
    ]
    assert [levels_apart(a, b) <= ROUNDING for a, b in zip(drawn, expected, strict=True)] == [True] * 3
    assert texts[0] == model.understand(image, "what is it", text_sampling=WARM, seed=6)
    assert texts[1] == model.understand(None, "which?", text_sampling=TextSampling(max_tokens=2))


@pytest.mark.parametrize("name", [name for name in BUNDLED if "chat" in verbs(name)])
def test_a_conversation_is_what_chat_answers(name):
    model = loaded(name)
    image = picture()
    turns = (("user", (image, "what is it")), ("assistant", ("a picture",)), ("user", ("which",)))
    messages = tuple(RequestMessage(role=role, content=content) for role, content in turns)
    request = ModelRequest(messages=messages, system="be brief", text_sampling=WARM, seed=2)
    with Engine({name: model}) as engine:
        (answer,) = engine.submit(name, request).result()
    plain = [
        {"role": "user", "content": "what is it", "images": [image]},
        {"role": "assistant", "content": "a picture"},
        {"role": "user", "content": "which"},
    ]
    assert answer.text == model.chat(plain, system="be brief", text_sampling=WARM, seed=2)


def test_uniworld_routes_as_respond_does():
    """Where nothing is said of what is wanted its task head decides by the last message."""
    model = loaded("uniworld-nano")
    image = picture()
    earlier = (RequestMessage(role="user", content=("hi",)), RequestMessage(role="assistant", content=("what?",)))
    with Engine({"uniworld": model}) as engine:
        submit = partial(engine.submit, "uniworld")
        drawn = submit(asks("draw a red circle", routed=True, seed=2, steps=1))
        told = submit(asks(image, "what is it", routed=True, text_sampling=WARM, seed=6))
        request = asks(image, "what is it", routed=True, text_sampling=WARM, seed=6)
        later = submit(replace(request, messages=(*earlier, *request.messages)))
        words = submit(asks("draw a red circle", text_sampling=TextSampling(max_tokens=2)))
        answers = [ticket.result()[0].outputs[0] for ticket in (drawn, told, later, words)]
    expected = model.respond("draw a red circle", seed=2, steps=1)
    assert levels_apart(answers[0], expected.image) <= ROUNDING
    assert answers[1] == model.respond("what is it", images=image, text_sampling=WARM, seed=6)
    messages = [{"role": one.role, "content": one.text} for one in earlier]
    messages.append({"role": "user", "content": "what is it", "images": [image]})
    assert answers[2] == model.chat(messages, text_sampling=WARM, seed=6)
    assert isinstance(answers[3], str), "a text where a text is wanted"


TOYS = {"emu3": GOLDEN / "emu3" / "dev", "show_o": GOLDEN / "show_o" / "dev"}


@pytest.mark.parametrize("name", TOYS)
def test_images_of_token_families_are_batched(name):
    """Emu3 and Show-o have no bundled model yet: images of several sizes, scales and lengths, one cancelled, previewed."""
    model = unimm.load(TOYS[name])
    stride = model.config.image_processor.stride if name == "emu3" else model.required_vq.config.stride
    sizes = [(height * stride, width * stride) for height, width in ((3, 4), (2, 2), (3, 4))]
    steps = [{"steps": n} for n in (3, 4, 2)] if model.supports_steps else [{}] * 3
    scales, prompts = [3.0, 1.0, 2.0], ["a cat", "two blue dogs on a hill", "the sun"]
    asked = [
        dict(seed=i, size=size, guidance=scale, **some)
        for i, (size, scale, some) in enumerate(zip(sizes, scales, steps, strict=True))
    ]
    with Engine({name: model}) as engine:
        tickets = [
            engine.submit(name, draws(prompt, **options), previews=2)
            for prompt, options in zip(prompts, asked, strict=True)
        ]
        gone = engine.submit(name, draws("a tree", seed=9))
        gone.cancel()
        drawn = [ticket.result()[0].images[0] for ticket in tickets]
    for image, prompt, options in zip(drawn, prompts, asked, strict=True):
        assert levels_apart(image, model.generate(prompt, **options).image) <= ROUNDING


def test_every_family_is_served():
    assert all(family.load_class().start_run is not UnifiedModel.start_run for family in FAMILIES.values())


@pytest.mark.parametrize("name", [name for name in BUNDLED if name != "bagel-nano"])
def test_what_a_family_lacks_is_refused(name):
    model = loaded(name)
    with Engine({name: model}) as engine:
        with pytest.raises(NotImplementedError, match="no think"):
            engine.submit(name, draws("a", think=True))
        with pytest.raises(ValueError, match="empty prompt"):
            engine.submit(name, draws(" "))
        with pytest.raises(ValueError, match="cannot generate"):
            engine.submit(name, draws("a", size=(17, 31)))
