"""One model at work on many requests: like pieces of work of all of them in one forward."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from unimm.generation.causal_lm import CausalLM
from unimm.generation.decode_batch import DecodeBatch
from unimm.generation.kv_cache import KVCache
from unimm.generation.stepwise import (
    BatchedCall,
    DecodedText,
    DecodeText,
    ImageBatch,
    ImageInProgress,
    Prefill,
    RequestRun,
    TextInProgress,
    advance_texts,
)
from unimm.serving.events import ChoiceDone, ImageDone, ImagePreview, TextPiece
from unimm.serving.prefix_cache import PrefixCache
from unimm.serving.stats import EngineStats
from unimm.serving.ticket import Ticket

# what a model raises over one request, or a batch: the others go on. What else is raised ends the worker's thread.
REQUEST_ERRORS = (
    ValueError,
    NotImplementedError,
    MemoryError,
    RuntimeError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OSError,
)


@dataclass(eq=False)
class Choice:
    """One of a request's answers, from the queue to its end."""

    ticket: Ticket
    index: int
    run: RequestRun
    previews: int = 0
    n_previews_given: int = 0
    n_tokens: int = 0
    n_reasoning_tokens: int = 0
    n_images: int = 0
    finish_reason: Any = "stop"
    work: Any = None  # what it waits for
    result: Any = None  # of the work before, to be sent

    def give_up(self, error: BaseException) -> None:
        """End the whole request with an error."""
        self.ticket.fail(error)

    def preview_steps(self, n_steps: int) -> list[int]:
        """After which steps of an image its previews are shown, evenly spread."""
        return [round(n_steps * (i + 1) / (self.previews + 1)) for i in range(self.previews)]


