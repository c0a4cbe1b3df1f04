"""Text to ids and back: a released tokenizer.json, or a sentencepiece model; prompts of text and special tokens."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizerSequence

from unimm.checkpoint.atomic import name_file

QWEN2_FILES = ("vocab.json", "merges.txt")
# contractions; a word with what stands before it; one digit; signs; ends of lines; blanks
QWEN2_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class JsonTokenizer:
    """A released tokenizer.json, or the older files that Qwen2's is made from, through the tokenizers library.

    special_tokens: tokens that are special even where the file does not call them so.
    """

    FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")

    def __init__(self, folder: Path, special_tokens: Sequence[str] = ()):
        self.files = read_files(folder, self.FILES)
        path = folder / "tokenizer.json"
        self.backend = tokenizers.Tokenizer.from_file(str(path)) if path.exists() else build_qwen2_tokenizer(folder)
        self.backend.add_special_tokens(
            [token for token in special_tokens if self.backend.token_to_id(token) is not None]
        )
        self.backend.encode_special_tokens = True  # a special token that a user types stays text

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copying and pickling keep all of `backend` but this."""
        self.__dict__.update(state)
        self.backend.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, without special tokens around it."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    @cached_property
    def special_ids(self) -> dict[str, int]:
        added = self.backend.get_added_tokens_decoder()
        return {token.content: at for at, token in added.items() if token.special}

    def save(self, folder: Path) -> None:
        for name, contents in self.files.items():
            with name_file(folder / name):
                (folder / name).write_bytes(contents)


def read_files(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The contents of some files of a folder, those that are there: the folder may be gone when they are written
    again."""
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def build_qwen2_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """Qwen2's tokenizer from vocab.json and merges.txt, its added tokens from tokenizer_config.json: bytes in pairs."""
    vocab, merges = (str(folder / name) for name in QWEN2_FILES)
    inner = tokenizers.Tokenizer(BPE.from_file(vocab, merges))
    inner.normalizer = NFC()
    inner.pre_tokenizer = PreTokenizerSequence(
        [Split(tokenizers.Regex(QWEN2_SPLIT_PATTERN), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = ByteLevelDecoder()
    path = folder / "tokenizer_config.json"
    added = json.loads(path.read_text()).get("added_tokens_decoder", {}) if path.exists() else {}
    for _, token in sorted(added.items(), key=lambda entry: int(entry[0])):
        made = tokenizers.AddedToken(token["content"], normalized=False, special=token.get("special", True))
        (inner.add_special_tokens if made.special else inner.add_tokens)([made])
    misplaced = [token["content"] for at, token in added.items() if inner.token_to_id(token["content"]) != int(at)]
    if misplaced:
        raise ValueError(
            f"{path} gives {', '.join(misplaced[:3])} ids that do not follow those of vocab.json: fetch the "
            "tokenizer's files "
            "again"
        )
    return inner


class SentencePieceTokenizer:
    """A sentencepiece model whose special tokens are its control symbols, which no text is encoded as."""

    def __init__(self, data: bytes):
        self.model_proto = data
        self.backend = sentencepiece.SentencePieceProcessor(model_proto=data)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids)

    def token_id(self, token: str) -> int | None:
        found = self.backend.piece_to_id(token)
        return None if found == self.backend.unk_id() else found

    @cached_property
    def special_ids(self) -> dict[str, int]:
        return {
            self.backend.id_to_piece(at): at for at in range(self.backend.vocab_size()) if self.backend.is_control(at)
        }

    def save(self, folder: Path) -> None:
        with name_file(folder / "tokenizer.model"):
            (folder / "tokenizer.model").write_bytes(self.model_proto)


def load_tokenizer(
    folder: Path, *, special_tokens: Sequence[str] = ()
) -> "JsonTokenizer | SentencePieceTokenizer | None":
    """The tokenizer in a model's folder, or None where the folder holds none (some stored cases hold ids only).

    special_tokens: tokens that are special even where tokenizer.json does not call them so.
    """
    if (folder / "tokenizer.json").exists() or all((folder / name).exists() for name in QWEN2_FILES):
        return JsonTokenizer(folder, special_tokens)
    if (folder / "tokenizer.model").exists():
        return SentencePieceTokenizer((folder / "tokenizer.model").read_bytes())
    return None


class TextTokenizer(Protocol):
    """The methods that a model needs of its tokenizer."""

    @property
    def special_ids(self) -> dict[str, int]:
        """The ids of the special tokens, by their strings."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone; special tokens that it spells stay text."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens left out."""

    def token_id(self, token: str) -> int | None:
        """The id of a special token by its string, or None."""

    def save(self, folder: Path) -> None:
        """Write the files that it was read from."""


def special_token(tokenizer: TextTokenizer, token: str) -> str | int:
    """The id of a special token for `encode_prompt`; the token itself, as text, where the tokenizer has no such one."""
    return tokenizer.special_ids.get(token, token)


def encode_prompt(tokenizer: TextTokenizer, prompt: Sequence[str | int]) -> list[int]:
    """Ids of a prompt of texts and ids of special tokens.

    Texts that follow one another are encoded as one. No text is searched for special tokens, so one that a user types
    stays text.
    """
    ids: list[int] = []
    text = ""
    for item in prompt:
        if isinstance(item, str):
            text += item
        else:
            ids += [*(tokenizer.encode(text) if text else ()), int(item)]
            text = ""
    return ids + (tokenizer.encode(text) if text else [])
