"""Captions to rows of ids of one length, as CLIP's and T5's text encoders read them.

FLUX gives T5 no mask, so that its padding is attended to; causal attention hides CLIP's.
docs/originals/blocks.md, "T5 and CLIP".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from unimm.tokenizers.text import (
    JsonTokenizer,
    SentencePieceTokenizer,
    check_vocabulary,
    is_there,
    read_bpe_files,
    read_token_file,
)

CLIP_BOS = "<|startoftext|>"
CLIP_EOS = "<|endoftext|>"
CLIP_MAX_LENGTH = 77  # of FLUX's captions
T5_MAX_LENGTH = 512  # of FLUX's captions
LARGEST_MODEL_MAX_LENGTH = 100_000  # a model_max_length above this means no limit
# words, digits one by one, the rest in runs; of English, what follows an apostrophe
CLIP_SPLIT_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clip_bpe_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """CLIP's tokenizer out of vocab.json and merges.txt. Raises ValueError where one is missing."""
    files = [folder / "vocab.json", folder / "merges.txt"]
    if lost := [path.name for path in files if not path.exists()]:
        raise ValueError(
            f"no {' and no '.join(lost)} in {folder}: expected those of CLIP's tokenizer, or its tokenizer.json"
        )
    vocab, merges = read_bpe_files(folder)
    pairs = models.BPE(vocab, merges, unk_token=CLIP_EOS, continuing_subword_prefix="", end_of_word_suffix="</w>")
    inner = tokenizers.Tokenizer(pairs)
    spaces = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    inner.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(tokenizers.Regex(CLIP_SPLIT_PATTERN), behavior="removed", invert=True)
    inner.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([CLIP_BOS, CLIP_EOS])
    return inner


@dataclass(frozen=True, kw_only=True)
class CaptionTokenizer:
    """Begin, the words, cut to fit, the end, and padding up to `length`."""

    tokenizer: JsonTokenizer | SentencePieceTokenizer
    bos_id: int | None
    eos_id: int
    pad_id: int
    max_length: int

    def __call__(self, texts: str | Sequence[str], *, max_length: int | None = None) -> Tensor:
        """Texts, which may be empty -> ids [B, length]. length: instead of the released one."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        n = self.max_length if max_length is None else max_length
        first = [] if self.bos_id is None else [self.bos_id]
        if n <= len(first) + 1 or not texts:
            raise ValueError(
                f"got {len(texts)} captions of length {n}: expected one or more, of {len(first) + 2} ids or more"
            )
        rows = [[*first, *self.tokenizer.encode(text)[: n - len(first) - 1], self.eos_id] for text in texts]
        return torch.tensor([ids + [self.pad_id] * (n - len(ids)) for ids in rows])


def load_clip_captions(folder: Path, *, vocab_size: int | None = None) -> CaptionTokenizer:
    """CLIP's caption tokenizer, from a released tokenizer's folder (FLUX's tokenizer).

    vocab_size: rows of the encoder's embedding table. Raises ValueError where files or special tokens are missing, for
    broken files, and for ids beyond the table.
    """
    tokenizer = JsonTokenizer(folder, build=clip_bpe_tokenizer)
    if vocab_size is not None:
        check_vocabulary(tokenizer, vocab_size, folder)
    config = _read_tokenizer_config(folder)
    begin, end, pad = (
        _special_id(tokenizer, config, *name) for name in (("bos", CLIP_BOS), ("eos", CLIP_EOS), ("pad", CLIP_EOS))
    )
    return CaptionTokenizer(
        tokenizer=tokenizer, bos_id=begin, eos_id=end, pad_id=pad, max_length=_max_length(config, CLIP_MAX_LENGTH)
    )


def load_t5_captions(folder: Path, *, vocab_size: int | None = None) -> CaptionTokenizer:
    """T5's caption tokenizer, from a released tokenizer's folder (FLUX's tokenizer_2): tokenizer.json, or
    spiece.model.

    vocab_size: rows of the encoder's embedding table. Raises ValueError where files or special tokens are missing, for
    broken files, and for ids beyond the table.
    """
    tokenizer: JsonTokenizer | SentencePieceTokenizer
    if is_there(folder / "tokenizer.json"):
        tokenizer = JsonTokenizer(folder)
    elif is_there(folder / "spiece.model"):
        tokenizer = SentencePieceTokenizer.from_file(folder / "spiece.model")
    else:
        raise ValueError(f"no tokenizer in {folder}: expected T5's tokenizer.json or spiece.model")
    if vocab_size is not None:
        check_vocabulary(tokenizer, vocab_size, folder)
    config = _read_tokenizer_config(folder)
    end, pad = (_special_id(tokenizer, config, *name) for name in (("eos", "</s>"), ("pad", "<pad>")))
    return CaptionTokenizer(
        tokenizer=tokenizer, bos_id=None, eos_id=end, pad_id=pad, max_length=_max_length(config, T5_MAX_LENGTH)
    )


def _read_tokenizer_config(folder: Path) -> dict[str, Any]:
    return read_token_file(folder / "special_tokens_map.json") | read_token_file(folder / "tokenizer_config.json")


def _max_length(config: dict[str, Any], default: int) -> int:
    length = config.get("model_max_length") or default
    return int(length) if length < LARGEST_MODEL_MAX_LENGTH else default


def _special_id(
    tokenizer: JsonTokenizer | SentencePieceTokenizer, config: dict[str, Any], role: str, default: str
) -> int:
    token = config.get(f"{role}_token") or default
    token = token["content"] if isinstance(token, dict) else token
    found = tokenizer.token_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no {token!r}, its {role}_token: fetch the released files again")
    return found
