"""Options of other types than the documented ones: a number is a number whoever made it, and anything else is refused
with the option's name, before anything is computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from math import inf, nan

import numpy as np
import pytest
import torch
from helpers.toys import picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.modules.module import register_module_forward_pre_hook

import unimm
from unimm import Guidance, ImageTokenSampling, TextSampling
from unimm.generation.flow import dpm_timesteps, flow_timesteps
from unimm.generation.image_tokens import sample_image_tokens
from unimm.generation.numbers import parse_flag, parse_float, parse_int
from unimm.generation.text_sampling import sample_token

# options of `generate` that are whole numbers, and those that are real ones, of each family
WHOLE = {
    "bagel-nano": ("n", "seed", "steps"),
    "janus-nano": ("n", "seed"),
    "janusflow-nano": ("n", "seed", "steps"),
    "metaquery-nano": ("n", "seed", "steps"),
    "uniworld-nano": ("n", "seed", "steps"),
}
REAL = {
    "bagel-nano": ("guidance", "timestep_shift"),
    "janus-nano": ("guidance",),
    "janusflow-nano": ("guidance",),
    "metaquery-nano": ("guidance", "image_guidance"),
    "uniworld-nano": ("guidance", "true_cfg_scale", "image_embeds_shortcut"),
}
# how the number 2 comes out of Python, JSON, a slider, numpy and torch
TWO = [2, 2.0, np.int64(2), np.uint8(2), np.float32(2), np.array(2), torch.tensor(2), torch.tensor(2.0)]
NO_NUMBERS = ["2", b"2", nan, inf, -inf, True, np.bool_(True), 2j, {}, object(), np.float32(nan), torch.tensor(inf)]
NO_WHOLE_NUMBERS = [*NO_NUMBERS, 2.5, np.float64(0.5), torch.tensor(1.5)]


@pytest.fixture(scope="module", params=WHOLE)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name) -> unimm.UnifiedModel:
    return unimm.load(name)


@contextmanager
def refused(message: str) -> Iterator[None]:
    """The body raises a ValueError of this message, before any module has run."""

    def work(module, args):
        raise AssertionError(f"{type(module).__name__} ran before the call was refused")

    hook = register_module_forward_pre_hook(work)
    try:
        with pytest.raises(ValueError, match=message):
            yield
    finally:
        hook.remove()


def one_step(model) -> dict:
    return model.supported_options(steps=1 if model.supports_steps else None)


def pixels(generation) -> np.ndarray:
    return np.stack([np.asarray(image) for image in generation.images])


@pytest.mark.parametrize("value", [*NO_WHOLE_NUMBERS, -1], ids=lambda value: f"{value!r:.20}")
def test_no_whole_numbers(name, model, value):
    for option in WHOLE[name]:
        with refused(f"got {option} .*expected"):
            model.generate("a red circle", **{option: value})
        if option == "seed":
            with refused("got seed .*expected"):
                model.understand(picture(), "what is it", seed=[value])


@pytest.mark.parametrize("value", [*NO_NUMBERS, -1.0, 10**400], ids=lambda value: f"{value!r:.20}")
def test_no_numbers(name, model, value):
    for option in REAL[name]:
        words = option.replace("_cfg_", " CFG ").replace("image_g", "image g").removesuffix("scale")
        with refused(f"got ({option}|{words}).*: expected"):
            model.generate("a red circle", **{option: value})


def test_none_is_no_number_and_no_seed(model):
    for option in ("n", "seed"):
        with refused(f"got {option} None: expected a whole number"):
            model.generate("a red circle", **{option: None})


def test_whole_numbers_of_all_types(model):
    options = one_step(model)
    plain = pixels(model.generate("a red circle", n=2, seed=2, **options))
    for two in TWO:
        one = {name: type(two)(1) if isinstance(two, int | float) else two // 2 for name in options}
        assert np.array_equal(pixels(model.generate("a red circle", n=two, seed=two, **one)), plain), repr(two)


@pytest.mark.parametrize("value", [{"temperature": 1}, 0.7, "greedy", TextSampling], ids=repr)
def test_what_is_no_sampling(name, model, value):
    with refused("got text_sampling .*expected a TextSampling"):
        model.understand(picture(), "what is it", text_sampling=value)
    if name == "janus-nano":
        with refused("got image_sampling .*expected an ImageTokenSampling"):
            model.generate("a red circle", image_sampling=value)


# what no option of any verb is
NOTHINGS = [object(), 2j, lambda: 0, float, {1: 2}, b"x", np.zeros((2, 2)), torch.zeros(2, 2), [object()], [[["a"]]]]
CALLS = {
    "generate": {"prompt": "a red circle"},
    "understand": {"images": None, "question": "what is it?"},
    "chat": {"messages": [{"role": "user", "content": "what is it?"}]},
    "interleave": {"inputs": ["a red circle"]},
    "extend": {"prompt": "a red circle", "images": picture(), "directions": "right"},
    "respond": {"prompt": "draw a red circle"},
}
VERBS = {verb for row in unimm.releases() for verb in row.verbs}


def options_of(model) -> list[tuple[str, str]]:
    """Every verb of a model with each of its options."""
    verbs = [verb for verb in CALLS if hasattr(model, verb)]
    return [(verb, option) for verb in verbs for option in signature(getattr(model, verb)).parameters]


def test_every_verb_has_a_call():
    assert set(CALLS) == VERBS


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_what_no_option_is_is_refused_for_every_option(model, data):
    verb, option = data.draw(st.sampled_from(options_of(model)))
    value = data.draw(st.sampled_from(NOTHINGS))
    with refused("got|expected|cannot"):
        getattr(model, verb)(**{**CALLS[verb], option: value})


FLAGS = ("think", "stream", "progress", "step_cache", "bf16_time", "t5", "clip")


@pytest.mark.parametrize("value", ["false", "", 2, -1, 0.5, nan, [], np.array([True, True])], ids=repr)
def test_truth_values(model, value):
    """A text is none: "false", as a form sends it, would be true."""
    for verb, option in options_of(model):
        if option in FLAGS:
            with refused(f"got {option} .*expected True or False"):
                getattr(model, verb)(**{**CALLS[verb], option: value})


@given(st.booleans(), st.sampled_from([bool, int, np.bool_, np.int64, torch.tensor]))
def test_a_truth_value_is_itself(value, kind):
    assert parse_flag(kind(value), "think") is value


# ---- what will be refused is refused before it costs anything


BOOK = "a" * 200_000


@contextmanager
def without_memory() -> Iterator[None]:
    """The body allocates no keys and values."""

    def allocate(self, *args, **options):
        raise AssertionError("keys and values were allocated before the call was refused")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unimm.generation.kv_cache.KVBuffer.__init__", allocate)
        yield


@pytest.mark.parametrize("with_image", [False, True])
def test_a_book_is_refused_before_anything_is_allocated(name, model, with_image):
    image = picture() if with_image else None
    calls = {
        "generate": lambda: model.generate(BOOK, images=image),
        "understand": lambda: model.understand(image, BOOK),
        "chat": lambda: model.chat([{"role": "user", "content": BOOK, "images": image}]),
        "interleave": lambda: model.interleave([image, BOOK] if with_image else [BOOK]),
        "respond": lambda: model.respond(BOOK, images=image),
    }
    for verb, call in calls.items():
        # MetaQuery cuts its captions, as the original does
        if hasattr(model, verb) and (name, verb) != ("metaquery-nano", "generate"):
            with without_memory(), refused(r"would reach position \d+, the model knows"):
                call()


def test_long_answers_systems_and_many_images_are_refused_before_anything_is_allocated(model):
    long = TextSampling(max_tokens=10**6)
    many = [picture()] * 1100
    calls = [
        lambda: model.understand(picture(), "what is it?", text_sampling=long),
        lambda: model.understand(many, "a"),
    ]
    if hasattr(model, "chat"):
        calls.append(lambda: model.chat(CALLS["chat"]["messages"], system=BOOK))
    if hasattr(model, "interleave"):
        calls.append(lambda: model.interleave(["a"], outputs=["text"], text_sampling=long))
    if model.supports_thinking:
        calls.append(lambda: model.generate("a", think=True, text_sampling=long))
    for call in calls:
        with without_memory(), refused(r"would reach position \d+, the model knows"):
            call()


@pytest.mark.parametrize("value", [2**40, 10**400])
def test_more_than_any_memory_holds(model, value):
    for option in ("n", "steps") if model.supports_steps else ("n",):
        with refused(f"got {option} 1.*: expected at most"):
            model.generate("a red circle", **{option: value})
    with refused("cannot generate"):
        model.generate("a red circle", size=(value, 64))
    assert ImageTokenSampling(top_k=value).top_k == value
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    kept = sample_image_tokens(logits, ImageTokenSampling(top_k=value), [torch.Generator().manual_seed(0)])
    assert (
        kept.tolist() == sample_image_tokens(logits, ImageTokenSampling(), [torch.Generator().manual_seed(0)]).tolist()
    )


@pytest.mark.parametrize("options", [
    dict(inputs=[" "]), dict(inputs=["a \ud83d"]), dict(inputs=[3]), dict(inputs=["a", "nowhere.png"], outputs="sound"),
    dict(size=(20, 30)), dict(size=(-8, 8)), dict(size="64"), dict(steps=0), dict(steps="2"), dict(steps=nan),
    dict(inputs=None), dict(inputs=5), dict(outputs=5), dict(outputs=None), dict(outputs=["image", None]),
    dict(guidance=inf), dict(guidance="3"), dict(seed=1.5), dict(seed=None), dict(text_sampling=0.5),
], ids=repr)  # fmt: skip
def test_interleave_raises_at_the_call(options):
    with refused("got|cannot|no image"):
        unimm.load("bagel-nano").interleave(**({"inputs": ["a red circle"]} | options))


def test_no_negative_prompt():
    model = unimm.load("metaquery-nano")
    plain = pixels(model.generate(["a red circle", "a star"], steps=1))
    for negative in (None, [None, None], ["", None]):
        drawn = model.generate(["a red circle", "a star"], negative_prompt=negative, steps=1)
        assert np.array_equal(pixels(drawn), plain)
    for negative in (3, [3], b"a", "half \ud83d", ["a", "b"]):
        with refused("negative.prompt"):
            model.generate("a red circle", negative_prompt=negative, steps=1)


# ---- what reads them


NUMPY = st.sampled_from([int, float, np.int32, np.int64, np.float32, np.float64, np.array, torch.tensor])


@given(st.integers(-1000, 1000), NUMPY)
def test_a_whole_number_is_itself(number, kind):
    made = kind(number)
    assert parse_int(made, "n") == number and type(parse_int(made, "n")) is int
    assert parse_float(made, "x", "a number") == number and type(parse_float(made, "x", "a number")) is float


@given(
    st.floats() | st.text() | st.none() | st.booleans() | st.binary() | st.complex_numbers() | st.lists(st.integers())
)
def test_anything_else_is_refused_by_name(value):
    if isinstance(value, float) and value.is_integer():
        assert parse_int(value, "n") == value
        return
    with pytest.raises(ValueError, match=r"(?s)^got n .*: expected a whole number, at least 1$"):
        parse_int(value, "n", low=1)


@pytest.mark.parametrize("value", [*NO_NUMBERS, -1.0, None], ids=lambda value: f"{value!r:.20}")
def test_fields_that_are_no_numbers(value):
    for kind in (TextSampling, ImageTokenSampling):
        for field in ("temperature", "top_p"):
            with pytest.raises(ValueError, match=f"got {field} .*expected"):
                kind(**{field: value})
    for field in ("text_scale", "image_scale", "renorm_min", "interval"):
        with pytest.raises(ValueError, match=f"got {field} .*expected"):
            Guidance(**{field: (0.0, value) if field == "interval" and value != -1 else value})
    if value is not None:
        with pytest.raises(ValueError, match="got max_tokens .*expected"):
            TextSampling(max_tokens=value)
        with pytest.raises(ValueError, match="got top_k .*expected"):
            ImageTokenSampling(top_k=value)
    for schedule in (lambda: flow_timesteps(value, 1.0), lambda: dpm_timesteps(value)):
        with pytest.raises(ValueError, match="got steps .*expected"):
            schedule()
    with pytest.raises(ValueError, match="got shift .*expected"):
        flow_timesteps(2, value)


@pytest.mark.parametrize("value", [1e-40, 1e-45, 1e-320, 5e-324])
def test_next_to_nothing_is_greedy(value):
    logits = torch.tensor([[1.0, 3.0, 2.0], [-1e4, 1e4, 0.0]])
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    for sampling in (TextSampling(temperature=value), TextSampling(temperature=1.0, top_p=value)):
        assert sample_token(logits, sampling, generators) == [1, 1]
    for tokens in (ImageTokenSampling(temperature=value), ImageTokenSampling(top_p=value)):
        assert sample_image_tokens(logits, tokens, generators).tolist() == [1, 1]


def test_fields_become_pythons_numbers():
    assert TextSampling(temperature=np.float32(0.5), max_tokens=torch.tensor(3.0)) == TextSampling(
        temperature=0.5, max_tokens=3
    )
    assert ImageTokenSampling(top_k=np.int64(5), top_p=torch.tensor(0.5)) == ImageTokenSampling(top_k=5, top_p=0.5)
    assert Guidance(text_scale=np.float64(3), interval=np.array([0, 1])) == Guidance(text_scale=3, interval=(0, 1))
    assert torch.equal(flow_timesteps(np.float32(3), torch.tensor(2.0)), flow_timesteps(3, 2.0))
