"""Requests of families that answer in words and draw apart from each other: a text after the whole conversation, an
image after its last message. BAGEL, whose texts and images are one sequence, has its own way."""

from abc import ABC, abstractmethod
from typing import Any

from PIL import Image

from unimm.generation.kv_cache import EMPTY_CACHE, check_fits
from unimm.generation.stepwise import (
    DecodeText,
    ImageBatch,
    ModelRequest,
    Prefill,
    RequestMessage,
    RequestRun,
    WorkGenerator,
    forward_bytes,
)
from unimm.models.base import UnifiedModel
from unimm.vlms.chat import MLLMChat, split_last_ids


class TextAnswer:
    """An answer in words, read and checked: as `chat` gives it for the same messages."""

    def __init__(self, lm: MLLMChat, request: ModelRequest):
        self.lm = lm
        processor = lm.processor
        messages = [as_message(one, processor.IMAGE_PLACEHOLDER) for one in request.messages]
        self.prompt = processor.conversation_parts(messages, system=request.system)
        self.sampling = request.text_sampling.with_default_max_tokens(lm.max_answer_tokens)
        # the last id of a prompt is the first that decoding is fed
        check_fits(lm.decoder.config, [self.prompt], n_more=self.sampling.token_limit - 1)
        self.n_prompt_rows = sum(part.segment.length for part in self.prompt)
        self.n_bytes = forward_bytes(
            lm.decoder,
            cached_rows=2 * self.n_prompt_rows + self.sampling.token_limit,
            step_rows=self.n_prompt_rows,
        )

    def work(self, seed: int) -> WorkGenerator:
        """The prefill and the text."""
        (before,), (last_id,) = split_last_ids([self.prompt])
        (cache,) = yield Prefill(self.lm, [EMPTY_CACHE], [before])
        tokenizer = self.lm.processor.text_tokenizer
        yield DecodeText(self.lm, cache, last_id, tuple(self.lm.eos_ids), self.sampling, seed, tokenizer)


class ImageAnswer(ABC):
    """An image after the last message, read and checked: as `generate` gives it for the same prompt and images."""

    n_bytes: int = 0
    n_prompt_rows: int = 0

    @abstractmethod
    def work(self, seed: int) -> WorkGenerator:
        """What comes before the image, and the image."""

    @abstractmethod
    def image_batch(self) -> ImageBatch:
        """A new batch of the family's images."""


def separate_run(model: UnifiedModel, lm: MLLMChat | None, request: ModelRequest, image_answer: Any) -> RequestRun:
    """A request as work: its outputs in order, output i from seed + i.

    lm: what answers in words; None where no text is asked for. image_answer(prompt, images) -> ImageAnswer. Raises
    ValueError for bad input, NotImplementedError for what the family lacks.
    """
    model.supported_options(think=request.think, steps=request.steps)
    last = request.messages[-1]
    image: ImageAnswer | None = None
    text: TextAnswer | None = None
    if "image" in request.outputs:
        image = image_answer(last.text, last.images)
    if "text" in request.outputs:
        assert lm is not None, "a request with texts names what answers"
        text = TextAnswer(lm, request)
    answers: dict[str, TextAnswer | ImageAnswer | None] = {"text": text, "image": image}

    def work() -> WorkGenerator:
        for i, kind in enumerate(request.outputs):
            answer = answers[kind]
            assert answer is not None
            yield from answer.work(request.seed + i)

    both = [one for one in answers.values() if one is not None]
    return RequestRun(
        work=work(),
        image_batch=None if image is None else image.image_batch,
        n_bytes=sum(one.n_bytes for one in both),
        n_prompt_tokens=sum(one.n_prompt_rows for one in both),
    )


def as_message(message: RequestMessage, placeholder: str) -> dict[str, Any]:
    """A message as `chat` takes it. Images in front of all texts stand where the family puts them by itself."""
    kinds = [isinstance(piece, Image.Image) for piece in message.content]
    in_front = kinds == sorted(kinds, reverse=True)
    content = message.text
    if not in_front:
        content = "".join(placeholder if isinstance(piece, Image.Image) else piece for piece in message.content)
    return {"role": message.role, "content": content, "images": message.images}
