"""Sampling of text tokens, the stream of texts, and the KV buffer."""

import itertools

import pytest
import torch

from unimm.generation.decode import TextStream, sampling_loop
from unimm.generation.kv_cache import KVBuffer, KVCache
from unimm.generation.text_sampling import TextSampling, sample_token


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_greedy_takes_the_largest():
    assert sample_token(torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), TextSampling(), generators(0, 0)) == [1, 0]


def test_temperature_and_top_p():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    draws = [sample_token(logits, TextSampling(temperature=1.0), generators(seed))[0] for seed in range(2000)]
    shares = torch.bincount(torch.tensor(draws), minlength=4) / 2000
    torch.testing.assert_close(shares, logits[0].softmax(0), rtol=0, atol=0.04)
    # 0.64 of the mass lies on the first id: 0.6 keeps it alone, 0.7 the first two
    assert {sample_token(logits, TextSampling(temperature=1.0, top_p=0.6), generators(s))[0] for s in range(200)} == {0}
    assert {sample_token(logits, TextSampling(temperature=1.0, top_p=0.7), generators(s))[0] for s in range(200)} == {
        0,
        1,
    }
    assert {sample_token(logits, TextSampling(temperature=0.05), generators(s))[0] for s in range(200)} == {0}


def test_a_row_does_not_depend_on_the_others():
    logits = torch.randn(3, 50)
    sampling = TextSampling(temperature=1.0)
    together = sample_token(logits, sampling, generators(4, 5, 6))
    assert together == [sample_token(logits[i : i + 1], sampling, generators(4 + i))[0] for i in range(3)]


@pytest.mark.parametrize("options", [dict(temperature=-1.0), dict(top_p=0.0), dict(top_p=1.1), dict(max_tokens=0)])
def test_sampling_refuses(options):
    with pytest.raises(ValueError, match="expected"):
        TextSampling(**options)


def script(rows):
    """A step whose likeliest ids are those of `rows`, one list a row."""
    calls = itertools.count()

    def step(ids):
        n = next(calls)
        logits = torch.zeros(len(rows), 20)
        for i, row in enumerate(rows):
            logits[i, row[min(n, len(row) - 1)]] = 1
        return logits

    return step


def test_decode_ends_row_by_row():
    steps = list(
        sampling_loop(script([[3, 4, 9], [5, 9, 7]]), [1, 1], end=9, sampling=TextSampling(max_tokens=8), seeds=[0, 0])
    )
    assert steps == [[3, 5], [4, None]]
    long = list(sampling_loop(script([[3]]), [1], end=9, sampling=TextSampling(max_tokens=4), seeds=[0]))
    assert long == [[3]] * 4


def stream(ids, stop=(), text="hé wörld ab stop cd"):
    data = text.encode()
    return TextStream(iter([[i] for i in ids]), lambda some: data[: len(some)].decode(errors="replace"), 1, stop)


def test_pieces_hold_back_half_characters_and_half_stops():
    text = "hé wörld ab stop cd"
    n = len(text.encode())
    pieces = list(stream(range(n)).pieces())
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces) and len(pieces) > 5
    pieces = list(stream(range(n), stop=("stop",)).pieces())
    assert "".join(pieces) == "hé wörld ab "
    assert stream(range(n), stop=("stop", "ab")).texts() == ["hé wörld "]


def test_a_buffer_keeps_its_caches_apart():
    def chunk(n, value):
        return torch.full((2, 2, n, 1, 4), float(value))

    a, b = KVCache().appended(chunk(3, 1), 3), KVCache().appended(chunk(1, 2), 1).appended(chunk(1, 3), 2)
    buffer = KVBuffer([a, b], [2, 1], empty=torch.empty(2, 2, 0, 1, 4))
    assert buffer.buffer[0, 0, :, 0, 0].tolist() == [1, 1, 1, 0, 0, 2, 3, 0]
    prefix = buffer.prefix(1)
    assert (prefix.length, prefix.next_position, prefix.buffer_start) == (2, 2, 5)
    assert buffer.prefix(0, n_written=1).length == 4
    assert b.length == 2 and KVCache().length == 0
