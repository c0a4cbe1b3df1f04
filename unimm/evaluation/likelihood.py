"""How likely a model is to give an answer: what benchmarks compare that let it choose among answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unimm.generation.decode_batch import DecodeBatch
from unimm.generation.stepwise import BatchedCall, DecodeText, ModelRequest, Prefill, RequestMessage, compute_alone
from unimm.generation.text_sampling import TextSampling
from unimm.models.base import UnifiedModel
from unimm.models.common.separate_outputs import TextAnswer


@dataclass(frozen=True, kw_only=True)
class AnswerLikelihood:
    """Of an answer and its end. log_likelihood: the sum over its tokens. is_greedy: whether each is the most likely."""

    log_likelihood: float
    n_tokens: int
    is_greedy: bool

    @property
    def loss(self) -> float:
        """The mean cross-entropy of its tokens."""
        return -self.log_likelihood / self.n_tokens


@torch.inference_mode()
def answer_likelihoods(
    model: Any, message: RequestMessage, answers: Sequence[str], *, system: str | None = None
) -> list[AnswerLikelihood]:
    """How likely each of some answers to a message is, by a unified model or a vision-language model.

    The message is computed once. Some models begin an answer with a blank: of an answer with one and without, the likelier
    counts. Raises ValueError for a message that the model cannot read, and for one that is, with an answer, longer than its
    positions.
    """
    request = ModelRequest(messages=(message,), system=system, text_sampling=TextSampling(max_tokens=1))
    text = _text_to_decode(model, request)
    written = [form for answer in answers for form in (answer, f" {answer}")]
    found = _score(text, [[*text.tokenizer.encode(form), text.end_ids[0]] for form in written])
    return [max(pair, key=lambda one: one.log_likelihood) for pair in zip(found[::2], found[1::2], strict=True)]


def _score(text: DecodeText, answers: Sequence[Sequence[int]]) -> list[AnswerLikelihood]:
    """The likelihood of each of some continuations of a text."""
    batch = DecodeBatch(text.lm.decoder)
    rows = [batch.join(text.cache, len(ids)) for ids in answers]
    totals = [0.0] * len(answers)
    greedy = [True] * len(answers)
    for step in range(max(map(len, answers), default=0)):
        active = [i for i, ids in enumerate(answers) if step < len(ids)]
        before = [answers[i][step - 1] if step else text.first_id for i in active]
        # in float64, since answers are compared by sums of many terms
        scores = batch.step([rows[i] for i in active], before).double().log_softmax(-1)
        for i, score in zip(active, scores, strict=True):
            token = answers[i][step]
            totals[i] += score[token].item()
            greedy[i] &= int(score.argmax()) == token
    return [
        AnswerLikelihood(log_likelihood=total, n_tokens=len(ids), is_greedy=is_greedy)
        for total, ids, is_greedy in zip(totals, answers, greedy, strict=True)
    ]


def _text_to_decode(model: Any, request: ModelRequest) -> DecodeText:
    """The text that a request begins, with all before it computed."""
    run = model.start_run(request).work if isinstance(model, UnifiedModel) else TextAnswer(model, request).work(0)
    result: Any = None
    while True:
        work = run.send(result)
        if isinstance(work, DecodeText):
            return work
        assert isinstance(work, BatchedCall | Prefill), "no image comes before a text that is asked for alone"
        result = compute_alone(work)
