"""Models of this library in lmms-eval (0.7), which finds them by the entry point `lmms_eval.models`:

    python -m lmms_eval --model unimm --model_args pretrained=bagel-7b --tasks mmbench_en_dev

Tasks that let a model write (`generate_until`, in several rounds too) run, and those that let it choose among answers
(`loglikelihood`, `multiple_choice`).
"""

import os
from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from unimm.evaluation.adapters.harness_model import HarnessModel, read_visuals

MANIFEST = ModelManifest(model_id="unimm", simple_class_path="unimm.evaluation.adapters.lmms_eval_model.LMMsEvalModel")


class LMMsEvalModel(lmms):
    """A model of this library under lmms-eval's interface, in one process."""

    is_simple = True

    def __init__(
        self,
        *,
        pretrained: str,
        dtype: str = "float32",
        device: str = "cpu",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        """pretrained: a bundled name, a folder or a hub id. batch_size: questions at a time, which the harness may give
        as a text. max_batch_size: is not used, the harness gives it. max_tokens: the most new tokens of any answer. Raises
        ValueError in one of several processes.
        """
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"got WORLD_SIZE {os.environ['WORLD_SIZE']}: expected one process, with a larger batch_size"
            )
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"got batch_size {batch_size!r}: expected a number of 1 or more")
        self.harness = HarnessModel(pretrained, dtype=dtype, device=device, max_tokens=max_tokens)
        self.batch_size = int(batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each request, whose arguments are (text, options, images of a document, its id, task, split)."""
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            # only questions of the same options are asked together
            groups.setdefault(repr(request.args[1]), []).append(i)
        with tqdm(total=len(requests), desc="unimm", disable=self.rank != 0) as bar:
            for group in groups.values():
                for first in range(0, len(group), self.batch_size):
                    batch = group[first : first + self.batch_size]
                    asked = [requests[i].args for i in batch]
                    texts = [one[0] for one in asked]
                    images = [self._images(*one[2:6]) for one in asked]
                    found = self.harness.answer(images, texts, self.harness.sampling(asked[0][1]))
                    for i, one, answer in zip(batch, asked, found, strict=True):
                        answers[i] = answer
                        self.cache_hook.add_partial("generate_until", (one[0], one[1]), answer)
                    bar.update(len(batch))
        return [answers[i] for i in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of all rounds of each request, whose arguments are (text, options, images of a document, what makes
        the text of a round, id, task, split)."""
        return [self._rounds(request.args) for request in tqdm(requests, desc="unimm", disable=self.rank != 0)]

    def _rounds(self, arguments: tuple[Any, ...]) -> list[str]:
        text, options, to_visual, to_text, doc_id, task, split = arguments
        sampling = self.harness.sampling(options)
        document = self.task_dict[task][split][doc_id]
        images = read_visuals(to_visual(document))
        answers: list[str] = []
        previous: Any = None
        while True:
            answers += self.harness.answer([images], [text], sampling)
            # the task sees the answers so far, and says what is asked next, or that it has ended; it may correct them
            visuals, text, is_over, corrected, previous = to_text(
                document, previous_output=list(answers), round_idx=len(answers), previous_round_info=previous
            )
            if is_over:
                return list(corrected)
            images = read_visuals(visuals)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """The loss of each request's answer, and whether it is the greedy one; arguments are (text, the answer or what
        finds it in a document, images of a document, its id, task, split).

        lmms-eval takes the answer of the least mean cross-entropy, though the method's name says log-likelihood.
        """
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, request in enumerate(requests):
            text, _, to_visual, doc_id, task, split = request.args
            groups.setdefault((text, to_visual, doc_id, task, split), []).append(i)
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="unimm", disable=self.rank != 0) as bar:
            for (text, *document), group in groups.items():
                answers = [self._answer(*requests[i].args) for i in group]
                for i, one in zip(group, self.harness.likelihoods(self._images(*document), text, answers), strict=True):
                    found[i] = (one.loss, one.is_greedy)
                bar.update(len(group))
        return [found[i] for i in range(len(requests))]

    def _answer(self, _: str, answer: Any, to_visual: Any, doc_id: int, task: str, split: str) -> str:
        return answer if isinstance(answer, str) else str(answer(self.task_dict[task][split][doc_id]))

    def _images(self, to_visual: Any, doc_id: int, task: str, split: str) -> list[Any]:
        return read_visuals(to_visual(self.task_dict[task][split][doc_id]))
