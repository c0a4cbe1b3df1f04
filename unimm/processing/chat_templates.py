"""Conversations to text by the registered templates, and image placeholders to runs of ids.

docs/originals/janus.md, "Conversation format" and "Image tokens in a prompt". In every template the contents are
stripped, messages at even places end with one separator and those at odd places with the other (whatever their roles
say), and the whole text is stripped at the end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

EOS_TOKEN = "<\uff5cend\u2581of\u2581sentence\uff5c>"
DEFAULT_SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)


@dataclass(frozen=True)
class TemplateMessage:
    """What one side says. The role is written as it is: "<|User|>" for Janus-Pro, "User" for Janus and JanusFlow."""

    role: str
    content: str  # empty: left for the model to write


def _deepseek(system: str, messages: Sequence[TemplateMessage]) -> str:
    text = f"{system}\n\n" if system else ""
    for i, message in enumerate(messages):
        text += f"{message.role}:"
        if message.content:
            text += f" {message.content}" + (EOS_TOKEN if i % 2 else "\n\n")
    return text


def _llama2(system: str, messages: Sequence[TemplateMessage]) -> str:
    """Roles are written as [INST] and [/INST]; the first tag stands before the system's text, which it encloses."""
    text = f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n" if system else "[INST] "
    for i, message in enumerate(messages):
        tag, end = ("[/INST]", " </s><s>") if i % 2 else ("[INST]", " ")
        if not message.content:
            text += tag
        else:
            text += f"{message.content} " if i == 0 else f"{tag} {message.content}{end}"
    return text


def _plain(system: str, messages: Sequence[TemplateMessage]) -> str:
    return "".join(message.content for message in messages)


def _alignment(system: str, messages: Sequence[TemplateMessage]) -> str:
    """A picture in place of whatever was asked, then what was answered."""
    return "".join((message.content if i % 2 else "<image>\n") for i, message in enumerate(messages) if message.content)


TEMPLATES: dict[str, Callable[[str, Sequence[TemplateMessage]], str]] = {
    "deepseek": _deepseek,
    "deepseek_old": _deepseek,  # other roles and stop strings are registered under it, and neither is used
    "llama-2": _llama2,
    "llava_llama2": _llama2,
    "plain": _plain,
    "alignment": _alignment,
}


def apply_chat_template(
    messages: Sequence[TemplateMessage], *, system: str | None = DEFAULT_SYSTEM_PROMPT, template: str = "deepseek"
) -> str:
    """The text that a model is given. system: None or "" for none. Raises ValueError for an unknown template."""
    if template not in TEMPLATES:
        raise ValueError(f"unknown template {template!r}: expected one of {', '.join(sorted(TEMPLATES))}")
    stripped = [TemplateMessage(message.role, message.content.strip()) for message in messages]
    return TEMPLATES[template](system or "", stripped).strip()


def expand_image_placeholders(
    ids: Sequence[int], *, image_id: int, boi_id: int, eoi_id: int, lengths: Sequence[int]
) -> list[int]:
    """Each placeholder `image` becomes boi, n times image, eoi; n from `lengths`, one number a picture, in order.

    Raises ValueError where there are not as many placeholders as pictures.
    """
    if (found := list(ids).count(image_id)) != len(lengths):
        raise ValueError(
            f"got {found} image placeholders for {len(lengths)} pictures: expected one for each; write "
            "<image_placeholder> where a picture belongs, or give as many pictures as there are placeholders"
        )
    left = iter(lengths)
    return [new for old in ids for new in ([boi_id, *[image_id] * next(left), eoi_id] if old == image_id else [old])]
