"""What bad input gets of Janus: an error that says what was got, what was expected and what to do."""

from pathlib import Path

import numpy as np
import pytest
from helpers.toys import byte_tokenizer, janus, picture, user

from unimm import Janus, TextSampling
from unimm.models.common.deepseek_processor import IMAGE_PLACEHOLDER, JanusSpecialTokens

EOS = JanusSpecialTokens.TOKENS["eos"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return janus(tmp_path_factory.mktemp("janus") / "toy")


@pytest.fixture(scope="module")
def model(folder) -> Janus:
    return Janus.from_pretrained(folder)


@pytest.mark.parametrize("prompt", ["", "  \n", ["a", ""]])
def test_empty_prompts(model, prompt):
    for verb in (lambda: model.generate(prompt), lambda: model.understand(None, prompt)):
        with pytest.raises(ValueError, match="empty prompt: expected at least a word"):
            verb()


def test_images_and_placeholders(model):
    with pytest.raises(ValueError, match=r"got 2 <image_placeholder> for 1 images: expected one for each; give"):
        model.understand(picture(), f"{IMAGE_PLACEHOLDER} and {IMAGE_PLACEHOLDER}?")
    with pytest.raises(ValueError, match=r"got 1 <image_placeholder> for 0 images"):
        model.understand(None, f"what is {IMAGE_PLACEHOLDER}?")
    with pytest.raises(ValueError, match=r"got 1 <image_placeholder> for 2 images"):
        model.generate(f"more of {IMAGE_PLACEHOLDER}", images=[picture(), picture()])
    with pytest.raises(ValueError, match=r"in the system prompt: images belong to the messages"):
        model.chat([user("what?", picture())], system=f"look at {IMAGE_PLACEHOLDER}")
    with pytest.raises(ValueError, match=r"got one image for 2 prompts: expected a list of 2"):
        model.understand(picture(), ["a", "b"])
    with pytest.raises(ValueError, match="expected a PIL image or a path"):
        model.understand(np.zeros((4, 4, 3)), "what?")
    with pytest.raises(ValueError, match="no image at /no/such.png"):
        model.chat([{"role": "user", "content": "what?", "images": "/no/such.png"}])


@pytest.mark.parametrize(
    "turns",
    [
        [],
        [[]],
        {"role": "user", "content": "a"},
        "hello",
        [{"role": "user", "content": "a", "pictures": []}],
        [{"role": "system", "content": "a"}],
        [{"role": "user"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    ],
)
def test_turns(model, turns):
    with pytest.raises(ValueError, match=r"got .*: expected"):
        model.chat(turns)


def test_streams(model):
    with pytest.raises(ValueError, match="got 2 questions to stream: expected one"):
        model.understand(None, ["a", "b"], stream=True)
    with pytest.raises(ValueError, match="got 3 conversations to stream: expected one"):
        model.chat([[user(q)] for q in "abc"], stream=True)


def test_what_the_family_lacks(model):
    assert not model.supports_thinking and not model.supports_steps and not hasattr(model, "interleave")
    with pytest.raises(NotImplementedError, match="Janus has no think and no steps"):
        model.supported_options(think=True, steps=3)
    assert model.supported_options() == {}


@pytest.mark.parametrize("size", [(32, 32), (24, 23), (0, 0), (-24, 24)])
def test_sizes_that_cannot_be_generated(model, size):
    with pytest.raises(
        ValueError, match=r"cannot generate .*: this model was trained for \(24, 24\) alone; leave size out"
    ):
        model.generate("a", size=size)


@pytest.mark.parametrize("options", [dict(n=0), dict(n=-1), dict(guidance=-0.5), dict(guidance=[-1.0])])
def test_counts_and_scales(model, options):
    with pytest.raises(ValueError, match=r"expected (at least 1 image of each prompt|scales of 0 or more)"):
        model.generate(["a"], **options)


def test_seeds_and_scales_of_a_batch(model):
    for seed in (-1, [-3], [4, -2]):
        with pytest.raises(ValueError, match="got seed -.*expected 0 or more"):
            model.generate(["a"] * (1 if seed == -1 else len(seed)), seed=seed)
        with pytest.raises(ValueError, match="got seed -.*expected 0 or more"):
            model.understand(None, ["a"] * (1 if seed == -1 else len(seed)), seed=seed)
    with pytest.raises(ValueError, match="got 2 seeds for 3 prompts"):
        model.generate(["a", "b", "c"], seed=[1, 2])
    with pytest.raises(ValueError, match="got 2 guidances for 3 prompts"):
        model.generate(["a", "b", "c"], guidance=[1.0, 2.0])
    with pytest.raises(ValueError, match="no prompts"):
        model.generate([])
    with pytest.raises(ValueError, match="no prompts"):
        model.understand(None, [])
    with pytest.raises(TypeError, match="temprature"):
        model.generate("a", temprature=1.0)


def test_what_the_positions_cannot_hold(model):
    with pytest.raises(ValueError, match=r"reach position \d+, the model knows 512"):
        model.generate("word " * 300)
    with pytest.raises(ValueError, match="max_tokens"):
        model.understand(None, "a", text_sampling=TextSampling(max_tokens=600))


def test_no_tokenizer(tmp_path):
    model = Janus.from_pretrained(janus(tmp_path / "toy", roles=None))
    for verb in (lambda: model.generate("a"), lambda: model.understand(None, "a"), lambda: model.special_tokens):
        with pytest.raises(ValueError, match=r"no tokenizer: add its tokenizer\.json"):
            verb()
    model.fallback_special_tokens = JanusSpecialTokens(bos=1, eos=2, pad=3, boi=4, eoi=5)
    with pytest.raises(ValueError, match=r"no tokenizer: add its tokenizer\.json"):
        model.understand(None, "a")


@pytest.mark.parametrize("lacks", [["<begin_of_image>"], [EOS, JanusSpecialTokens.TOKENS["pad"]]])
def test_a_tokenizer_without_the_special_tokens(tmp_path, folder, lacks):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    byte_tokenizer(tmp_path, lacks=lacks)
    model = Janus.from_pretrained(tmp_path)
    message = r"the tokenizer lacks .*: expected the special tokens.*put the tokenizer\.json"
    for verb in (lambda: model.generate("a"), lambda: model.understand(picture(), "a")):
        with pytest.raises(ValueError, match=message) as error:
            verb()
        assert all(token in str(error.value) for token in lacks)
    byte_tokenizer(
        tmp_path, lacks=[IMAGE_PLACEHOLDER]
    )  # no model ever sees its id, and the original adds it where it is missing
    model = Janus.from_pretrained(tmp_path)
    assert isinstance(
        model.understand(picture(), f"{IMAGE_PLACEHOLDER} what?", text_sampling=TextSampling(max_tokens=2)), str
    )
