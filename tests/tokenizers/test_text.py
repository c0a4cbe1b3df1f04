"""Qwen2's tokenizer from the older files, vocab.json and merges.txt, beside transformers' own."""

import json
import shutil

import pytest
from helpers import metaquery_toys as toys

from unimm.tokenizers.text import JsonTokenizer, encode_prompt, load_tokenizer, special_token

FOLDER = toys.GOLDEN / "Qwen2.5-VL-tiny"
TEXTS = [
    "assistant\n\n",
    "user\nusing  it's  THEY'RE 1234 items!?\r\n\r\n  end ", "taste: cafe\u0301, \u00c5\u00e5 \u4f60\u597d, \U0001f600",
    "", " ", "\n", "a\tb  c   \n  d", "<notamarker> _x_ --- ...", "x" * 50,
]  # fmt: skip


@pytest.fixture(scope="module")
def theirs():
    from transformers import Qwen2TokenizerFast

    return Qwen2TokenizerFast.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def ours() -> JsonTokenizer:
    found = load_tokenizer(FOLDER)
    assert isinstance(found, JsonTokenizer)
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_texts(ours, theirs, text):
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


def test_special_tokens(ours, theirs):
    pieces = ["<|im_start|>", "user\n", "hello", "<|im_end|>", "\n", "<|image_pad|>"]
    prompt = [special_token(ours, piece) for piece in pieces]
    assert [type(item) for item in prompt] == [int, str, str, int, str, int]
    assert encode_prompt(ours, prompt) == theirs("".join(pieces), add_special_tokens=False)["input_ids"]
    # a text is encoded whole, whatever it is put together from
    assert encode_prompt(ours, ["hel", "lo"]) == ours.encode("hello") and encode_prompt(ours, [""]) == []
    assert ours.token_id("<|im_end|>") not in ours.encode("<|im_end|>")  # typed by a user


def test_saved_files_are_read_again(ours, tmp_path):
    ours.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (
        again is not None and again.encode(TEXTS[1]) == ours.encode(TEXTS[1]) and again.special_ids == ours.special_ids
    )


def test_ids_that_do_not_follow_the_vocabulary(tmp_path):
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    files = json.loads((tmp_path / "tokenizer_config.json").read_text())
    added = files["added_tokens_decoder"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"300": added["269"]}}))
    with pytest.raises(ValueError, match=r"gives <\|endoftext\|> ids that do not follow those of vocab.json: fetch"):
        load_tokenizer(tmp_path)
