"""JanusFlow's convolutional ends: equal to the stored case, the released names, and what a block computes."""

import json

import pytest
import torch
from helpers.paths import GOLDEN
from helpers.tolerance import assert_close
from safetensors.torch import load_file

from unimm.models.janusflow.uvit import (
    ConvNeXtBlock,
    GlobalResponseNorm,
    ShallowUViTDecoder,
    ShallowUViTEncoder,
    UViTConfig,
    UViTDecoderConfig,
    UViTEncoderConfig,
)
from unimm.nn.timestep import timestep_embedding

JANUS = GOLDEN / "janus"
FILES = json.loads((JANUS / "flow_dev" / "config.json").read_text())
PARAMS = {side: FILES[f"vision_gen_{side}_config"]["params"] for side in ("enc", "dec")}


def ends(**changes) -> tuple[ShallowUViTEncoder, ShallowUViTDecoder]:
    encoder = UViTEncoderConfig.from_json(PARAMS["enc"] | changes)
    return ShallowUViTEncoder(encoder), ShallowUViTDecoder(UViTDecoderConfig.from_json(PARAMS["dec"] | changes))


@pytest.fixture(scope="module")
def stored():
    return load_file(JANUS / "flow_dev" / "io.safetensors")


@pytest.fixture(scope="module")
def released():
    weights, both = load_file(JANUS / "flow_dev" / "model.safetensors"), ends()
    for side, module in zip(("enc", "dec"), both, strict=True):
        prefix = f"vision_gen_{side}_model."
        module.load_state_dict({key[len(prefix) :]: x for key, x in weights.items() if key.startswith(prefix)})
    return tuple(module.requires_grad_(False) for module in both)


def test_equal_to_the_original(released, stored):
    encoder, decoder = released
    noise = torch.cat((stored["gen/noise"], stored["gen/noise"]))
    x, time = encoder(noise, torch.zeros(4))
    assert_close(x, stored["gen/enc_out0"])
    tokens = stored["gen/dec_in0"].transpose(1, 2).unflatten(2, x.shape[2:])
    assert_close(decoder(tokens, x, time), stored["gen/velocities"][0])
    steps = len(stored["gen/velocities"])
    assert_close(encoder(noise, torch.full((4,), 1000 / steps))[1], stored["gen/t_emb1"])


def test_released_names_and_shapes():
    manifest = json.loads((JANUS / "janusflow_1_3b.json").read_text())
    with torch.device("meta"):
        both = ShallowUViTEncoder(UViTEncoderConfig()), ShallowUViTDecoder(UViTDecoderConfig())
    for side, module in zip(("enc", "dec"), both, strict=True):
        prefix = f"vision_gen_{side}_model."
        wanted = {key[len(prefix) :]: shape for key, shape in manifest.items() if key.startswith(prefix)}
        assert {name: list(x.shape) for name, x in module.state_dict().items()} == wanted
    assert both[0].config.grid_size(48) == 24


def test_configs_round_trip():
    for config in (ends()[0].config, ends()[1].config, UViTEncoderConfig(n_blocks=0), UViTDecoderConfig(bias=False)):
        assert type(config).from_json(json.loads(json.dumps(config.to_json()))) == config
    assert UViTEncoderConfig.from_json({"kernel_size": 7, "stride": 4, "padding": None}).padding == 3
    assert UViTEncoderConfig.from_json({"use_mid_block": False}).n_blocks == 0
    for params in ({"block_out_channels": [31]}, {"hidden_size": 0}, {"elementwise_affine": False}):
        with pytest.raises(ValueError, match=r"got .*expected"):
            UViTEncoderConfig.from_json(params)


def test_norm_of_responses():
    x, layer = torch.randn(2, 3, 4, 5), GlobalResponseNorm(5)
    assert torch.equal(layer(x), x), "it begins as nothing"
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    length = x.square().sum((1, 2), keepdim=True).sqrt()
    assert_close(layer(x), layer.weight * x * length / length.mean(-1, keepdim=True) + layer.bias + x)


def test_time_scales_the_sum():
    block, x = ConvNeXtBlock(4, UViTConfig(dim=4, time_dim=6)), torch.randn(2, 4, 5, 5)
    time = torch.randn(2, 6)
    torch.nn.init.zeros_(block.cond_embeds_mapper.bias)
    plain = block(x, torch.zeros(2, 6))
    scale, shift = block.cond_embeds_mapper(torch.nn.functional.silu(time)).chunk(2, 1)
    assert_close(block(x, time), plain * (1 + scale[..., None, None]) + shift[..., None, None])


def test_time_features_begin_with_cosines():
    found = timestep_embedding(torch.tensor([0.0, 500.0]), 6)
    assert found[0].tolist() == [1, 1, 1, 0, 0, 0]
    angles = 500 * 10000.0 ** (-torch.arange(3) / 3)
    assert torch.allclose(found[1], torch.cat((angles.cos(), angles.sin())), atol=1e-4)  # float32 of 500 radians


@pytest.mark.parametrize(
    ("changes", "latent", "tokens"),
    [({}, (6, 10), (3, 5)), ({"use_mid_block": False}, (4, 4), (2, 2)), ({"use_bias": False}, (4, 8), (2, 4)),
     ({"kernel_size": 4, "stride": 4, "upsamples": 2}, (8, 16), (2, 4)), ({"layers_in_middle": 1}, (2, 2), (1, 1))],
)  # fmt: skip
def test_other_numbers(changes, latent, tokens):
    encoder, decoder = ends(**changes)
    for module in (encoder, decoder):
        for name, p in module.named_parameters():
            if "channelwise_norm" in name:  # zeros, which would keep gradients from its inputs' norms
                torch.nn.init.normal_(p)
    x, time = encoder(torch.randn(2, 4, *latent), torch.tensor([3.0, 700.0]))
    assert x.shape == (2, 32, *tokens) == (2, 32, *map(encoder.config.grid_size, latent)) and time.shape == (2, 64)
    v = decoder(torch.randn(2, 32, *tokens), x, time)
    assert v.shape == (2, 4, *latent)
    v.square().mean().backward()
    unreached = [name for module in (encoder, decoder) for name, p in module.named_parameters() if p.grad is None]
    assert unreached == [name for name in unreached if "use_mid_block" in changes and "time_embed" in name]
