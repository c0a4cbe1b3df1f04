"""Emu3's text tokenizer from its released files: ranks of byte strings, and the list of vision tokens.

docs/originals/emu3.md, "Tokenizer".
"""

import base64
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizerSequence

from unimm.checkpoint.config_io import JsonConfig, JsonLayout
from unimm.checkpoint.contents import is_there
from unimm.tokenizers.text import (
    QWEN2_SPLIT_PATTERN,
    TOKEN_FILES,
    JsonTokenizer,
    check_vocabulary,
    naming_broken_files,
)

RANKS_FILE = "emu3.tiktoken"
VISION_TOKENS_FILE = "emu3_vision_tokens.txt"
# behind the ranks, in this order, and before the vision tokens
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
# transformers' files call this one <image>
UNUSED_TOKEN = "<|extra_0|>"


@dataclass(frozen=True, kw_only=True)
class Emu3SpecialTokens(JsonConfig):
    """The ids of the special tokens, the released ones unless a config.json has others; `TOKENS` are their strings.

    img: begins the rows of an image, behind its grid; eol: ends a row; eof: ends a frame. The token of code 0 follows
    eoi, as in the released list of vision tokens.
    """

    pad: int = 151643
    bos: int = 151849
    eos: int = 151850
    img: int = 151851
    boi: int = 151852
    eoi: int = 151853
    eol: int = 151846
    eof: int = 151847

    TOKENS: ClassVar = {
        "pad": "<|endoftext|>",
        "bos": "<|extra_203|>",
        "eos": "<|extra_204|>",
        "img": "<|image token|>",
        "boi": "<|image start|>",
        "eoi": "<|image end|>",
        "eol": "<|extra_200|>",
        "eof": "<|extra_201|>",
    }
    JSON: ClassVar = JsonLayout(
        name="config.json",
        source="a released Emu3",
        keys={name: f"{name}_token_id" for name in TOKENS},
    )

    @property
    def code0(self) -> int:
        """The id of the token of code 0."""
        return self.eoi + 1


class TiktokenTokenizer(JsonTokenizer):
    """The tokenizer of the original's files."""

    FILES = (RANKS_FILE, VISION_TOKENS_FILE, *TOKEN_FILES)


def load_emu3_tokenizer(folder: Path, *, vocab_size: int) -> JsonTokenizer | None:
    """The tokenizer in a folder of either layout, or None where it holds none.

    Raises ValueError for broken files, for one of the original's two, and for ids beyond the table of embeddings.
    """
    tokenizer: JsonTokenizer
    if is_there(folder / "tokenizer.json"):
        tokenizer = JsonTokenizer(folder)
    elif is_there(folder / RANKS_FILE) or is_there(folder / VISION_TOKENS_FILE):
        if lacking := [name for name in (RANKS_FILE, VISION_TOKENS_FILE) if not is_there(folder / name)]:
            raise ValueError(f"no {lacking[0]} in {folder}: expected both files of Emu3's tokenizer; fetch it again")
        tokenizer = TiktokenTokenizer(folder, build=build_emu3_tokenizer)
    else:
        return None
    check_vocabulary(tokenizer, vocab_size, folder)
    return tokenizer


def build_emu3_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of emu3.tiktoken and emu3_vision_tokens.txt: byte pairs, all specials behind them."""
    ranks = read_ranks(folder / RANKS_FILE)
    letters = byte_letters()
    vocab = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = [
        ("".join(letters[byte] for byte in left), "".join(letters[byte] for byte in right))
        for left, right in merges_of_ranks(ranks)
    ]
    # a word that is a token is one, whether or not pairs lead to it, as in tiktoken
    backend = tokenizers.Tokenizer(BPE(vocab, merges, ignore_merges=True))
    backend.normalizer = NFC()
    backend.pre_tokenizer = PreTokenizerSequence(
        [Split(tokenizers.Regex(QWEN2_SPLIT_PATTERN), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = ByteLevelDecoder()
    path = folder / VISION_TOKENS_FILE
    with naming_broken_files(path):
        vision_tokens = path.read_text(encoding="utf-8").split("\n")
        special = [*SPECIAL_TOKENS, *(token for token in vision_tokens if token)]
        if len(set(special)) < len(special):
            raise ValueError("a token stands there twice")
    backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in special])
    return backend


def read_ranks(path: Path) -> dict[bytes, int]:
    """{token: rank} of lines "base64 rank". Raises ValueError for ranks that are not 0 and up, and for missing bytes."""
    with naming_broken_files(path):
        lines = [line.split() for line in path.read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        if sorted(ranks.values()) != list(range(len(lines))):
            raise ValueError("expected every rank from 0 on once")
        if lacking := [byte for byte in range(256) if bytes([byte]) not in ranks]:
            raise ValueError(f"expected every single byte; it lacks {lacking[0]}")
    return ranks


def merges_of_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs that are merged, in order: of each token the two parts that lower ranks make of it."""
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda entry: entry[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            lowest = min(joined)
            if lowest >= rank:
                break
            at = joined.index(lowest)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs


def byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in byte-level BPE: itself where it is printed, or one from 256 on."""
    printed = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {byte: chr(256 + i) for i, byte in enumerate(others)}
