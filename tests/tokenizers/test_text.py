"""Qwen2's tokenizer from the older files, vocab.json and merges.txt, beside transformers' own."""

import json
import re
import shutil
from pathlib import Path

import pytest
import tokenizers
from helpers import metaquery_toys as toys
from helpers.paths import GOLDEN

from unimm import UniWorld
from unimm.checkpoint import hub
from unimm.checkpoint.atomic import OPTIONAL_FILES
from unimm.models.registry import load
from unimm.tokenizers.text import (
    TOKEN_FILES,
    JsonTokenizer,
    SentencePieceTokenizer,
    encode_prompt,
    load_tokenizer,
    special_token,
)

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


# ---- files as others write them


@pytest.fixture
def folder(tmp_path) -> Path:
    """The older files, to be changed."""
    return Path(shutil.copytree(FOLDER, tmp_path / "words"))


def save_whole(ours: JsonTokenizer, folder: Path, change=lambda backend: None) -> None:
    """Put tokenizer.json in the place of the older files."""
    backend = tokenizers.Tokenizer.from_str(ours.backend.to_str())
    change(backend)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    backend.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("length", [1, 5, 4000])
def test_truncation_and_padding_of_a_fine_tuning_do_not_count(ours, folder, length):
    def change(backend):
        backend.enable_truncation(max_length=length)
        backend.enable_padding(length=length)

    save_whole(ours, folder, change)
    found = load_tokenizer(folder)
    assert [found.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    found.save(folder)
    assert '"truncation": {' in (folder / "tokenizer.json").read_text(), "the file is written as it was read"


@pytest.mark.parametrize("named_in", [None, "special_tokens_map.json", "tokenizer_config.json"])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("n_listed", [0, 3])
def test_added_tokens_json(ours, folder, named_in, whole, n_listed):
    """Older files have added tokens there, and some list a part of them in tokenizer_config.json, too."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    listed = config.pop("added_tokens_decoder")
    added = {token["content"]: int(at) for at, token in listed.items()}
    if whole:
        backend = json.loads(ours.backend.to_str())
        backend["added_tokens"] = backend["added_tokens"][:n_listed]
        for name in ("vocab.json", "merges.txt"):
            (folder / name).unlink()
        (folder / "tokenizer.json").write_text(json.dumps(backend))
    roles = {"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": list(added)}
    config = {key: value for key, value in config.items() if not key.endswith(("_token", "_tokens"))}
    config["added_tokens_decoder"] = dict(list(listed.items())[:n_listed])
    files = {"tokenizer_config.json": config, "added_tokens.json": dict(reversed(added.items()))}
    if named_in is not None:
        files[named_in] = {**files.get(named_in, {}), **roles}
    for name, contents in files.items():
        (folder / name).write_text(json.dumps(contents))
    found = load_tokenizer(folder)
    assert {token: found.token_id(token) for token in added} == added
    assert [found.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    special = dict(added) if named_in else dict(list(added.items())[:n_listed])
    assert found.special_ids == special
    # a model names its own, whatever the files call them
    assert load_tokenizer(folder, special_tokens=list(added)).special_ids == added
    (folder / "saved").mkdir()
    found.save(folder / "saved")
    again = load_tokenizer(folder / "saved")
    assert again.special_ids == special and again.token_id("<|im_start|>") == added["<|im_start|>"]


def test_an_older_folder_gives_the_same_conversation(tmp_path):
    """The markers of the chat template are one id each, and stay text where a user types them."""
    shutil.copytree(GOLDEN / "uniworld" / "dev", tmp_path, dirs_exist_ok=True)
    right = UniWorld.from_pretrained(tmp_path).mllm.tokenizer
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    added = {token["content"]: int(at) for at, token in config.pop("added_tokens_decoder").items()}
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    found = UniWorld.from_pretrained(tmp_path).mllm.tokenizer
    for token in ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"):
        assert special_token(found, token) == special_token(right, token) == added[token]
        assert added[token] not in found.encode(f"a {token} b")


NEWER = '{"version":"1.0","added_tokens":[],"model":{"type":"Next","vocab":{},"merges":[]}}'
BROKEN = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "page": (b"<!DOCTYPE html><html>", "an HTML page"),
    "cut": (b'{"version": "1.0", "added_to', ""),
    "newer": (NEWER.encode(), ""),
    "empty": (b"", "it is empty"),
    "no text": (b"\xff\xfe\x00", ""),
    "no object": (b"[1, 2]", ""),
}


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", *TOKEN_FILES])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named(ours, folder, name, kind):
    if name == "tokenizer.model":
        for other in ("vocab.json", "merges.txt"):
            (folder / other).unlink()
    contents, match = BROKEN[kind]
    if name in TOKEN_FILES and kind == "newer":
        pytest.skip("any object will do")
    if name == "merges.txt":
        contents, match = contents or b"a b c\n", ""  # its lines are pairs, and none is as good
    (folder / name).write_bytes(contents)
    with pytest.raises(ValueError, match=rf"(?s){re.escape(name)}.*{match}"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", *TOKEN_FILES])
def test_a_link_to_nothing_is_named(folder, name):
    if name == "tokenizer.model":
        for other in ("vocab.json", "merges.txt"):
            (folder / other).unlink()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/nowhere/blobs/123")
    with pytest.raises(ValueError, match=rf"{re.escape(name)}.*a link to nothing"):
        load_tokenizer(folder)


def test_a_sentencepiece_model_keeps_its_name_and_its_files(tmp_path):
    data = (hub.BUNDLED_FOLDER / "janus-nano" / "tokenizer.model").read_bytes()
    (tmp_path / "spiece.model").write_bytes(data)
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 48}')
    (tmp_path / "saved").mkdir()
    SentencePieceTokenizer.from_file(tmp_path / "spiece.model").save(tmp_path / "saved")
    names = ("spiece.model", "tokenizer_config.json")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == sorted(names)
    assert all((tmp_path / "saved" / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)
    (tmp_path / "added_tokens.json").write_text('{"<new>": 4000}')
    with pytest.raises(ValueError, match=r"added_tokens\.json gives ids to <new>, which spiece\.model does not have"):
        SentencePieceTokenizer.from_file(tmp_path / "spiece.model")


@pytest.mark.parametrize("name", hub.bundled_names())
def test_a_word_beyond_the_embedding_table(tmp_path, name):
    """Or, of MetaQuery, within the rows of its queries, and of Show-o, within those of its special tokens."""
    model = load(name)
    model.save_pretrained(tmp_path)
    files = [tmp_path / "tokenizer.json"] if name == "showo-nano" else tmp_path.rglob("tokenizer.model")
    below = next(path.parent for path in files if path.parent.name != "tokenizer_2")
    (below / "tokenizer.model").unlink(missing_ok=True)
    config = getattr(model.config, "mllm", model.config)
    rows = config.n_text if name == "showo-nano" else config.decoder.vocab_size
    last = "<|endoftext|>"  # without which no tokenizer is Show-o's
    for n, fits in ((rows, True), (rows + 1, False)):
        ids = {f"w{i}": i for i in range(n - 1)} | {last: n - 1}
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="w0"))
        words.save(str(below / "tokenizer.json"))
        if fits:
            assert load_tokenizer(below, vocab_size=rows) is not None
        else:
            with pytest.raises(
                ValueError, match=rf"gives '{re.escape(last)}' the id {rows}: expected ids below {rows}, the rows"
            ):
                load(tmp_path)


def test_what_a_tokenizer_writes_is_known_to_be_of_one_model():
    """So that a file of another model is not read with this one."""
    assert {*JsonTokenizer.FILES, "tokenizer.model", "spiece.model"} <= set(OPTIONAL_FILES)
