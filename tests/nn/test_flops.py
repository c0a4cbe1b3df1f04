"""FLOPs of a step: six a parameter and token, attention by the pairs of its mask, frozen parts without gradients."""

import pytest
from torch import nn

from unimm.kernels import AttentionMask, KeyRange
from unimm.nn.decoder import Decoder, DecoderConfig
from unimm.nn.flops import StepFlops, decoder_flops, head_flops

CONFIG = DecoderConfig(
    dim=16, n_layers=2, n_heads=4, n_kv_heads=2, mlp_dim=24, vocab_size=40, max_positions=64, rope_theta=1e4, norm_eps=1e-6,
    act="silu", qkv_bias=True, qk_norm=True, experts=("und", "gen"),
)  # fmt: skip
# of one expert's block: queries and output, keys and values, the gated feed-forward
MATRICES = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24


def counted(decoder, rows, pairs, **options) -> StepFlops:
    count = StepFlops()
    carries = dict.fromkeys(rows, decoder.embed.weight.requires_grad)
    decoder_flops(count, decoder, rows, pairs, carries, **options)
    return count


def test_a_decoder_takes_six_a_parameter_and_token_and_twelve_a_pair_and_channel():
    """The estimate of Chowdhery et al. 2022, appendix B, which has pairs for each token."""
    decoder = Decoder(CONFIG)
    mask = AttentionMask([[KeyRange(5), KeyRange(4, full=True, visible=False), KeyRange(3)]])
    pairs = int(mask.dense().sum())
    count = counted(decoder, {"und": 8, "gen": 4}, mask.spans.n_visible_pairs)
    assert count.total == 6 * 12 * MATRICES * 2 + 12 * pairs * 16 * 2
    assert count.backward == 2 * count.forward
    head_flops(count, decoder, 3, True)
    assert count.total == 6 * 12 * MATRICES * 2 + 12 * pairs * 16 * 2 + 6 * 3 * 40 * 16


def test_frozen_weights_have_no_gradients_and_neither_has_what_lies_below_all_trained_ones():
    decoder = Decoder(CONFIG).requires_grad_(False)
    frozen = counted(decoder, {"und": 8}, 36)
    assert frozen.backward == 0
    decoder.blocks[1].requires_grad_(True)
    upper = counted(decoder, {"und": 8}, 36)
    assert (upper.forward, upper.backward) == (frozen.forward, 2 * (frozen.forward / 2))
    # a frozen block above what is trained passes gradients on: a product a matrix, and all those of attention
    decoder.embed.requires_grad_(True)
    lower = counted(decoder, {"und": 8}, 36)
    assert lower.backward - upper.backward == 2 * 8 * MATRICES + 8 * 36 * 16


def test_adapters_train_beside_frozen_weights():
    """A product more than the gradient of the rows, for each of two thin matrices."""

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(16, 16).requires_grad_(False)
            self.down = nn.Linear(16, 2, bias=False)
            self.up = nn.Linear(2, 16, bias=False)

    count = StepFlops()
    assert count.chain(10, False, Adapted())
    assert count.forward == 2 * 10 * (256 + 32 + 32)
    assert count.backward == 2 * 10 * (32 + 2 * 32)


@pytest.mark.parametrize(("q", "k", "v", "products"), [(1, 1, 1, 4), (0, 0, 1, 1), (1, 0, 0, 2), (0, 0, 0, 0)])
def test_attention_does_the_products_that_gradients_need(q, k, v, products):
    count = StepFlops()
    assert count.attention(7, 2, 4, q=bool(q), k=bool(k), v=bool(v)) == bool(products)
    assert (count.forward, count.backward) == (2 * 2 * 7 * 8, products * 2 * 7 * 8)
