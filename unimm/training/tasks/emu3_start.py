"""What training Emu3 begins with: an untrained model around a trained vision tokenizer, and a text tokenizer."""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path

import tokenizers
import torch
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizerSequence
from tokenizers.trainers import BpeTrainer

from unimm.checkpoint.json_files import read_json
from unimm.data.shapes import tokenizer_corpus
from unimm.models.emu3.config import DROPOUT_KEY, Emu3Config
from unimm.models.emu3.model import Emu3
from unimm.models.emu3.text_tokenizer import (
    RANKS_FILE,
    SPECIAL_TOKENS,
    VISION_TOKENS_FILE,
    Emu3SpecialTokens,
    byte_letters,
    load_emu3_tokenizer,
)
from unimm.models.emu3.transformers_layout import VISUAL_TOKEN
from unimm.tokenizers.text import QWEN2_SPLIT_PATTERN, JsonTokenizer
from unimm.training.config import TrainConfig, require
from unimm.training.init import init_decoder, load_trained, trained_file

N_BYTES = 256


def init_emu3(recipe: TrainConfig, *, vq: str, n_ranks: int) -> Emu3:
    """An untrained model of the recipe's numbers. vq: the folder of a trained vision tokenizer. n_ranks: of the text
    tokenizer, which is trained on the texts of the shapes world."""
    require(recipe.model, "language.hidden_size", "images.", "generation.", "image_area")
    weights = trained_file(vq, "model.safetensors", "emu3-nano-vq")
    vision = read_json(weights.parent / "config.json", required=True)
    tokenizer = train_emu3_tokenizer(n_ranks, n_codes=vision["codebook_size"])
    ids = {f"{name}_token_id": tokenizer.token_id(token) for name, token in Emu3SpecialTokens.TOKENS.items()}
    files = {
        # small models are far from learning their data by heart; the original's is 0.1
        DROPOUT_KEY: 0.0,
        **recipe.model["language"],
        **ids,
        "vocab_size": tokenizer.largest_token[1] + 1,
        "image_area": recipe.model["image_area"],
        "generation": recipe.model["generation"],
        "vision_tokenizer": vision,
    }
    torch.manual_seed(recipe.seed)
    model = Emu3(Emu3Config.from_json(files, recipe.model["images"]))
    init_decoder(model.decoder)
    load_trained(model.vision_tokenizer, weights)
    init_codes(model)
    model.tokenizer = tokenizer
    return model


@torch.no_grad()
def init_codes(model: Emu3) -> None:
    """Let codes whose vectors are near each other begin with near embeddings, and with near rows of the head."""
    vectors = model.vision_tokenizer.quantize.embedding.weight
    spread = (vectors - vectors.mean(0)) / vectors.std()
    code0 = model.config.special_tokens.code0
    embeddings = model.decoder.embed.weight[code0 : code0 + len(vectors)]
    for rows in (embeddings, model.decoder.get_parameter("head.visual.weight")):
        projection = torch.randn(vectors.shape[1], rows.shape[1]) * vectors.shape[1] ** -0.5
        rows[: len(vectors)] = rows.std() * spread @ projection


def train_emu3_tokenizer(n_ranks: int, *, n_codes: int, lines: int = 20_000) -> JsonTokenizer:
    """A byte-level tokenizer of the shapes world's texts, in the files of the original.

    Raises ValueError for fewer ranks than there are bytes, and for more than the texts have pairs.
    """
    if n_ranks < N_BYTES:
        raise ValueError(f"got n_ranks {n_ranks}: expected at least {N_BYTES}, one for each byte")
    backend = tokenizers.Tokenizer(BPE())
    backend.normalizer = NFC()
    backend.pre_tokenizer = PreTokenizerSequence(
        [Split(tokenizers.Regex(QWEN2_SPLIT_PATTERN), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = BpeTrainer(vocab_size=n_ranks, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(tokenizer_corpus(lines), trainer)
    if (n := backend.get_vocab_size()) != n_ranks:
        raise ValueError(f"got n_ranks {n_ranks}: expected at most {n}, as many as the texts have pairs and bytes")
    of_letters = {letter: byte for byte, letter in byte_letters().items()}
    ranks = sorted(backend.get_vocab().items(), key=lambda entry: entry[1])
    encoded = [base64.b64encode(bytes(of_letters[letter] for letter in token)).decode() for token, _ in ranks]
    vision = ["<|image token|>", "<|image start|>", "<|image end|>", *map(VISUAL_TOKEN.format, range(n_codes))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / RANKS_FILE).write_text("".join(f"{token} {rank}\n" for rank, token in enumerate(encoded)))
        (folder / VISION_TOKENS_FILE).write_text("\n".join(vision))
        tokenizer = load_emu3_tokenizer(folder, vocab_size=n_ranks + len(SPECIAL_TOKENS) + len(vision))
    assert tokenizer is not None, "both files were just written"
    return tokenizer
