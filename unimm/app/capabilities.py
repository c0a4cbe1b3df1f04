"""What the page offers of each model: in which tabs it stands, and what it may answer with in the chat."""

from collections.abc import Mapping
from typing import Literal

from unimm.generation.stepwise import Output
from unimm.models.base import UnifiedModel

Tab = Literal["draw", "edit", "ask", "think", "chat"]

# what an answer in the chat is, as the page says it
TEXT_ANSWER = "a text"
IMAGE_ANSWER = "an image"
CHAT_OUTPUTS: dict[str, tuple[Output, ...]] = {
    TEXT_ANSWER: ("text",),
    IMAGE_ANSWER: ("image",),
    "a text, then an image": ("text", "image"),
    "an image, then a text": ("image", "text"),
}


def can_be_served(model: UnifiedModel) -> bool:
    """Whether the engine can work on a model's requests."""
    return type(model).start_run is not UnifiedModel.start_run


def verbs_of(model: UnifiedModel) -> frozenset[str]:
    """The verbs of a model's family."""
    return frozenset(verb for release in model.RELEASES.values() for verb in release.verbs)


def can_do(model: UnifiedModel, tab: Tab) -> bool:
    """Whether a model can do what a tab is for."""
    verbs = verbs_of(model)
    if tab == "draw":
        return "generate" in verbs
    if tab == "edit":
        return "generate" in verbs and model.supports_editing
    if tab == "ask":
        return "understand" in verbs
    if tab == "think":
        return model.supports_thinking
    return bool(verbs & {"chat", "interleave"})


def models_for(models: Mapping[str, UnifiedModel], tab: Tab) -> list[str]:
    """The names of the models that can do what a tab is for, in order."""
    return [name for name, model in models.items() if can_do(model, tab)]


def chat_answers(model: UnifiedModel) -> list[str]:
    """What a model may answer with in the chat: images too where it takes up texts and images in any order."""
    return list(CHAT_OUTPUTS) if "interleave" in verbs_of(model) else [TEXT_ANSWER]
