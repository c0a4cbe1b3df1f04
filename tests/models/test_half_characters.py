"""Half of a surrogate pair, as JSON's "\\ud83d" or a cut UTF-16 text gives it: refused wherever a text can stand."""

import pytest
from helpers.toys import picture

import unimm

HALVES = ("what is \ud83d this?", "\udc00", "a \udfff\ud800")
EARLIER = [{"role": "assistant", "content": "a circle"}, {"role": "user", "content": "and now?"}]
CALLS = {
    "generate": lambda model, half: model.generate(half),
    "generate a batch": lambda model, half: model.generate(["a", half]),
    "understand": lambda model, half: model.understand(picture(), half),
    "chat": lambda model, half: model.chat([{"role": "user", "content": half}]),
    "chat, earlier": lambda model, half: model.chat([{"role": "user", "content": half}, *EARLIER]),
    "chat, answer": lambda model, half: model.chat([
        {"role": "user", "content": "a"}, {"role": "assistant", "content": half}, {"role": "user", "content": "b"}
    ]),
    "chat, system": lambda model, half: model.chat([{"role": "user", "content": "a"}], system=half),
    "respond": lambda model, half: model.respond(half),
    "interleave": lambda model, half: model.interleave(["a", half]),
}  # fmt: skip


@pytest.mark.parametrize("name", [row.name for row in unimm.releases() if row.hub is None])
def test_half_a_character(name):
    model = unimm.load(name)
    verbs = next(row for row in unimm.releases() if row.name == name).verbs
    for place, call in CALLS.items():
        if place.split()[0].rstrip(",") not in verbs:
            continue
        for half in HALVES:
            with pytest.raises(ValueError, match="is no text: .*surrogates.*errors='replace'"):
                call(model, half)


@pytest.mark.parametrize("system", [3, b"be brief", ["be", "brief"]], ids=repr)
@pytest.mark.parametrize("name", ["janus-nano", "metaquery-nano"])
def test_a_system_prompt_is_a_text(name, system):
    with pytest.raises(ValueError, match="got system .*expected a text"):
        unimm.load(name).chat([{"role": "user", "content": "a"}], system=system)


@pytest.mark.parametrize("name", ["bagel-nano", "janus-nano"])
def test_tokenizers_refuse_it_themselves(name):
    tokenizer = unimm.load(name).tokenizer
    for half in HALVES:
        with pytest.raises(ValueError, match="is no text"):
            tokenizer.encode(half)
