"""Conversations with images as parts of a sequence, whichever chat format a model has.

A processor works without its model, so that training can make its batches ahead.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from PIL import Image

from unimm.processing.chat_templates import ChatMessage, Prompt, parse_messages, prompt_to_parts
from unimm.processing.requests import Message
from unimm.sequence.parts import IGNORE_INDEX, Part, text_part
from unimm.tokenizers.text import TextTokenizer, check_text, special_token

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"


@dataclass(frozen=True, kw_only=True)
class ChatProcessor(ABC):
    """Conversations to parts, by a family's chat format. The tokenizer is None for a checkpoint without one."""

    tokenizer: TextTokenizer | None

    IMAGE_PLACEHOLDER: ClassVar[str]  # stands for an image in the content of a message
    IMAGE_SEPARATOR: ClassVar[str] = ""  # follows each image that stands in front of the text

    @property
    @abstractmethod
    def default_system(self) -> str:
        """The system prompt of a conversation that is given none; "" for none."""

    @property
    @abstractmethod
    def answer_end_id(self) -> int:
        """The id that ends an answer."""

    @abstractmethod
    def render(self, messages: Sequence[ChatMessage], system: str) -> Prompt:
        """The prompt of a conversation, up to where the assistant's answer begins. system: "" for none."""

    @abstractmethod
    def image_prompt(self, image: Image.Image, n_images: int) -> list[str | int | Part]:
        """An RGB image, one of `n_images` of a prompt, as a part and what stands around it."""

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """The tokenizer. Raises ValueError for a checkpoint without one."""
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer: add its tokenizer.json to the folder")
        return self.tokenizer

    def special(self, token: str) -> str | int:
        """A special token in a prompt: its id, or the token as text where the tokenizer has no such one."""
        return special_token(self.text_tokenizer, token)

    def parse_messages(self, messages: Sequence[Message]) -> list[ChatMessage]:
        """Read and check the messages of a conversation, the last one the user's."""
        return parse_messages(messages, placeholder=self.IMAGE_PLACEHOLDER, separator=self.IMAGE_SEPARATOR)

    def to_parts(self, prompt: Prompt) -> list[Part]:
        """A prompt of texts, ids of special tokens and RGB images as parts."""
        n_images = sum(isinstance(item, Image.Image) for item in prompt)
        expanded: list[str | int | Part] = []
        for item in prompt:
            expanded += self.image_prompt(item, n_images) if isinstance(item, Image.Image) else [item]
        return prompt_to_parts(self.text_tokenizer, expanded)

    def conversation_parts(self, messages: Sequence[Message], *, system: str | None = None) -> list[Part]:
        """A conversation up to where the assistant's answer begins. system: in place of the default one; "" for none.

        Images stand in front of their message's text, or where it holds `IMAGE_PLACEHOLDER`. Raises ValueError for bad
        messages.
        """
        if system is not None:
            check_text(system, "a system prompt")
        parsed = self.parse_messages(messages)
        return self.to_parts(self.render(parsed, self.default_system if system is None else system))

    def with_answer(self, messages: Sequence[Message], answer: str, *, system: str | None = None) -> list[Part]:
        """A conversation and the assistant's answer, whose ids, and the one that ends it, carry labels."""
        *before, last = self.conversation_parts(messages, system=system)
        ids = last.ids.tolist()
        answer_ids = [*self.text_tokenizer.encode(answer), self.answer_end_id]
        labels = [*[IGNORE_INDEX] * (len(ids) - 1), *answer_ids, IGNORE_INDEX]
        return [*before, text_part([*ids, *answer_ids], labels=labels)]

    def label_answers(self, prompt: Prompt, messages: Sequence[ChatMessage]) -> list[Part]:
        """A rendered prompt as parts, whose answers, and the id that ends each, carry labels.

        Message i, where it is an answer to learn, stands in the prompt as `answer_placeholder(i)`. White space before it
        is encoded with it. The id that ends it is its last row's label, whether or not the prompt has it there.
        """
        pending: Prompt = []
        parts: list[Part] = []
        for item in prompt:
            if not isinstance(item, int) or item >= 0:
                pending.append(item)
                continue
            pending, space = _split_space(pending)
            parts += self.to_parts(pending)
            pending = []
            text = "".join(piece for piece in messages[-1 - item].content if isinstance(piece, str))
            ids = self.text_tokenizer.encode(space + text)
            parts = append_learned(parts, ids, last_label=self.answer_end_id)
        return parts + self.to_parts(pending)

    def label_texts(self, prompt: Prompt) -> list[Part]:
        """Texts and images without roles behind an id, as parts; the ids of all texts carry labels, and the one that ends
        the last."""
        n_texts = sum(isinstance(item, str) for item in prompt)
        parts: list[Part] = []
        for item in prompt:
            if not isinstance(item, str):
                parts += self.to_parts([item])
                continue
            n_texts -= 1
            ids = self.text_tokenizer.encode(item)
            parts = append_learned(parts, ids if n_texts else [*ids, self.answer_end_id])
        return parts


def answer_placeholder(i: int) -> int:
    """What stands for message i in a prompt for `ChatProcessor.label_answers`: an id that no token has."""
    return -1 - i


def with_placeholders(messages: Sequence[ChatMessage], learned: Collection[int]) -> list[ChatMessage]:
    """Messages, in which those at these places, answers to learn, are their placeholders."""
    written: list[ChatMessage] = []
    for i, message in enumerate(messages):
        content: list[Any] = [answer_placeholder(i)] if i in learned else message.content
        written.append(ChatMessage(message.role, content))
    return written


def append_learned(parts: Sequence[Part], ids: Sequence[int], *, last_label: int = IGNORE_INDEX) -> list[Part]:
    """Parts and a text of these ids behind them, each of which the row before it must predict.

    last_label: what the last of these rows must predict.
    """
    *before, last = parts
    labels = last.labels.clone()
    labels[-1], *others = [*ids, last_label]
    return [*before, replace(last, labels=labels), *([text_part(ids, labels=others)] if ids else [])]


def _split_space(prompt: Prompt) -> tuple[Prompt, str]:
    """A prompt without the white space at its end, and this: byte-level tokenizers join it with the word behind it."""
    *before, last = prompt or [0]
    if not isinstance(last, str):
        return prompt, ""
    text = last.rstrip()
    if text:
        return [*before, text], last[len(text) :]
    rest, space = _split_space(before)
    return rest, space + last


@dataclass(frozen=True, kw_only=True)
class VLMProcessor(ChatProcessor):
    """The processor of a vision-language model. special_tokens: the family's; `im_end` ends every message."""

    special_tokens: Any

    @property
    def answer_end_id(self) -> int:
        """The id of <|im_end|>."""
        return self.special_tokens.im_end
