"""The contract of likelihoods: of every bundled model, greedy answers are known as such; the sum is training's loss."""

import pytest
import torch
from PIL import Image
from walk import BUNDLED, loaded

from unimm.data.shapes import example
from unimm.evaluation.likelihood import answer_likelihoods
from unimm.generation.stepwise import RequestMessage
from unimm.sequence.packing import pack_sequences


def asked(index: int) -> tuple[Image.Image, str]:
    """A test scene of one thing, and the question for its colour."""
    one = example("answer.colour", index, seed=5, split="test")
    return Image.fromarray(one.images[0]), one.prompt


@pytest.mark.parametrize("name", BUNDLED)
def test_the_greedy_answer_is_the_likeliest(name):
    model = loaded(name)
    image, question = asked(0)
    answer = model.understand(image, question)
    others = [answer + " " + answer, answer[:-1], "a " + answer]
    first, *rest = answer_likelihoods(model, RequestMessage(role="user", content=(image, question)), [answer, *others])
    assert first.is_greedy and first.loss < 1
    assert not any(one.is_greedy for one in rest)
    assert all(one.log_likelihood < first.log_likelihood < 0 for one in rest)
    # without an image, and none among no answers
    message = RequestMessage(role="user", content=(question,))
    assert answer_likelihoods(model, message, [answer])[0].log_likelihood != first.log_likelihood
    assert answer_likelihoods(model, message, []) == []


@torch.inference_mode()
def test_the_sum_is_the_loss_of_training():
    model = loaded("janus-nano")
    image, question = asked(1)
    answers = ["red", "a blue square and a green star", ""]
    found = answer_likelihoods(model, RequestMessage(role="user", content=(image, question)), answers)
    for answer, one in zip(answers, found, strict=True):
        # the nano's answers begin without a blank
        parts = model.processor.with_answer([{"role": "user", "content": question, "images": [image]}], answer)
        losses = model(pack_sequences([parts])).text
        assert one.n_tokens == len(losses)
        assert one.log_likelihood == pytest.approx(-losses.double().sum().item(), rel=1e-4)
        assert one.loss == pytest.approx(losses.mean().item(), rel=1e-4)
