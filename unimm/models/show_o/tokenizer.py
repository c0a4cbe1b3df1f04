"""Phi's text tokenizer with Show-o's special tokens behind it."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from unimm.models.show_o.config import SPECIAL_TOKENS
from unimm.tokenizers.text import JsonTokenizer, load_tokenizer

END_OF_TEXT = "<|endoftext|>"  # begins and ends texts


class ShowOTokenizer:
    """Ids of texts by Phi's tokenizer; the special tokens have the ids behind it, and image tokens those behind them.

    Raises ValueError for a tokenizer of another length than the model's, and for one without END_OF_TEXT.
    """

    def __init__(self, tokenizer: JsonTokenizer, n_text: int):
        _, largest = tokenizer.largest_token
        end = tokenizer.token_id(END_OF_TEXT)
        if largest != n_text - 1 or end is None:
            raise ValueError(
                f"got a text tokenizer of {largest + 1} ids, {'with' if end is not None else 'without'} {END_OF_TEXT}: "
                f"expected {n_text} with it, as llm_vocab_size says; take the files of microsoft/phi-1_5"
            )
        self.inner = tokenizer
        self.n_text = n_text
        self.end_of_text = end

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone; special tokens that it spells stay text."""
        return self.inner.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. As released, special tokens stay in it but for END_OF_TEXT and the pad; image tokens do not."""
        text = ""
        pending: list[int] = []
        for one in ids:
            if one < self.n_text:
                pending.append(one)
                continue
            name = one - self.n_text
            if 0 < name < len(SPECIAL_TOKENS):
                text += self.inner.decode(pending) + SPECIAL_TOKENS[name]
                pending = []
        return text + self.inner.decode(pending)

    def token_id(self, token: str) -> int | None:
        """The id of a special token by its string, or None."""
        return self.special_ids.get(token)

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The ids of the special tokens, by their strings."""
        ours = {token: self.n_text + i for i, token in enumerate(SPECIAL_TOKENS)}
        return {END_OF_TEXT: self.end_of_text} | ours

    def save(self, folder: Path) -> None:
        """Write the files that it was read from."""
        self.inner.save(folder)


def load_show_o_tokenizer(folder: Path, n_text: int) -> ShowOTokenizer | None:
    """The tokenizer in a folder, None where there is none. Raises ValueError for one that is not Phi's."""
    tokenizer = load_tokenizer(folder, special_tokens=(END_OF_TEXT,), vocab_size=n_text)
    if tokenizer is None:
        return None
    if not isinstance(tokenizer, JsonTokenizer):
        raise ValueError(f"got a sentencepiece model in {folder}: expected a tokenizer.json, as in microsoft/phi-1_5")
    return ShowOTokenizer(tokenizer, n_text)
