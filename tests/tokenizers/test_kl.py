"""The FLUX autoencoder: equal to the original's stored outputs, and its config round trip."""

import json

import pytest
import torch
from helpers.paths import GOLDEN as STORE
from helpers.tolerance import assert_close
from safetensors.torch import load_file

from unimm.tokenizers.kl import AutoencoderKL, AutoencoderKLConfig

GOLDEN = STORE / "bagel" / "dev"
SMALL = {
    "width": 32,
    "channel_multipliers": (1, 2),
    "n_res_blocks": 2,
    "latent_channels": 3,
    "scaling_factor": 0.5,
    "shift_factor": 0.25,
}


@pytest.fixture(scope="module")
def stored():
    return {name[4:]: x for name, x in load_file(GOLDEN / "io.safetensors").items() if name.startswith("vae.")}


@pytest.fixture(scope="module")
def released():
    files = json.loads((GOLDEN / "config.json").read_text())
    vae = AutoencoderKL(AutoencoderKLConfig.from_json(files["vae_config"]))
    vae.load_state_dict(load_file(GOLDEN / "ae.safetensors"))
    return vae.eval().requires_grad_(False)


@pytest.fixture
def small():
    torch.manual_seed(0)
    return AutoencoderKL(AutoencoderKLConfig(**SMALL)).eval().requires_grad_(False)


def test_moments_equal_the_original(released, stored):
    assert_close(torch.cat(released.moments(stored["image"]), 1), stored["moments"])
    # padding reaches the rest of the image through the norms and the attention
    assert_close(torch.cat(released.moments(stored["padded_images"]), 1), stored["padded_moments"])


def test_latents_equal_the_original(released, stored):
    assert_close(released.encode(stored["image"]), stored["latent_mean"])
    assert_close(released.encode(stored["image"], noise=stored["eps"]), stored["latent_sampled"])


def test_pixels_equal_the_original(released, stored):
    assert_close(released.decode(stored["latent_sampled"]), stored["decoded"])


def test_released_size():
    with torch.device("meta"):
        vae = AutoencoderKL(AutoencoderKLConfig())
    assert sum(p.numel() for p in vae.parameters()) == 83_819_683
    assert vae.config.stride == 8
    shapes = {name: tuple(p.shape) for name, p in vae.named_parameters()}
    assert len(shapes) == 244
    assert shapes["encoder.down.1.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert shapes["decoder.up.1.block.0.conv1.weight"] == (256, 512, 3, 3)
    assert shapes["decoder.up.0.block.2.conv2.bias"] == (128,)
    assert shapes["encoder.conv_out.weight"] == (32, 512, 3, 3)


def test_shapes_and_scaling(small):
    image = torch.rand(2, 3, 10, 6) * 2 - 1
    mean, logvar = small.moments(image)
    assert mean.shape == logvar.shape == (2, 3, 5, 3)
    assert_close(small.encode(image), 0.5 * (mean - 0.25))
    noise = torch.randn_like(mean)
    assert_close(small.encode(image, noise=noise), 0.5 * (mean + (0.5 * logvar).exp() * noise - 0.25))
    latent = small.encode(image)
    assert_close(small.decode(latent), small.decoder(mean))
    assert small.decode(latent).shape == image.shape


def test_an_image_does_not_depend_on_its_batch(small):
    image = torch.rand(3, 3, 8, 8) * 2 - 1
    assert_close(small.encode(image)[1:2], small.encode(image[1:2]))


def test_gradients_reach_every_parameter():
    vae = AutoencoderKL(AutoencoderKLConfig(**SMALL))
    mean, logvar = vae.moments(torch.rand(1, 3, 8, 8))
    (vae.decode(mean + logvar).square().mean()).backward()
    assert [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_channels_last_changes_nothing(small):
    image = torch.rand(1, 3, 8, 8)
    assert_close(small.encode(image.to(memory_format=torch.channels_last)), small.encode(image))


def test_config_files_round_trip():
    config = AutoencoderKLConfig(**SMALL)
    files = config.to_json()
    assert json.loads(json.dumps(files)) == files
    assert files["downsample"] == config.stride == 2
    assert AutoencoderKLConfig.from_json(files) == config


def test_missing_keys_are_the_released_numbers():
    assert AutoencoderKLConfig.from_json({"z_channels": 16, "downsample": 8}) == AutoencoderKLConfig()
    assert AutoencoderKLConfig() == AutoencoderKLConfig(
        in_channels=3, out_channels=3, width=128, channel_multipliers=(1, 2, 4, 4), n_res_blocks=2, latent_channels=16,
        scaling_factor=0.3611, shift_factor=0.1159,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"downsample": 16}, "got downsample 16, expected 8 by the rest of"),
        ({"ch": 48}, "width 48, expected a multiple of 32"),
        ({"ch_mult": []}, "one multiplier per level"),
        ({"num_res_blocks": 0}, "got num_res_blocks 0 .*a positive whole number"),
        ({"scale_factor": 0.0}, "scale_factor 0.0 .*expected a positive number"),
    ],
)
def test_wrong_configs(files, words):
    with pytest.raises(ValueError, match=words):
        AutoencoderKLConfig.from_json(files)


@pytest.mark.parametrize("shape", [(1, 3, 9, 8), (1, 3, 8, 9), (1, 1, 8, 8), (3, 8, 8)])
def test_wrong_images(small, shape):
    with pytest.raises(ValueError, match=r"multiples of 2.*resize"):
        small.encode(torch.zeros(shape))


def test_wrong_latents(small):
    with pytest.raises(ValueError, match=r"expected \[B, 3, h, w\]"):
        small.decode(torch.zeros(1, 4, 2, 2))
