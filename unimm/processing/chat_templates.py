"""Chat messages to prompts: reading the messages of a call, the registered templates of DeepSeek-VL, prompts to parts.

A prompt is a list of texts, ids of special tokens, and images, in order. Text is never searched for special tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from unimm.processing.images.io import load_images
from unimm.processing.requests import Message, parse_message
from unimm.sequence.parts import Part, text_part
from unimm.tokenizers.text import TextTokenizer, encode_prompt

Prompt = list[str | int | Image.Image]


# ---- the messages of a call


@dataclass(frozen=True)
class ChatMessage:
    """A message, read: role "user" or "assistant", and its texts and RGB images in order."""

    role: str
    content: list[str | Image.Image]

    @property
    def n_images(self) -> int:
        """The number of its images."""
        return sum(isinstance(piece, Image.Image) for piece in self.content)


def parse_messages(messages: Sequence[Message], *, placeholder: str, separator: str = "") -> list[ChatMessage]:
    """Read a conversation whose last message is the user's; images stand at placeholders: see `place_images`.

    Raises ValueError for bad messages, for images that do not match the placeholders, and for images that cannot be
    read.
    """
    if not isinstance(messages, list | tuple):
        raise ValueError(
            f"got {messages!r:.80} for a conversation: expected a list of messages, the last one the user's"
        )
    parsed = [
        _parse_message(message, placeholder, separator, of=f"message {i + 1}" if len(messages) > 1 else "")
        for i, message in enumerate(messages)
    ]
    if not parsed or parsed[-1].role != "user":
        raise ValueError(
            f"got a conversation that does not end with the user: expected the user to have the last word, got "
            f"{'an answer of the assistant' if parsed else 'no message'}; add a message of the user's"
        )
    return parsed


def _parse_message(message: Message, placeholder: str, separator: str, *, of: str) -> ChatMessage:
    role, content, images = parse_message(message, placeholder=placeholder, separator=separator)
    first, *texts = content.split(placeholder)
    pieces: list[str | Image.Image] = [first]
    for text, image in zip(texts, load_images(images, of=of), strict=True):
        pieces += [image, text]
    return ChatMessage(role, [piece for piece in pieces if piece != ""])


# ---- prompts to parts


def prompt_to_parts(tokenizer: TextTokenizer, prompt: Sequence[str | int | Part]) -> list[Part]:
    """Parts of a prompt whose images are parts already: what stands between two of them becomes one text part."""
    parts: list[Part] = []
    pending: list[str | int] = []
    for item in prompt:
        if isinstance(item, Part):
            parts += [*_text_parts(tokenizer, pending), item]
            pending = []
        else:
            pending.append(item)
    return parts + _text_parts(tokenizer, pending)


def _text_parts(tokenizer: TextTokenizer, prompt: Sequence[str | int]) -> list[Part]:
    ids = encode_prompt(tokenizer, prompt)
    return [text_part(ids)] if ids else []


# ---- DeepSeek-VL's templates
#
# In every one the contents are stripped, messages at even places end with one separator and those at odd places with
# the other (whatever their roles say), and the whole prompt is stripped at the end. docs/originals/janus.md,
# "Tokenizer".

EOS_TOKEN = "<\uff5cend\u2581of\u2581sentence\uff5c>"
DEFAULT_SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, "
    "and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True)
class TemplateMessage:
    """A message as a template writes it. role: "<|User|>" for Janus-Pro, "User" for Janus and JanusFlow."""

    role: str
    content: Sequence[str | int | Image.Image]  # a text is one, too; empty: left for the model to write


SpecialToken = Callable[[str], str | int]  # a special token -> what stands for it in the prompt


def _deepseek(system: str, messages: Sequence[TemplateMessage], special: SpecialToken) -> Prompt:
    prompt: Prompt = [f"{system}\n\n"] if system else []
    for i, message in enumerate(messages):
        prompt += [special(message.role), ":"]
        if message.content:
            prompt += [" ", *message.content, special(EOS_TOKEN) if i % 2 else "\n\n"]
    return prompt


def _llama2(system: str, messages: Sequence[TemplateMessage], special: SpecialToken) -> Prompt:
    """Roles are written as [INST] and [/INST]; the first tag stands before the system's text, which it encloses."""
    prompt: Prompt = [f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n" if system else "[INST] "]
    for i, message in enumerate(messages):
        tag = "[/INST]" if i % 2 else "[INST]"
        end = [" ", special("</s>"), special("<s>")] if i % 2 else [" "]
        if not message.content:
            prompt += [tag]
        elif i == 0:
            prompt += [*message.content, " "]
        else:
            prompt += [f"{tag} ", *message.content, *end]
    return prompt


def _plain(system: str, messages: Sequence[TemplateMessage], special: SpecialToken) -> Prompt:
    return [piece for message in messages for piece in message.content]


def _alignment(system: str, messages: Sequence[TemplateMessage], special: SpecialToken) -> Prompt:
    """The images of each question (a tag where it has none) in its place, then its answer."""
    prompt: Prompt = []
    for i, message in enumerate(messages):
        images: Prompt = [piece for piece in message.content if isinstance(piece, Image.Image)]
        if message.content:
            prompt += message.content if i % 2 else [*(images or [special("<image>")]), "\n"]
    return prompt


TEMPLATES: dict[str, Callable[[str, Sequence[TemplateMessage], SpecialToken], Prompt]] = {
    "deepseek": _deepseek,
    "deepseek_old": _deepseek,  # other roles and stop strings are registered under it, and neither is used
    "llama-2": _llama2,
    "llava_llama2": _llama2,
    "plain": _plain,
    "alignment": _alignment,
}


def apply_chat_template(
    messages: Sequence[TemplateMessage],
    *,
    system: str | None = DEFAULT_SYSTEM_PROMPT,
    template: str = "deepseek",
    special: SpecialToken = str,
) -> Prompt:
    """The prompt that a model is given. system: None or "" for none. special: what stands for a special token.

    Raises ValueError for an unknown template.
    """
    if template not in TEMPLATES:
        raise ValueError(f"unknown template {template!r}: expected one of {', '.join(sorted(TEMPLATES))}")
    stripped = [TemplateMessage(message.role, _strip(message.content)) for message in messages]
    return _strip(TEMPLATES[template](system or "", stripped, special))


def _strip(prompt: Sequence[str | int | Image.Image]) -> Prompt:
    """A prompt without white space at its ends, and without empty texts; texts that follow one another are joined."""
    joined: Prompt = []
    for item in prompt:
        if isinstance(item, str) and joined and isinstance(joined[-1], str):
            joined[-1] += item
        else:
            joined.append(item)
    if joined and isinstance(joined[0], str):
        joined[0] = joined[0].lstrip()
    if joined and isinstance(joined[-1], str):
        joined[-1] = joined[-1].rstrip()
    return [item for item in joined if item != ""]
