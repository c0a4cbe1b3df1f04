"""What bad input gets: an error that says what was got, what was expected and what to do."""

import numpy as np
import pytest
from helpers.toys import picture, toy
from PIL import Image

from unimm import Bagel, TextSampling
from unimm.generation.kv_cache import KVCache


@pytest.fixture(scope="module")
def model():
    return toy(0)


def test_unknown_names_get_the_nearest():
    with pytest.raises(ValueError, match="no model 'bagel-nan'.*bagel-nano"):
        Bagel.from_pretrained("bagel-nan")
    with pytest.raises(ValueError, match="no model '/no/such/folder'"):
        Bagel.from_pretrained("/no/such/folder")


@pytest.mark.parametrize("prompt", ["", "   ", ["a", ""]])
def test_empty_prompts(model, prompt):
    with pytest.raises(ValueError, match="empty prompt"):
        model.generate(prompt)
    with pytest.raises(ValueError, match="empty prompt"):
        model.understand(None, prompt)


def test_no_prompts(model):
    with pytest.raises(ValueError, match="no prompts"):
        model.generate([])


def test_a_prompt_longer_than_the_positions(model):
    with pytest.raises(ValueError, match="reach position 302, the model knows 256"):
        model.generate("word " * 300)
    with pytest.raises(ValueError, match="max_tokens"):
        model.understand(None, "word", text_sampling=TextSampling(max_tokens=300))
    assert model.prefill([KVCache()], [[model.processor.text_part([1] * 254)]])[0].next_position == 256


@pytest.mark.parametrize(
    ("size", "near"),
    [((20, 32), r"\(16, 32\)|\(24, 32\)"), ((0, 8), r"\(8, 8\)"), ((8, 1000), r"\(8, 64\)"), ((-8, 8), r"\(8, 8\)")],
)
def test_sizes_that_cannot_be_generated(model, size, near):
    with pytest.raises(ValueError, match=rf"multiples of 8 up to 64; the nearest is ({near})"):
        model.generate("a", size=size)


@pytest.mark.parametrize("steps", [0, -1])
def test_steps(model, steps):
    with pytest.raises(ValueError, match=f"got steps {steps}: expected at least 1"):
        model.generate("a", steps=steps)


@pytest.mark.parametrize("seed", [-1, [-3]])
def test_seeds(model, seed):
    with pytest.raises(ValueError, match="got seed -.*expected 0 or more"):
        model.generate("a" if seed == -1 else ["a"], seed=seed)
    with pytest.raises(ValueError, match="got 2 seeds for 3 prompts"):
        model.generate(["a", "b", "c"], seed=[1, 2])


def test_images_of_a_batch(model):
    with pytest.raises(ValueError, match="got one image for 2 prompts: expected a list of 2"):
        model.generate(["a", "b"], images=picture())
    with pytest.raises(ValueError, match="expected a PIL image or a path"):
        model.generate("a", images=np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match="no image at"):
        model.understand("/no/such.png", "what")


def test_unusual_images_work(model):
    sixteen = Image.fromarray(np.zeros((9, 9), np.uint16))
    for image in (Image.new("RGBA", (20, 30)), sixteen, Image.new("L", (8, 40)), Image.new("1", (5, 5))):
        assert model.generate("a", images=image, steps=1).image.mode == "RGB"
        assert isinstance(model.understand(image, "what"), str)


def test_streams_and_outputs(model):
    with pytest.raises(ValueError, match="2 questions to stream"):
        model.understand([None, None], ["a", "b"], stream=True)
    with pytest.raises(ValueError, match="got outputs .'video'.: expected"):
        list(model.interleave(["a"], outputs=("video",)))


def test_no_tokenizer(golden):
    with pytest.raises(ValueError, match="no tokenizer"):
        golden.generate("a")
