"""Captions' ids: beside transformers' CLIP and T5 tokenizers, cut, padded, from either kind of file; what is
refused."""

import io
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch

from unimm.tokenizers.captions import CLIP_BOS, CLIP_EOS, load_clip_captions, load_t5_captions

TEXTS = [
    "", "a red circle", "Two  Blue\nSQUARES, it's 2026!", "caf\u00e9 na\u00efve \u4f60\u597d 12345", "don't we'll they'd",
    "  spaces  around  ", "... --- ???", "a " * 40, "e\u0301 and \u00e9",
]  # fmt: skip
WORDS = [
    "a red circle left of a blue square",
    "two green stars, it's a night",
    "don't draw 3 triangles and 12 dots!",
] * 30


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """vocab.json and merges.txt, as FLUX's tokenizer folder holds them, of few merges."""
    folder = tmp_path_factory.mktemp("clip")
    pairs = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>", unk_token=CLIP_EOS))
    pairs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    pairs.train_from_iterator(WORDS, trainer)
    pairs.model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    for token in (*(letter + "</w>" for letter in alphabet), CLIP_BOS, CLIP_EOS):
        vocab.setdefault(token, len(vocab))
    (folder / "vocab.json").write_text(json.dumps(vocab))
    config = {"model_max_length": 24, "bos_token": {"content": CLIP_BOS}, "eos_token": CLIP_EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    """spiece.model of few pieces, with the released one's first ids."""
    folder, out = tmp_path_factory.mktemp("t5"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS), model_writer=out, vocab_size=70, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(out.getvalue())
    return folder


def test_clip_equals_transformers(clip):
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer(vocab=str(clip / "vocab.json"), merges=str(clip / "merges.txt"))
    ours = load_clip_captions(clip)
    assert (
        ours.max_length == 24
        and ours.bos_id == theirs.bos_token_id
        and ours.eos_id == ours.pad_id == theirs.eos_token_id
    )
    for length in (24, 77):
        expected = theirs(
            TEXTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        assert torch.equal(ours(TEXTS, max_length=length), expected)
    assert len(set(ours(TEXTS[1])[0].tolist())) > 4, "merges are found"


def test_clip_of_tokenizer_json(clip, tmp_path):
    """The same ids out of a tokenizer.json, even one that was saved to cut and to pad; another pad where one is
    told."""
    ours = load_clip_captions(clip)
    ours.tokenizer.backend.enable_truncation(3)
    ours.tokenizer.backend.enable_padding(length=5)
    ours.tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "!"}}')
    again = load_clip_captions(tmp_path)
    assert again.max_length == 77 and again.pad_id == again.tokenizer.token_id("!") != again.eos_id
    ours, ids = load_clip_captions(clip), again(TEXTS[:2], max_length=60)
    assert torch.equal(ids.masked_fill(ids == again.pad_id, ours.pad_id), ours(TEXTS[:2], max_length=60))


def test_t5_equals_transformers(t5, tmp_path):
    """spiece.model, and the tokenizer.json that transformers makes of it."""
    from transformers import T5Tokenizer

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(t5 / "spiece.model"))
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.vocab_size())]
    theirs = T5Tokenizer(vocab=vocab, extra_ids=0)
    theirs.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    shutil.copy(t5 / "spiece.model", tmp_path)
    for folder in (t5, tmp_path):
        ours = load_t5_captions(folder)
        assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.max_length) == (None, 1, 0, 512)
        texts = TEXTS[:-1]  # a letter and its accent apart become one by a table that theirs was not given
        expected = theirs(texts, padding="max_length", max_length=20, truncation=True, return_tensors="pt").input_ids
        assert torch.equal(ours(texts, max_length=20), expected)
        assert ours(TEXTS[0]).tolist() == [[1] + [0] * 511]


def test_markers_stay_text(clip, t5):
    """What a user types is words: no id of it begins or ends a caption."""
    ours = load_clip_captions(clip)
    ids = ours(f"a {CLIP_EOS} b {CLIP_BOS}", max_length=60)[0].tolist()
    first = ids.index(ours.eos_id)
    assert ids[0] == ours.bos_id and ids.count(ours.bos_id) == 1 and set(ids[first:]) == {ours.pad_id} and first > 10
    ids = load_t5_captions(t5)("a </s> b", max_length=30)[0].tolist()
    assert ids.index(1) > 4 and ids.count(1) == 1


def test_a_caption_is_cut_before_its_end(clip, t5):
    for captions in (load_clip_captions(clip), load_t5_captions(t5)):
        ids = captions("red " * 90, max_length=9)
        assert ids.shape == (1, 9) and ids[0, -1] == captions.eos_id and (ids == captions.eos_id).sum() == 1
        assert torch.equal(captions(["red " * 90, "a"], max_length=9)[:1], ids)


def test_what_is_refused(tmp_path, clip, t5):
    with pytest.raises(ValueError, match=r"no vocab\.json and no merges\.txt in .*expected those of CLIP's tokenizer"):
        load_clip_captions(tmp_path)
    with pytest.raises(ValueError, match=r"no tokenizer in .*tokenizer\.json or spiece\.model"):
        load_t5_captions(tmp_path)
    with pytest.raises(ValueError, match="got 1 captions of length 2: expected one or more, of 3 ids"):
        load_clip_captions(clip)("a", max_length=2)
    with pytest.raises(ValueError, match="got 0 captions"):
        load_t5_captions(t5)([])
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(clip / name, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(ValueError, match="has no '<end>', its eos_token"):
        load_clip_captions(tmp_path)
