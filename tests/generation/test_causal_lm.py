"""Prefill and decode_step of a small language model: cached equals uncached, batched equals alone."""

import pytest
import torch

from unimm.generation.causal_lm import CausalLM
from unimm.generation.decode import decode_text
from unimm.generation.kv_cache import EMPTY_CACHE
from unimm.generation.text_sampling import TextSampling
from unimm.kernels import attention
from unimm.nn.decoder import Decoder, DecoderConfig
from unimm.sequence.packing import pack_sequences
from unimm.sequence.parts import position_gap, text_part

CONFIG = DecoderConfig(
    dim=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    mlp_dim=48,
    vocab_size=50,
    max_positions=20,
    rope_theta=1e4,
    norm_eps=1e-6,
    act="silu",
    qkv_bias=False,
    qk_norm=True,
    experts=("all",),
)


class ToyLM(CausalLM):
    """A decoder that reads texts alone."""

    def __init__(self):
        super().__init__()
        self.decoder = Decoder(CONFIG)

    def backbone(self, batch, attend):
        rows = {"all": torch.arange(len(batch.ids))}
        return self.decoder(self.decoder.embed(batch.ids), batch.layout.position_ids, rows, attend)

    @torch.inference_mode()
    def logits(self, ids):
        """Without a cache [n, V]."""
        batch = pack_sequences([[text_part(ids)]])
        hidden = self.backbone(batch, lambda layer, q, k, v: attention(q, k, v, batch.layout.mask))["all"]
        return self.decoder.logits(hidden)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ToyLM()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_prefill_in_two_parts_is_prefill_at_once(model):
    (first,) = model.prefill([EMPTY_CACHE], [[text_part([3, 4, 5])]])
    second, other = model.prefill([first, EMPTY_CACHE], [[text_part([6, 7])], [text_part([8])]])
    (whole,) = model.prefill([EMPTY_CACHE], [[text_part([3, 4, 5, 6, 7])]])
    close(torch.cat(second.chunks, 2), whole.chunks[0])
    assert (first.length, second.length, other.length, second.next_position) == (3, 5, 1, 5)
    assert second.chunks[0] is first.chunks[0]


def test_prefill_of_no_rows_is_no_forward(model):
    (cache,) = model.prefill([EMPTY_CACHE], [[text_part([3])]])
    assert model.prefill([cache], [[position_gap(2)]]) == [cache]


def test_decode_steps_are_the_uncached_logits(model):
    prompts = [[3, 4, 5], [6]]
    session = model.decode_session(model.prefill([EMPTY_CACHE] * 2, [[text_part(ids)] for ids in prompts]), 3)
    new = torch.tensor([[7, 8, 9], [10, 11, 12]])
    found = torch.stack([model.decode_step(session, ids) for ids in new.T], 1)
    for row, ids, more in zip(found, prompts, new.tolist(), strict=True):
        close(row, model.logits([*ids, *more])[-3:])
    with pytest.raises(ValueError, match="holds 3 new rows of each sequence and is full"):
        model.decode_step(session, new[:, 0])


def test_decoded_text_is_the_likeliest(model):
    caches = model.prefill([EMPTY_CACHE], [[text_part([3, 4])]])
    sampling = TextSampling(max_tokens=4)
    ids = [one for (one,) in decode_text(model.decode_session(caches, 4), [5], end=-1, sampling=sampling, seeds=[0])]
    assert ids == model.logits([3, 4, 5, *ids[:-1]])[2:].argmax(-1).tolist() and len(ids) == 4


def test_positions_end(model):
    with pytest.raises(ValueError, match="would reach position 21, the model knows 20"):
        model.prefill([EMPTY_CACHE], [[text_part([1] * 21)]])
    caches = model.prefill([EMPTY_CACHE], [[text_part([1] * 18)]])
    with pytest.raises(ValueError, match="would reach position 21, the model knows 20"):
        model.decode_session(caches, 3)
