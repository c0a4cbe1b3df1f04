"""Text to ids and back: a released tokenizer.json, or a sentencepiece model; prompts of text and special tokens."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import sentencepiece
import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizerSequence

from unimm.checkpoint.atomic import name_file
from unimm.checkpoint.contents import describe_unreadable, is_there

# names of tokens beside the vocabulary's, and what they are for
TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
QWEN2_FILES = ("vocab.json", "merges.txt")
# contractions; a word with what stands before it; one digit; signs; ends of lines; blanks
QWEN2_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def check_text(text: Any, name: str) -> str:
    """The text. Raises ValueError for what is none, and for half of a surrogate pair, which no tokenizer takes."""
    if not isinstance(text, str):
        raise ValueError(f"got {text!r:.80} for {name}: expected a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"got {name} that is no text: {error}; decode it with errors='replace'"
        raise ValueError(message) from error
    return text


class JsonTokenizer:
    """A released tokenizer.json, or the older files that Qwen2's is made from, through the tokenizers library.

    special_tokens: tokens that are special even where the file does not call them so. build: makes the tokenizer of the
    older files.
    """

    FILES: ClassVar[tuple[str, ...]] = ("tokenizer.json", "vocab.json", "merges.txt", *TOKEN_FILES)

    def __init__(
        self,
        folder: Path,
        special_tokens: Sequence[str] = (),
        *,
        build: "Callable[[Path], tokenizers.Tokenizer] | None" = None,
    ):
        self.files = read_files(folder, self.FILES)
        path = folder / "tokenizer.json"
        if is_there(path):
            with naming_broken_files(path):
                self.backend = tokenizers.Tokenizer.from_buffer(self.files[path.name])
            add_listed_tokens(self.backend, folder, only_missing=True)
        else:
            self.backend = (build or build_qwen2_tokenizer)(folder)
        # how a fine-tuning cut and filled its batches is no part of the vocabulary
        self.backend.no_truncation()
        self.backend.no_padding()
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
        return self.backend.encode(check_text(text, "a text"), add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    @cached_property
    def special_ids(self) -> dict[str, int]:
        added = self.backend.get_added_tokens_decoder()
        return {token.content: at for at, token in added.items() if token.special}

    @property
    def largest_token(self) -> tuple[str, int]:
        """The token with the largest id, and that id."""
        return max(self.backend.get_vocab(with_added_tokens=True).items(), key=lambda entry: entry[1], default=("", -1))

    def save(self, folder: Path) -> None:
        for name, contents in self.files.items():
            with name_file(folder / name):
                (folder / name).write_bytes(contents)


def read_files(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The contents of some files of a folder, those that are there: the folder may be gone when they are written
    again."""
    contents = {}
    for path in (folder / name for name in names if is_there(folder / name)):
        with naming_broken_files(path):
            contents[path.name] = path.read_bytes()
    return contents


