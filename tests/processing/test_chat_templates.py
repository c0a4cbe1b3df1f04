"""Conversations to prompts, as the original wrote them, and the messages of a call."""

import json

import pytest
from helpers.paths import GOLDEN
from PIL import Image

from unimm.processing.chat_templates import (
    DEFAULT_SYSTEM_PROMPT,
    TemplateMessage,
    apply_chat_template,
    parse_messages,
)

STORED = json.loads((GOLDEN / "janus" / "preproc" / "prompts.json").read_text())
END = "<\uff5cend\u2581of\u2581sentence\uff5c>"


def text_of(*args, **options) -> str:
    """A prompt that holds texts alone, as one."""
    return "".join(apply_chat_template(*args, **options))


def ask(*contents: str) -> list[TemplateMessage]:
    return [TemplateMessage("BA"[i % 2 == 0], content) for i, content in enumerate(contents)]


@pytest.mark.parametrize(
    "entry", STORED["prompts"], ids=lambda e: f"{e['sft_format']}-{e['case']}-{e['system'] or 'none'}"
)
def test_texts_equal_the_original(entry):
    messages = [TemplateMessage(said["role"], said["content"]) for said in entry["conversation"]]
    system = DEFAULT_SYSTEM_PROMPT if entry["system"] == "default" else entry["system"]
    assert text_of(messages, system=system, template=entry["sft_format"]) == entry["text"]


def test_defaults():
    assert STORED["default_system_prompt"] == DEFAULT_SYSTEM_PROMPT
    assert text_of(ask("hi")) == f"{DEFAULT_SYSTEM_PROMPT}\n\nA: hi"
    assert text_of(ask("hi"), system=None) == text_of(ask("hi"), system="") == "A: hi"
    assert text_of([]) == DEFAULT_SYSTEM_PROMPT and text_of([], system=None) == ""


def test_deepseek_counts_messages_not_roles():
    text = text_of(
        [TemplateMessage("A", " a\n"), TemplateMessage("A", "\tb "), TemplateMessage("B", "  ")], system="  be brief "
    )
    assert text == f"be brief \n\nA: a\n\nA: b{END}B:"
    assert text_of(ask("", "b", "c", ""), system="") == f"A:B: b{END}A: c\n\nB:"


def test_llama_writes_tags():
    both = {text_of(ask("a", "b", "", ""), system="s", template=name) for name in ("llama-2", "llava_llama2")}
    assert both == {"[INST] <<SYS>>\ns\n<</SYS>>\n\na [/INST] b </s><s>[INST][/INST]"}
    assert text_of(ask("", ""), system="", template="llama-2") == "[INST] [INST][/INST]"


def test_the_other_templates_know_no_system():
    assert text_of(ask(" a ", "", "c", "d"), template="plain") == "acd"
    assert text_of(ask("a", "", "", "d", "e"), template="alignment") == "<image>\nd<image>"


def test_unknown_template():
    with pytest.raises(ValueError, match=r"unknown template 'chatml': expected one of alignment, deepseek, .*plain"):
        text_of(ask("a"), template="chatml")


def test_images_and_special_tokens_stand_where_their_messages_say():
    image = Image.new("RGB", (4, 4))
    messages = [TemplateMessage("<|User|>", [image, "\n hi "]), TemplateMessage("<|Assistant|>", "")]
    prompt = apply_chat_template(messages, system="", special={"<|User|>": 7, "<|Assistant|>": 8}.__getitem__)
    assert prompt == [7, ": ", image, "\n hi\n\n", 8, ":"]
    # the images of a question stand in its place
    assert apply_chat_template(messages, template="alignment") == [image]


def test_messages_are_parsed():
    image = Image.new("RGB", (4, 4))
    (message,) = parse_messages(
        [{"role": "user", "content": "a", "images": [image, image]}], placeholder="<i>", separator="\n"
    )
    assert [type(piece) for piece in message.content] == [Image.Image, str, Image.Image, str]
    assert message.content[1] == "\n" and message.content[3] == "\na" and message.n_images == 2
    (message,) = parse_messages(
        [{"role": "user", "content": "<i> or <i>?", "images": [image, image]}], placeholder="<i>"
    )
    assert [type(piece) for piece in message.content] == [Image.Image, str, Image.Image, str]
    with pytest.raises(ValueError, match="does not end with the user: expected the user to have the last word"):
        parse_messages([{"role": "assistant", "content": "a"}], placeholder="<i>")
    with pytest.raises(ValueError, match="expected the user to have the last word, got no message"):
        parse_messages([], placeholder="<i>")
