"""Answering in words: `understand` and `chat`, written once for vision-language models and for unified models.

Axes: B conversations, V vocabulary.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

from typing_extensions import Self

from unimm.generation.causal_lm import CausalLM
from unimm.generation.decode import TextStream, decode_text
from unimm.generation.kv_cache import EMPTY_CACHE, KVCache, check_fits
from unimm.generation.numbers import parse_flag
from unimm.generation.text_sampling import TextSampling, resolve_sampling
from unimm.nn.packed_linear import optimize_for_cpu
from unimm.processing.requests import ImageInput, Message, expand_seeds, parse_requests
from unimm.sequence.parts import Part, text_part
from unimm.vlms.processor import ChatProcessor


class MLLMChat(CausalLM):
    """A causal language model that reads images and answers in words, by the chat format of its processor."""

    # prefixes of the modules that `optimize_for_cpu` leaves as they are
    UNPACKED: ClassVar[tuple[str, ...]] = ("vision",)

    @property
    @abstractmethod
    def processor(self) -> ChatProcessor:
        """Conversations to parts."""

    @property
    @abstractmethod
    def eos_ids(self) -> Sequence[int]:
        """The ids that end an answer."""

    @property
    @abstractmethod
    def max_answer_tokens(self) -> int:
        """The most new ids of an answer, where a call does not say."""

    @final
    def understand(
        self,
        images: ImageInput | Sequence | None,
        question: str | Sequence[str],
        *,
        stream: bool = False,
        text_sampling: TextSampling | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Any:
        """Answer a question about images: a str; for a batch of questions a list; with `stream`, pieces as they come.

        images: for one question an image, several, or None; for a batch one of these each. They stand in front of the
        question, or where it holds the image placeholder of the model's processor. Raises ValueError for bad input.
        """
        questions, question_images = parse_requests(question, images)
        stream = parse_flag(stream, "stream")
        if stream and len(questions) != 1:
            raise ValueError(f"got {len(questions)} questions to stream: expected one")
        conversations = [
            [{"role": "user", "content": text, "images": some}]
            for text, some in zip(questions, question_images, strict=True)
        ]
        messages: Any = conversations[0] if isinstance(question, str) else conversations
        return self.chat(messages, stream=stream, text_sampling=text_sampling, seed=seed)

    @final
    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        system: str | None = None,
        stream: bool = False,
        text_sampling: TextSampling | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Any:
        """Answer the last message of a conversation, or of each of a batch of conversations.

        A message is {"role": "user" or "assistant", "content": str, "images": [images]}, images where there are some;
        the last one is the user's. system: in place of the model's own system prompt, "" for none. Returns a str, a
        list of them for a batch, or (`stream`) an iterator of pieces. Raises ValueError for bad input.
        """
        if not isinstance(messages, list | tuple) or not messages:
            raise ValueError(
                f"got {messages!r:.80} for a conversation: expected a list of messages, the last one the user's"
            )
        if system is not None and not isinstance(system, str):
            raise ValueError(f"got system {system!r}: expected a text, or None for the model's own")
        stream = parse_flag(stream, "stream")
        is_single = isinstance(messages[0], Mapping)
        conversations: list[Any] = [messages] if is_single else list(messages)
        if stream and len(conversations) != 1:
            raise ValueError(f"got {len(conversations)} conversations to stream: expected one")
        text_sampling = resolve_sampling(text_sampling)
        seeds = expand_seeds(seed, len(conversations))
        prompts = [self.processor.conversation_parts(one, system=system) for one in conversations]
        answers = self.decode_answers(prompts, text_sampling, seeds)
        if stream:
            return answers.pieces()
        return answers.texts()[0] if is_single else answers.texts()

    def decode_answers(
        self, prompts: Sequence[Sequence[Part]], text_sampling: TextSampling | None, seeds: Sequence[int]
    ) -> TextStream:
        """The answers after prompts, each of which ends with a text part, as they are decoded."""
        sampling = resolve_sampling(text_sampling).with_default_max_tokens(self.max_answer_tokens)
        # the last id of a prompt is the first that decoding is fed
        check_fits(self.decoder.config, prompts, n_more=sampling.token_limit - 1)
        caches, last_ids = self.prefill_prompts(prompts)
        session = self.decode_session(caches, sampling.token_limit)
        steps = decode_text(session, last_ids, end=self.eos_ids, sampling=sampling, seeds=seeds)
        return TextStream(steps, self.processor.text_tokenizer.decode, len(prompts), sampling.stop)

    def prefill_prompts(self, prompts: Sequence[Sequence[Part]]) -> tuple[list[KVCache], list[int]]:
        """The KV caches of all but the last id of prompts, each of which ends with a text part, and these last ids."""
        before, last_ids = split_last_ids(prompts)
        return self.prefill([EMPTY_CACHE] * len(before), before), last_ids

    def optimize_for_cpu(self, *, int8: bool = False) -> Self:
        """This model made faster on a CPU: about twice as fast a token, with `int8` three times.

        It shares this model's weights; the large ones are packed a second time for products of few rows: as many bytes
        again, and half a minute for each billion of them (float32: a whole one). Results are the same to within
        rounding. Weights that change later, by training or loading, are not packed again: optimize the trained model.

        int8: the decoder's blocks are kept in int8 alone, a byte a weight (drop this model to free its bytes), each
        product about 1 % off; such a model does not train. Heads and encoders stay as they are.

        On another device, or where PyTorch has no packed products (not x86), nothing is packed and nothing changes;
        with int8 that is a ValueError.
        """
        return optimize_for_cpu(self, skip=self.UNPACKED, int8=("decoder.blocks",) if int8 else ())


def split_last_ids(prompts: Sequence[Sequence[Part]]) -> tuple[list[list[Part]], list[int]]:
    """Prompts that end with a text part without their last ids, and these ids: the first that decoding is fed."""
    before = []
    last_ids = []
    for *parts, last in prompts:
        *ids, last_id = last.ids.tolist()
        before.append([*parts, text_part(ids)] if ids else parts)
        last_ids.append(last_id)
    return before, last_ids