@contextmanager
def naming_broken_files(*paths: Path) -> Iterator[None]:
    """Raise ValueError, with the files' names and what they are instead, where the body cannot take what they hold."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        names = " and ".join(map(str, paths))
        what = next((found for path in paths if (found := describe_unreadable(path))), None)
        advice = what or "it is cut short, or newer than the installed libraries: fetch it again, or upgrade them"
        raise ValueError(f"cannot read {names}: {str(error) or type(error).__name__}; {advice}") from error


def build_qwen2_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """Qwen2's tokenizer from vocab.json and merges.txt, and the tokens that other files list: bytes in pairs."""
    inner = tokenizers.Tokenizer(BPE(*read_bpe_files(folder)))
    inner.normalizer = NFC()
    inner.pre_tokenizer = PreTokenizerSequence(
        [Split(tokenizers.Regex(QWEN2_SPLIT_PATTERN), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = ByteLevelDecoder()
    add_listed_tokens(inner, folder, only_missing=False)
    return inner


def read_bpe_files(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """vocab.json and merges.txt: the tokens' ids, and the pairs that are merged, in their order.

    Raises ValueError for broken files: the tokenizers library would raise a bare Exception.
    """
    vocab_path, merges_path = (folder / name for name in QWEN2_FILES)
    vocab = read_token_file(vocab_path)
    if wrong := next((token for token, at in vocab.items() if type(at) is not int or at < 0), None):
        raise ValueError(
            f"{vocab_path} gives {wrong!r} the id {vocab[wrong]!r}: expected a whole number; fetch it again"
        )
    with naming_broken_files(merges_path):
        lines = merges_path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    for pair in pairs:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise ValueError(
                f"cannot read {merges_path}: got the line {' '.join(pair)[:80]!r}, expected two tokens that {vocab_path.name} "
                f"has, as it has both in one; {describe_unreadable(merges_path) or 'fetch both again'}"
            )
    return vocab, cast("list[tuple[str, str]]", pairs)


def read_token_file(path: Path) -> dict[str, Any]:
    """The object in one of a tokenizer's JSON files; empty where there is no file. Raises ValueError for anything else."""
    if not is_there(path):
        return {}
    with naming_broken_files(path):
        data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}: expected an object; fetch it again")
    return data


def add_listed_tokens(backend: tokenizers.Tokenizer, folder: Path, *, only_missing: bool) -> None:
    """Add the tokens that tokenizer_config.json lists with their ids, and, as older files have them, added_tokens.json.

    only_missing: only those that the tokenizer does not know. Raises ValueError where a token cannot have its id.
    """
    listed: dict[str, tuple[int, bool, Path]] = {}  # content -> id, whether it is special, and the file
    path = folder / "tokenizer_config.json"
    added = read_token_file(path).get("added_tokens_decoder") or {}
    with naming_broken_files(path):
        for at, token in added.items():
            listed[token["content"]] = int(at), token.get("special", True), path
    path = folder / "added_tokens.json"
    older = read_token_file(path)
    special = _special_contents(folder)
    with naming_broken_files(path):
        for content, at in older.items():
            listed.setdefault(content, (int(at), content in special, path))
    if only_missing:
        listed = {content: entry for content, entry in listed.items() if backend.token_to_id(content) is None}
    for content, (_, is_special, _) in sorted(listed.items(), key=lambda entry: entry[1][0]):
        made = tokenizers.AddedToken(content, normalized=False, special=is_special)
        (backend.add_special_tokens if is_special else backend.add_tokens)([made])
    misplaced = [content for content, (at, _, _) in listed.items() if backend.token_to_id(content) != at]
    if misplaced:
        vocab = "tokenizer.json" if only_missing else "vocab.json"
        raise ValueError(
            f"{listed[misplaced[0]][2]} gives {', '.join(misplaced[:3])} ids that do not follow those of {vocab}: "
            "fetch the tokenizer's files again"
        )


def _special_contents(folder: Path) -> set[str]:
    """The tokens that special_tokens_map.json and tokenizer_config.json give a role: bos_token, ..., and lists of more."""
    found: list[Any] = []
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in read_token_file(folder / name).items():
            if key.endswith("_token"):
                found.append(value)
            elif key in ("additional_special_tokens", "extra_special_tokens") and value:
                found += value.values() if isinstance(value, dict) else value
    contents = [token.get("content") if isinstance(token, dict) else token for token in found]
    return {content for content in contents if isinstance(content, str)}


class SentencePieceTokenizer:
    """A sentencepiece model whose special tokens are its control symbols, which no text is encoded as.

    name: of its file. files: those beside it that are written again with it.
    """

    def __init__(self, data: bytes, *, name: str = "tokenizer.model", files: Mapping[str, bytes] | None = None):
        self.model_proto = data
        self.files = {**(files or {}), name: data}
        self.backend = sentencepiece.SentencePieceProcessor(model_proto=data)

    @classmethod
    def from_file(cls, path: Path) -> "SentencePieceTokenizer":
        """The tokenizer of a file, with those of TOKEN_FILES beside it. Raises ValueError for a broken file, and for added
        tokens, which a sentencepiece model cannot take up."""
        with naming_broken_files(path):
            data = path.read_bytes()
            if not data:  # sentencepiece takes it, and fails at the first text
                raise ValueError("no pieces")
            tokenizer = cls(data, name=path.name, files=read_files(path.parent, TOKEN_FILES))
        added = read_token_file(path.parent / "added_tokens.json")
        if lost := [token for token in added if tokenizer.token_id(token) != added[token]]:
            raise ValueError(
                f"{path.parent / 'added_tokens.json'} gives ids to {', '.join(lost[:3])}, which {path.name} does not have: "
                "expected a tokenizer.json with them; let transformers write one"
            )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(check_text(text, "a text"))

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

    @property
    def largest_token(self) -> tuple[str, int]:
        """The token with the largest id, and that id."""
        largest = self.backend.vocab_size() - 1
        return self.backend.id_to_piece(largest), largest

    def save(self, folder: Path) -> None:
        for name, contents in self.files.items():
            with name_file(folder / name):
                (folder / name).write_bytes(contents)


def load_tokenizer(
    folder: Path, *, special_tokens: Sequence[str] = (), vocab_size: int | None = None
) -> "JsonTokenizer | SentencePieceTokenizer | None":
    """The tokenizer in a model's folder, or None where the folder holds none (some stored cases hold ids only).

    special_tokens: tokens that are special even where tokenizer.json does not call them so. vocab_size: rows of the
    embedding table that are of text. Raises ValueError for broken files, and for ids beyond those rows.
    """
    tokenizer: JsonTokenizer | SentencePieceTokenizer
    if is_there(folder / "tokenizer.json") or all(is_there(folder / name) for name in QWEN2_FILES):
        tokenizer = JsonTokenizer(folder, special_tokens)
    elif is_there(folder / "tokenizer.model"):
        tokenizer = SentencePieceTokenizer.from_file(folder / "tokenizer.model")
    else:
        return None
    if vocab_size is not None:
        check_vocabulary(tokenizer, vocab_size, folder)
    return tokenizer


def check_vocabulary(tokenizer: JsonTokenizer | SentencePieceTokenizer, vocab_size: int, folder: Path) -> None:
    """Raise ValueError where a token's id is beyond an embedding table's rows of text."""
    token, largest = tokenizer.largest_token
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} gives {token!r} the id {largest}: expected ids below {vocab_size}, the rows of "
            "the embedding table; fetch the tokenizer that belongs to the weights, or train a larger table"
        )


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