@dataclass(eq=False)
class ModelWorker:
    """Choices that one model works on, each with its piece of work; `advance` is one turn of all of them."""

    prefixes: PrefixCache
    stats: EngineStats
    text_steps: int = 4  # tokens of each text a turn, where images are on their way too: a token is the shorter step
    choices: list[Choice] = field(default_factory=list)
    _ready: list[Choice] = field(default_factory=list)
    _texts: list[tuple[Choice, TextInProgress]] = field(default_factory=list)
    _images: list[Choice] = field(default_factory=list)
    _decode_batches: dict[int, DecodeBatch] = field(default_factory=dict)
    _image_batch: ImageBatch | None = None

    def add(self, choice: Choice) -> None:
        """Begin to work on a choice."""
        self.choices.append(choice)
        self._ready.append(choice)

    def advance(self) -> None:
        """Prefills and calls until every choice waits for a step, then steps: of all texts, then of all images."""
        self.drop_ended()
        while self._ready:
            self._dispatch()
        if self._texts:
            for _ in range(self.text_steps if self._images else 1):
                self._step_texts()
        if self._images:
            self._step_images()

    def drop_ended(self) -> None:
        """Leave the choices whose requests have ended: cancelled, late, or failed."""
        for choice in [one for one in self.choices if one.ticket.has_ended]:
            self._remove(choice)
            choice.run.work.close()
            self.stats.choices[type(choice.ticket.error).__name__] += 1

    def _remove(self, choice: Choice) -> None:
        self.choices.remove(choice)
        self._ready = [one for one in self._ready if one is not choice]
        self._images = [one for one in self._images if one is not choice]
        for one, text in self._texts:
            if one is choice and text.result is None:
                self._batch_of(text.work.lm).leave(text.row)
        self._texts = [pair for pair in self._texts if pair[0] is not choice]

    # ---- calls and prefills

    def _dispatch(self) -> None:
        """Take the next piece of work of every ready choice; calls and prefills are done at once."""
        ready = self._ready
        self._ready = []
        calls: dict[Any, list[Choice]] = {}
        for choice in ready:
            if not self._take_work(choice):
                continue
            work = choice.work
            if isinstance(work, BatchedCall):
                calls.setdefault(work.function, []).append(choice)
            elif isinstance(work, Prefill):
                calls.setdefault(id(work.lm), []).append(choice)
            elif isinstance(work, DecodeText):
                self._begin_text(choice, work)
            else:
                self._images.append(choice)
        for group in calls.values():
            self._call(group)

    def _take_work(self, choice: Choice) -> bool:
        """Whether a choice has more work, which is in `choice.work` then."""
        try:
            choice.work = choice.run.work.send(choice.result)
            choice.result = None
        except StopIteration:
            self._remove(choice)
            seconds = time.monotonic() - choice.ticket.submitted
            self.stats.add_choice(seconds, n_tokens=choice.n_tokens, n_images=choice.n_images)
            choice.ticket.put(
                ChoiceDone(
                    choice.index,
                    choice.finish_reason,
                    choice.run.n_prompt_tokens,
                    choice.n_tokens,
                    choice.n_reasoning_tokens,
                    choice.n_images,
                )
            )
            return False
        except REQUEST_ERRORS as error:
            choice.give_up(error)
            return False
        return True

    def _call(self, group: Sequence[Choice]) -> None:
        """One call for a group; where that fails each alone, so that an error is its own request's."""
        try:
            results = self._timed("prefill", len(group), lambda: self._batched([one.work for one in group]))
        except REQUEST_ERRORS as error:
            if len(group) == 1:
                group[0].give_up(error)
                return
            for choice in group:
                self._call([choice])
            return
        for choice, result in zip(group, results, strict=True):
            choice.result = result
            self._ready.append(choice)

    def _batched(self, works: Sequence[Any]) -> list[Any]:
        """The results of calls of one function, or of prefills of one model."""
        if isinstance(works[0], Prefill):
            return self._prefill(works)
        arguments = [one for work in works for one in work.arguments]
        return split_lengths(works[0].function(arguments), [len(work.arguments) for work in works])

    def _prefill(self, works: Sequence[Prefill]) -> list[list[KVCache]]:
        lm = works[0].lm
        caches: list[KVCache] = []
        parts = []
        given = [(cache, some) for work in works for cache, some in zip(work.caches, work.parts, strict=True)]
        for cache, some in given:
            begun, left = (cache, list(some)) if cache.next_position else self.prefixes.split(some)
            caches.append(begun)
            parts.append(left)
        grown = lm.prefill(caches, parts)
        for (cache, some), result in zip(given, grown, strict=True):
            if not cache.next_position:
                self.prefixes.store(some, result)
        return split_lengths(grown, [len(work.caches) for work in works])

    # ---- texts

    def _batch_of(self, lm: CausalLM) -> DecodeBatch:
        if id(lm) not in self._decode_batches:
            self._decode_batches[id(lm)] = DecodeBatch(lm.decoder)
        return self._decode_batches[id(lm)]

    def _begin_text(self, choice: Choice, work: DecodeText) -> None:
        try:
            self._texts.append((choice, TextInProgress(work, self._batch_of(work.lm))))
        except REQUEST_ERRORS as error:
            choice.give_up(error)

    def _step_texts(self) -> None:
        for batch in list(self._decode_batches.values()):
            group = [pair for pair in self._texts if self._batch_of(pair[1].work.lm) is batch]
            if group:
                self._step_group(batch, group)
        self._texts = [pair for pair in self._texts if pair[1].result is None]

    def _step_group(self, batch: DecodeBatch, group: Sequence[tuple[Choice, TextInProgress]]) -> None:
        texts = [text for _, text in group]
        try:
            pieces = self._timed("decode_step", len(texts), lambda: advance_texts(batch, texts))
        except REQUEST_ERRORS as error:
            for choice, _ in group:
                choice.give_up(error)
            return
        for (choice, text), piece in zip(group, pieces, strict=True):
            if piece:
                choice.ticket.put(TextPiece(choice.index, piece, text.work.channel))
            if text.result is not None:
                self._end_text(choice, text.work, text.result)

    def _end_text(self, choice: Choice, work: DecodeText, result: DecodedText) -> None:
        choice.n_tokens += result.n_tokens
        if work.channel == "reasoning":
            choice.n_reasoning_tokens += result.n_tokens
        choice.finish_reason = result.finish_reason
        choice.result = result
        self._ready.append(choice)

    # ---- images

    def _step_images(self) -> None:
        images: list[ImageInProgress] = [choice.work for choice in self._images]
        try:
            if self._image_batch is None:
                make = self._images[0].run.image_batch
                assert make is not None, "a run that yields images says how they are advanced"
                self._image_batch = make()
            batch = self._image_batch
            self._timed("denoise_step", len(images), lambda: batch.advance(images))
        except REQUEST_ERRORS as error:
            self._image_batch = None
            for choice in self._images:
                choice.give_up(error)
            return
        for choice, image in zip(list(self._images), images, strict=True):
            self._show(choice, image)
        self._images = [choice for choice in self._images if not choice.work.is_done]
        if not self._images:
            self._image_batch = None

    def _show(self, choice: Choice, image: ImageInProgress) -> None:
        """Give the client a preview where one is due, and the image once it is done."""
        try:
            if image.is_done:
                done = self._timed("image_decode", 1, image.decode)
                choice.ticket.put(ImageDone(choice.index, done))
                choice.n_images += 1
                choice.n_previews_given = 0
                choice.finish_reason = "stop"
                choice.result = done
                self._ready.append(choice)
            elif image.step in choice.preview_steps(image.n_steps):
                preview = self._timed("image_decode", 1, image.decode)
                shown = ImagePreview(choice.index, preview, image.step, image.n_steps, choice.n_previews_given)
                choice.ticket.put(shown)
                choice.n_previews_given += 1
        except REQUEST_ERRORS as error:
            choice.give_up(error)

    def _timed(self, stage: str, n: int, function: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = function()
        self.stats.add_stage(stage, time.perf_counter() - begin, n)
        return result


def split_lengths(values: Sequence[Any], lengths: Sequence[int]) -> list[list[Any]]:
    """A flat list as lists of these lengths."""
    left = iter(values)
    return [[next(left) for _ in range(n)] for n in lengths]
