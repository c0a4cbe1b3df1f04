"""Conversations to text, as the original wrote them, and placeholders to runs of ids."""

import json

import pytest
from helpers.paths import GOLDEN

from unimm.processing.chat_templates import (
    DEFAULT_SYSTEM_PROMPT,
    TemplateMessage,
    apply_chat_template,
    expand_image_placeholders,
)

STORED = json.loads((GOLDEN / "janus" / "preproc" / "prompts.json").read_text())
END = "<\uff5cend\u2581of\u2581sentence\uff5c>"


def ask(*contents: str) -> list[TemplateMessage]:
    return [TemplateMessage("BA"[i % 2 == 0], content) for i, content in enumerate(contents)]


@pytest.mark.parametrize(
    "entry", STORED["prompts"], ids=lambda e: f"{e['sft_format']}-{e['case']}-{e['system'] or 'none'}"
)
def test_texts_equal_the_original(entry):
    messages = [TemplateMessage(said["role"], said["content"]) for said in entry["conversation"]]
    system = DEFAULT_SYSTEM_PROMPT if entry["system"] == "default" else entry["system"]
    assert apply_chat_template(messages, system=system, template=entry["sft_format"]) == entry["text"]


def test_defaults():
    assert STORED["default_system_prompt"] == DEFAULT_SYSTEM_PROMPT
    assert apply_chat_template(ask("hi")) == f"{DEFAULT_SYSTEM_PROMPT}\n\nA: hi"
    assert apply_chat_template(ask("hi"), system=None) == apply_chat_template(ask("hi"), system="") == "A: hi"
    assert apply_chat_template([]) == DEFAULT_SYSTEM_PROMPT and apply_chat_template([], system=None) == ""


def test_deepseek_counts_messages_not_roles():
    text = apply_chat_template(
        [TemplateMessage("A", " a\n"), TemplateMessage("A", "\tb "), TemplateMessage("B", "  ")], system="  be brief "
    )
    assert text == f"be brief \n\nA: a\n\nA: b{END}B:"
    assert apply_chat_template(ask("", "b", "c", ""), system="") == f"A:B: b{END}A: c\n\nB:"


def test_llama_writes_tags():
    both = {
        apply_chat_template(ask("a", "b", "", ""), system="s", template=name) for name in ("llama-2", "llava_llama2")
    }
    assert both == {"[INST] <<SYS>>\ns\n<</SYS>>\n\na [/INST] b </s><s>[INST][/INST]"}
    assert apply_chat_template(ask("", ""), system="", template="llama-2") == "[INST] [INST][/INST]"


def test_the_other_templates_know_no_system():
    assert apply_chat_template(ask(" a ", "", "c", "d"), template="plain") == "acd"
    assert apply_chat_template(ask("a", "", "", "d", "e"), template="alignment") == "<image>\nd<image>"


def test_unknown_template():
    with pytest.raises(ValueError, match=r"unknown template 'chatml': expected one of alignment, deepseek, .*plain"):
        apply_chat_template(ask("a"), template="chatml")


def test_placeholders_are_replaced():
    assert expand_image_placeholders([1, 9, 2, 9], image_id=9, boi_id=7, eoi_id=8, lengths=[2, 3]) == [
        1,
        7,
        9,
        9,
        8,
        2,
        7,
        9,
        9,
        9,
        8,
    ]
    assert expand_image_placeholders([1, 2], image_id=9, boi_id=7, eoi_id=8, lengths=[]) == [1, 2]
    for lengths in ([], [2, 2]):
        with pytest.raises(
            ValueError, match=rf"got 1 image placeholders for {len(lengths)} pictures: expected one for each"
        ):
            expand_image_placeholders([1, 9], image_id=9, boi_id=7, eoi_id=8, lengths=lengths)
