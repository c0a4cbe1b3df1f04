"""Compiled parts and recorded steps: equal to plain ones, once for prompts of all lengths, copied with their models.

CUDA graphs are recorded on a GPU alone. Here a tracer records in their place: it, too, launches again what a step
launched, on the tensors that it launched it with, and whatever Python decides in a step is decided once.
"""

import copy
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import unimm
from unimm.generation import decode, kv_cache
from unimm.generation.kv_cache import KVCache
from unimm.generation.step_cache import TeaCache
from unimm.generation.step_graphs import use_step_graphs
from unimm.nn.block_stream import BlockStream
from unimm.nn.compiled import compile_experts
from unimm.nn.decoder import Decoder, DecoderConfig, ExpertWeights

NANOS = ("bagel-nano", "janus-nano", "janusflow-nano", "metaquery-nano", "uniworld-nano")
PROMPTS = ("a red circle", "two blue squares", "a green star left of a yellow ring above a purple circle")


TOY = DecoderConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, mlp_dim=48, vocab_size=20, max_positions=64, rope_theta=1e4,
    norm_eps=1e-6, act="silu", qkv_bias=True, qk_norm=True, experts=("text",),
)  # fmt: skip
# tracing takes seconds for each family: these by day, the others by night
BY_DAY = ("bagel-nano",)
each_family = [pytest.param(name, marks=[] if name in BY_DAY else [pytest.mark.nightly]) for name in NANOS]


class CountingBackend:
    """Compiles nothing, and counts the graphs that it is given."""

    def __init__(self):
        self.n = 0

    def __call__(self, module, inputs):
        self.n += 1
        return module.forward


def draw(model, prompt, name, **options):
    steps = {} if name == "janus-nano" else {"steps": 2}
    return np.asarray(model.generate(prompt, seed=3, **steps, **options).image, int)


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", each_family)
def test_prompts_of_other_lengths_need_no_new_graph(name):
    backend = CountingBackend()
    model = unimm.load(name)
    plain = draw(model, PROMPTS[1], name)
    model.compile(backend=backend)
    draw(model, PROMPTS[0], name)
    before = backend.n
    assert before > 0
    assert np.abs(draw(model, PROMPTS[1], name) - plain).max() <= 1
    draw(model, PROMPTS[2], name)
    assert backend.n == before


# of FLUX's rotations, whose real and imaginary parts are views of one tensor
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
@pytest.mark.nightly
@pytest.mark.parametrize("name", NANOS)
def test_compiled_models_draw_what_plain_ones_do(name):
    """By inductor, to within rounding."""
    model = unimm.load(name)
    plain = draw(model, PROMPTS[0], name)
    model.compile()
    assert np.abs(draw(model, PROMPTS[0], name) - plain).max() <= 1


def test_a_copy_of_compiled_layers_computes_with_its_own_weights():
    expert = ExpertWeights(TOY).requires_grad_(False)
    compile_experts(nn.ModuleList([expert]), backend=CountingBackend())
    copied = copy.deepcopy(expert)
    copied.out_proj.weight.zero_()
    copied.mlp.down.weight.zero_()
    x = torch.randn(3, TOY.dim)
    y = torch.randn(3, TOY.n_heads, TOY.head_dim)
    assert torch.equal(copied.output_and_mlp(x, y), x) and not torch.allclose(expert.output_and_mlp(x, y), x)
    assert expert.state_dict().keys() == ExpertWeights(TOY).state_dict().keys()


def test_a_model_whose_blocks_are_streamed_is_refused():
    model = unimm.load("bagel-nano")
    model.block_stream = BlockStream(model, model.QUANTIZED, torch.device("cpu"))
    with pytest.raises(ValueError, match="weights are on its device"):
        model.compile()


def record_by_tracing(function, inputs):
    """Stands for `capture`."""

    def step(*given):  # a bound method would count `self` among its arguments
        return function(*given)

    graph = make_fx(step)(*inputs)
    output = graph(*inputs)
    return lambda: output.copy_(graph(*inputs)), output


@pytest.fixture
def recording():
    """How often steps were recorded."""
    with patch("unimm.generation.step_graphs.capture", side_effect=record_by_tracing) as capture:
        yield capture


@pytest.mark.parametrize("name", [one for one in each_family if one.values != ("janus-nano",)])
def test_recorded_steps_of_denoising_draw_what_plain_ones_do(name, recording):
    """Guided, two images at a time, one recording for all steps, but for BAGEL's two kinds of them."""
    model = unimm.load(name)
    own = {
        "bagel-nano": {"guidance": unimm.Guidance(text_scale=2.0, interval=(0.6, 1.0))},
        "uniworld-nano": {"true_cfg_scale": 2.0},
    }
    options = {"seed": 3, "steps": 5, **own.get(name, {"guidance": 2.0})}
    plain = model.generate(PROMPTS[:2], **options).images
    use_step_graphs(model)
    recorded = model.generate(PROMPTS[:2], **options).images
    assert recording.call_count == (2 if name == "bagel-nano" else 1)
    for a, b in zip(plain, recorded, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1
    # which decides anew at every step
    model.generate(PROMPTS[0], step_cache=TeaCache(), **options)
    assert recording.call_count == (2 if name == "bagel-nano" else 1)


def decode_kernel(q, k, v, mask, *, by_sample=False):
    """What the kernel of decoding computes: of the mask it reads the two tensors alone."""
    starts, lengths = mask.decode_ranges
    rows = torch.arange(len(k))
    seen = (rows >= starts[:, None]) & (rows < (starts + lengths)[:, None])
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = torch.einsum("bhk, mhk -> bhm", q, k) * q.shape[2] ** -0.5
    return torch.einsum("bhm, mhk -> bhk", scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1), v)


@torch.inference_mode()
def test_recorded_steps_of_decoding_are_plain_ones(recording):
    """Of two sequences of other lengths, one recording for all lengths; on a CPU lengths are Python's: nothing is."""
    torch.manual_seed(0)
    decoder = Decoder(TOY)
    caches = [KVCache((torch.randn(2, 2, n, 2, 8),), n) for n in (3, 5)]
    ids = torch.randint(0, 20, (6, 2))
    session = decode.DecodeSession(decoder, caches, 6)
    plain = [session.step(one) for one in ids]
    use_step_graphs(decoder)
    assert not decode.DecodeSession(decoder, caches, 6).graphs.is_on
    with (
        patch.object(decode, "resolve_backend", return_value="triton"),
        patch.object(kv_cache, "attention", decode_kernel),
    ):
        session = decode.DecodeSession(decoder, caches, 6)
        recorded = [session.step(one) for one in ids]
    assert recording.call_count == 1
    torch.testing.assert_close(torch.stack(recorded), torch.stack(plain))
    with pytest.raises(ValueError, match="is full"):
        session.step(ids[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NANOS)
def test_graphs_on_a_gpu(name):
    """The real recording: images and texts of compiled and recorded models are plain ones' but for rounding."""
    model = unimm.load(name, device="cuda")
    plain = draw(model, PROMPTS[0], name)
    answer = model.understand(None, "what is a circle?")
    model.compile()
    for _ in range(2):
        assert np.abs(draw(model, PROMPTS[0], name) - plain).max() <= 2
    assert model.understand(None, "what is a circle?") == answer
