"""Text to ids: a released tokenizer.json, or the sentencepiece model of a nano."""
import shutil
from pathlib import Path

import sentencepiece
import tokenizers


class JsonTokenizer:
    """A released tokenizer.json, through the tokenizers library."""

    FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")

    def __init__(self, folder: Path):
        self.folder = folder
        self.inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.inner.encode_special_tokens = True  # a marker typed by a user stays text

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, no markers added."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=True)

    def id(self, token: str) -> int | None:
        return self.inner.token_to_id(token)

    def save(self, folder: Path) -> None:
        for name in self.FILES:
            if (self.folder / name).exists():
                shutil.copyfile(self.folder / name, folder / name)


class SentencePieceTokenizer:
    """A sentencepiece model whose special tokens are control symbols of it: text can never spell one."""

    def __init__(self, data: bytes):
        self.data = data
        self.inner = sentencepiece.SentencePieceProcessor(model_proto=data)

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids)

    def id(self, token: str) -> int | None:
        found = self.inner.piece_to_id(token)
        return None if found == self.inner.unk_id() else found

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(self.data)


def load_tokenizer(folder: Path) -> "JsonTokenizer | SentencePieceTokenizer | None":
    """The tokenizer in a model's folder, or None where the folder holds none (golden cases hold ids only)."""
    if (folder / "tokenizer.json").exists():
        return JsonTokenizer(folder)
    if (folder / "tokenizer.model").exists():
        return SentencePieceTokenizer((folder / "tokenizer.model").read_bytes())
    return None
