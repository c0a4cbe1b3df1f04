"""Which words a MetaQuery's queries say."""

import numpy as np
import pytest
import torch

from unimm import MetaQuery
from unimm.data.shapes.language import FAVOURITES
from unimm.evaluation.query_words import plot_query_words, query_words, word_probabilities


@pytest.fixture(scope="module")
def model():
    return MetaQuery.from_pretrained("metaquery-nano")


def test_queries_say_what_is_to_be_drawn_though_the_prompt_does_not(model):
    names = ("Tom", "Anna", "Ben")
    colours = [FAVOURITES[name][1] for name in names]
    found = word_probabilities(model, [f"draw what {name} likes" for name in names], colours).max(-1)
    assert found.shape == (3, 3) and (found.argmax(1) == np.arange(3)).all() and found.diagonal().min() > 0.3


def test_they_are_the_head_over_the_states_that_the_denoiser_is_given(model):
    prompts = ["draw a red star", "a blue circle and two green squares"]
    first, second = query_words(model, prompts, k=3)
    assert (first.prompt, second.prompt) == tuple(prompts)
    n = model.config.n_queries
    assert len(first.tokens) == len(first.probabilities) == n and {len(one) for one in first.tokens} == {3}
    assert all(one == sorted(one, reverse=True) and 0 < sum(one) <= 1 + 1e-5 for one in first.probabilities)
    with torch.inference_mode():
        states = model.query_states([model.processor.prompt_parts(text) for text in prompts])
        p = (states @ model.mllm.decoder.embed.weight.T).softmax(-1)
    best = [[model.processor.text_tokenizer.decode([i]).strip() for i in row] for row in p.argmax(-1).tolist()]
    assert [[one[0] for one in words.tokens] for words in (first, second)] == best
    alone = query_words(model, prompts[0], k=3)
    assert alone[0].tokens == first.tokens, "whatever else is in the batch"


def test_a_plot(model):
    (words,) = query_words(model, "draw what Tom likes", k=2)
    image = plot_query_words(words, columns=7)
    wide, tall = plot_query_words(words, columns=model.config.n_queries), plot_query_words(words, columns=1)
    assert image.width < wide.width and image.height < tall.height
    # the surer, the darker: the right end of the cell of the surest query, and of the least sure
    likeliest = [p for p, _ in words.probabilities]
    cells = [np.asarray(wide)[58:74, 8 + 88 * i + 70 : 8 + 88 * i + 84] for i in range(len(likeliest))]
    shades = [float(np.median(cell)) for cell in cells]
    assert shades[int(np.argmax(likeliest))] < 130 < shades[int(np.argmin(likeliest))]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: query_words(model, "a", k=0), "got k 0: expected at least 1"),
        (lambda model: word_probabilities(model, "a", []), "got the words"),
        (lambda model: word_probabilities(model, "a", ["red", " "]), "got the words"),
        (lambda model: plot_query_words(query_words(model, "a")[0], columns=0), "got 0 columns"),
    ],
)
def test_bad_input(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)
