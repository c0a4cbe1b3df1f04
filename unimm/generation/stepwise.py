"""Requests that are worked on step by step, many at once: what a model and a scheduler say to each other.

A model turns a request into a `RequestRun`: a generator that yields pieces of work and is sent their results. Who
schedules many runs puts the like pieces of all of them into one forward: prefills into one prefill, texts into one
decode step, images into one denoising step, each at a step of its own. Neither knows the other: a model knows no
scheduler, and the scheduler no family. `run_alone` is the smallest scheduler, for one request.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from unimm.generation.causal_lm import CausalLM
from unimm.generation.decode_batch import DecodeBatch, kv_row_bytes
from unimm.generation.kv_cache import KVCache
from unimm.generation.noise import seeded_generators
from unimm.generation.text_sampling import TextSampling, sample_token
from unimm.nn.decoder import CausalDecoder
from unimm.sequence.parts import Part

Output = Literal["text", "image"]


@dataclass(frozen=True, kw_only=True)
class RequestMessage:
    """A message of a conversation: role "user" or "assistant", and its texts and RGB images in order."""

    role: str
    content: tuple[str | Image.Image, ...]

    @property
    def text(self) -> str:
        """Its texts, one after the other."""
        return "".join(piece for piece in self.content if isinstance(piece, str))

    @property
    def images(self) -> list[Image.Image]:
        """Its images."""
        return [piece for piece in self.content if isinstance(piece, Image.Image)]


@dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """What one answer is to be: after these messages, texts and images in the order of `outputs`.

    None stands for the model's own default. size: (height, width) in pixels. guidance: the scale of classifier-free
    guidance as in the model's `generate`. think: write the reasoning first. routed: an image may come in place of the
    one text, where the model decides that (UniWorld's `respond`).
    """

    messages: tuple[RequestMessage, ...]
    outputs: tuple[Output, ...] = ("text",)
    routed: bool = False
    system: str | None = None
    think: bool = False
    seed: int = 0
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    text_sampling: TextSampling = field(default_factory=TextSampling)


# ---- pieces of work


@dataclass(frozen=True, eq=False)
class BatchedCall:
    """Arguments of a function that takes the arguments of many runs at once; the result is the list of theirs."""

    function: Callable[[Sequence[Any]], Sequence[Any]]
    arguments: Sequence[Any]


@dataclass(frozen=True, eq=False)
class Prefill:
    """Parts to append to KV caches; the result is the list of the extended ones."""

    lm: CausalLM
    caches: Sequence[KVCache]
    parts: Sequence[Sequence[Part]]


class TextCodec(Protocol):
    """Texts to ids and back: what a text needs of its tokenizer."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""
        ...


@dataclass(frozen=True, eq=False)
class DecodeText:
    """A text to decode after a cache, fed `first_id`, until one of `end_ids`; the result is a DecodedText.

    channel: what the text is, "text" of the answer or "reasoning" before it.
    """

    lm: CausalLM
    cache: KVCache
    first_id: int
    end_ids: tuple[int, ...]
    sampling: TextSampling
    seed: int
    tokenizer: TextCodec
    channel: Literal["text", "reasoning"] = "text"


@dataclass(frozen=True)
class DecodedText:
    """A decoded text. finish_reason: "stop" at its own end or at a stop string, "length" at the token limit."""

    text: str
    n_tokens: int
    finish_reason: Literal["stop", "length"]


class ImageInProgress(ABC):
    """An image on its way: what a family needs for its next step. As a piece of work its result is the image."""

    step: int = 0
    n_steps: int

    @property
    def is_done(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.n_steps

    @abstractmethod
    def decode(self) -> Image.Image:
        """The image; before the last step, what it would be by what is known now."""


class ImageBatch(ABC):
    """Advances images together; made by a model, it may keep what only changes when other images come."""

    @abstractmethod
    def advance(self, images: Sequence[ImageInProgress]) -> None:
        """One step of each image, each at its own, in as few forwards as their shapes allow."""


Work: TypeAlias = BatchedCall | Prefill | DecodeText | ImageInProgress
WorkGenerator: TypeAlias = Generator[Work, Any, None]


@dataclass(eq=False)
class RequestRun:
    """A request as work: a generator, what it takes at most, and where its images are advanced.

    n_bytes: of the memory that its caches and activations need at most, by estimate. n_prompt_tokens: tokens of texts
    and images that it puts before its first output.
    """

    work: WorkGenerator
    image_batch: Callable[[], ImageBatch] | None = None  # makes a new one, which runs of one model share
    n_bytes: int = 0
    n_prompt_tokens: int = 0


# ---- texts


class TextAssembler:
    """Sampled ids of one row as a growing text, cut at the first stop string."""

    def __init__(self, decode: Callable[[list[int]], str], stop: tuple[str, ...]):
        self._decode = decode
        self._stop = stop
        self._n_held = max((len(one) for one in stop), default=0)
        self._n_given = 0
        self.ids: list[int] = []
        self.text = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """The text that is certain with one more id: without half a character, or what may become a stop string."""
        self.ids.append(token)
        decoded = self._decode(self.ids)
        end = min((decoded.index(one) for one in self._stop if one in decoded), default=len(decoded))
        self.is_stopped = end < len(decoded)
        self.text = decoded[:end]
        if self.is_stopped or decoded.endswith("\ufffd"):
            return ""
        return self._give(len(decoded) - self._n_held)

    def rest(self) -> str:
        """What was held back, once the text has ended."""
        return self._give(len(self.text))

    def _give(self, end: int) -> str:
        piece = self.text[self._n_given : max(end, self._n_given)]
        self._n_given += len(piece)
        return piece


class TextInProgress:
    """A text on its way: its row of a DecodeBatch, its generator, and what it has so far."""

    def __init__(self, work: DecodeText, batch: DecodeBatch):
        self.work = work
        self.row = batch.join(work.cache, work.sampling.token_limit)
        self.next_id = work.first_id
        (self.generator,) = seeded_generators([work.seed])
        self.assembler = TextAssembler(work.tokenizer.decode, work.sampling.stop)
        self.result: DecodedText | None = None

    def push(self, token: int) -> str:
        """Take a sampled id; returns the text that became certain. `result` is set once the text has ended."""
        piece = ""
        ended = token in self.work.end_ids
        if not ended:
            piece = self.assembler.push(token)
            self.next_id = token
        is_full = self.row.n_written == self.row.capacity
        if ended or self.assembler.is_stopped or is_full:
            piece += self.assembler.rest()
            reason: Literal["stop", "length"] = "stop" if ended or self.assembler.is_stopped else "length"
            self.result = DecodedText(self.assembler.text, len(self.assembler.ids), reason)
        return piece


@torch.inference_mode()
def advance_texts(batch: DecodeBatch, texts: Sequence[TextInProgress]) -> list[str]:
    """One token of each text in one forward; returns the pieces that became certain. Those that end leave the batch."""
    logits = batch.step([one.row for one in texts], [one.next_id for one in texts])
    by_sampling: dict[TextSampling, list[int]] = {}
    for i, one in enumerate(texts):
        by_sampling.setdefault(one.work.sampling, []).append(i)
    pieces = [""] * len(texts)
    for sampling, rows in by_sampling.items():
        tokens = sample_token(logits[rows], sampling, [texts[i].generator for i in rows])
        for i, token in zip(rows, tokens, strict=True):
            pieces[i] = texts[i].push(token)
    for one in texts:
        if one.result is not None:
            batch.leave(one.row)
    return pieces


# ---- images that are denoised


class DenoisingImage(ImageInProgress):
    """An image on its way from noise: x, of the family's shape, and its schedule [S + 1] from noise to data."""

    def __init__(self, x: Tensor, timesteps: Tensor):
        self.x = x
        self.schedule: list[float] = timesteps.tolist()
        self.n_steps = len(self.schedule) - 1
        self.data = x  # the data that the last step pointed to

    @property
    def shape_key(self) -> Hashable:
        """Images of equal keys are denoised in one forward."""
        return None

    @property
    def shown(self) -> Tensor:
        """x at the end, before it the data that the last step pointed to."""
        return self.x if self.is_done else self.data

    def move(self, x: Tensor) -> None:
        """Take the x of the next timestep. The path is straight: x' = x - (t - t') v and data = x - t v."""
        t, next_t = self.schedule[self.step : self.step + 2]
        self.data = self.x + (x - self.x) * (t / (t - next_t)) if t != next_t else x
        self.x = x
        self.step += 1


class DenoisingBatch(ImageBatch):
    """Images that are denoised together; what a family joins of them is kept until other images come."""

    def __init__(self) -> None:
        self._joined: dict[Hashable, tuple[list[DenoisingImage], Any]] = {}

    @abstractmethod
    def join(self, images: Sequence[Any]) -> Any:
        """The state of denoising these images in one forward, as the family's `latent_denoiser`."""

    @abstractmethod
    def denoise(self, denoiser: Any, images: Sequence[Any], timesteps: Tensor, next_timesteps: Tensor) -> list[Tensor]:
        """One step of the images, each x from its timestep [P] to its next one [P] (float64, on the CPU)."""

    @torch.inference_mode()
    def advance(self, images: Sequence[ImageInProgress]) -> None:
        """One step of each image; those of one shape in one forward."""
        groups: dict[Hashable, list[DenoisingImage]] = {}
        for image in images:
            assert isinstance(image, DenoisingImage)
            groups.setdefault(image.shape_key, []).append(image)
        kept = {key: self._joined[key] for key in groups if key in self._joined}
        self._joined = {}
        for key, group in groups.items():
            before, denoiser = kept.get(key, ([], None))
            if len(before) != len(group) or any(a is not b for a, b in zip(before, group, strict=True)):
                denoiser = self.join(group)
            now = torch.tensor([one.schedule[one.step] for one in group], dtype=torch.float64)
            after = torch.tensor([one.schedule[one.step + 1] for one in group], dtype=torch.float64)
            for image, x in zip(group, self.denoise(denoiser, group, now, after), strict=True):
                image.move(x)
            self._joined[key] = (group, denoiser)


def forward_bytes(decoder: CausalDecoder, *, cached_rows: int, step_rows: int = 1) -> int:
    """About what a sequence takes: keys and values of its rows, and the activations of the rows of one step."""
    weight = decoder.embed.weight
    dtype = torch.promote_types(weight.dtype, torch.float32) if weight.device.type == "cpu" else weight.dtype
    # of a block, at once: the residual stream, q, k, v, and the gate and the product of the feed-forward, about 16 widths
    return cached_rows * kv_row_bytes(decoder.config, dtype) + step_rows * 16 * decoder.config.dim * dtype.itemsize


# ---- one request alone


def compute_alone(work: BatchedCall | Prefill) -> Any:
    """The result of a piece of work that is done in one forward, of this request alone."""
    if isinstance(work, Prefill):
        return work.lm.prefill(work.caches, work.parts)
    return work.function(work.arguments)


@torch.inference_mode()
def run_alone(run: RequestRun) -> Iterator[DecodedText | Image.Image]:
    """Work on one request to its end: yields its texts, reasoning too, and images as they are done."""
    image_batch = run.image_batch() if run.image_batch else None
    result: Any = None
    while True:
        try:
            work = run.work.send(result)
        except StopIteration:
            return
        if isinstance(work, BatchedCall | Prefill):
            result = compute_alone(work)
        elif isinstance(work, DecodeText):
            batch = DecodeBatch(work.lm.decoder)
            text = TextInProgress(work, batch)
            while text.result is None:
                advance_texts(batch, [text])
            result = text.result
            yield result
        else:
            assert image_batch is not None, "a run that yields images says how they are advanced"
            while not work.is_done:
                image_batch.advance([work])
            result = work.decode()
            yield result
