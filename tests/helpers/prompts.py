"""Prompts of chat processors as text."""

from PIL import Image

from unimm.vlms.processor import ChatProcessor


def rendered(processor: ChatProcessor, messages, system: str | None = None, image: str = "[image]") -> str:
    """The prompt of a conversation as text: special tokens by their strings, `image` for each image."""
    system = processor.default_system if system is None else system
    prompt = processor.render(processor.parse_messages(messages), system)
    names = {i: token for token, i in processor.text_tokenizer.special_ids.items()}
    return "".join(image if isinstance(item, Image.Image) else names.get(item, item) for item in prompt)
