"""The autoencoder in FLUX's layout and in diffusers': stored outputs, released key lists, and diffusers itself."""

import json
from pathlib import Path

import pytest
import torch
from helpers.cases import found, manifest
from helpers.tolerance import assert_close
from safetensors.torch import load_file, save_file

from unimm.checkpoint.load import CheckpointError, check_keys
from unimm.checkpoint.save import released_state_dict, released_tensors
from unimm.tokenizers.kl import AutoencoderKL, AutoencoderKLConfig
from unimm.tokenizers.kl_layouts import (
    ATTENTION_NAMES,
    FLUX_KEY_MAP,
    LEGACY_ATTENTION_NAMES,
    kl_diffusers_key_map,
)

SMALL = {
    "width": 32,
    "channel_multipliers": (1, 2, 2),
    "n_res_blocks": 1,
    "latent_channels": 4,
    "scaling_factor": 0.13025,
    "shift_factor": 0.0,
}
SDXL = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.18.0.dev0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}


def small(**numbers) -> AutoencoderKL:
    return AutoencoderKL(AutoencoderKLConfig(**SMALL | numbers)).eval().requires_grad_(False)


def write(folder: Path, vae: AutoencoderKL, *, attention=ATTENTION_NAMES) -> Path:
    """A folder in diffusers' layout."""
    (folder / "config.json").write_text(json.dumps(vae.config.to_diffusers()))
    state = released_state_dict(
        vae, kl_diffusers_key_map(vae.config.widths, quant_convs=vae.config.quant_convs, attention=attention)
    )
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    return folder


@torch.inference_mode()
def test_stored_outputs():
    case = found("blocks/fluxvae/dev")
    vae, stored = AutoencoderKL.from_pretrained(case), load_file(case / "io.safetensors")
    assert_close(torch.cat(vae.moments(stored["image"]), 1), stored["moments"])
    assert_close(vae.encode(stored["image"]), stored["latent"])
    assert_close(vae.encode(stored["image"], noise=stored["posterior_noise"]), stored["latent_sampled"])
    assert_close(vae.decode(stored["z"]), stored["decoded"])


def test_sdxl_has_its_released_size():
    config = AutoencoderKLConfig.from_diffusers(SDXL)
    assert config == AutoencoderKLConfig(latent_channels=4, scaling_factor=0.13025, shift_factor=0.0, quant_convs=True)
    with torch.device("meta"):
        vae = AutoencoderKL(config)
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    key_map = kl_diffusers_key_map(config.widths, quant_convs=config.quant_convs)
    shapes = {key: tuple(x.shape) for key, x in released_tensors(vae, key_map).items()}
    assert len(shapes) == 248
    assert shapes["quant_conv.weight"] == (8, 8, 1, 1) and shapes["post_quant_conv.bias"] == (4,)
    assert shapes["decoder.up_blocks.2.resnets.0.conv_shortcut.weight"] == (256, 512, 1, 1)
    assert shapes["decoder.up_blocks.3.resnets.0.conv1.weight"] == (128, 256, 3, 3)
    assert shapes["encoder.mid_block.attentions.0.to_out.0.weight"] == (512, 512)
    assert len(check_keys(shapes, key_map, vae.state_dict(), "here")) == 248


@pytest.mark.parametrize(
    ("name", "key_map"),
    [
        ("flux_vae_bfl", FLUX_KEY_MAP),
        ("flux_vae_diffusers", kl_diffusers_key_map(AutoencoderKLConfig().widths, quant_convs=False)),
    ],
)
def test_flux_manifest_fits(name, key_map):
    """Both layouts hold the same autoencoder: what is read, and what is written."""
    shapes = manifest(name)
    with torch.device("meta"):
        vae = AutoencoderKL(AutoencoderKLConfig())
    assert len(check_keys(shapes, key_map, vae.state_dict(), "here")) == len(shapes) == 244
    assert {key: tuple(x.shape) for key, x in released_tensors(vae, key_map).items()} == shapes


@pytest.mark.parametrize("quant_convs", [True, False])
@pytest.mark.parametrize("widths", [(32, 64, 64), (32, 32), (64,)])
@torch.inference_mode()
def test_equal_to_diffusers(tmp_path, quant_convs, widths):
    from diffusers import AutoencoderKL as DiffusersAutoencoderKL

    theirs = DiffusersAutoencoderKL(
        block_out_channels=widths, layers_per_block=2, latent_channels=3, scaling_factor=0.3, use_quant_conv=quant_convs,
        use_post_quant_conv=quant_convs, down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    ours, image = AutoencoderKL.from_pretrained(tmp_path), torch.rand(2, 3, 16, 24) * 2 - 1
    assert ours.config.quant_convs == quant_convs and ours.config.shift_factor == 0
    latent = theirs.encode(image).latent_dist.mean * 0.3
    assert_close(ours.encode(image), latent)
    assert_close(ours.decode(latent), theirs.decode(latent / 0.3).sample)
    # and what we write, diffusers reads
    again = DiffusersAutoencoderKL.from_pretrained(write(tmp_path, ours))
    assert all(torch.equal(x, theirs.state_dict()[key]) for key, x in again.state_dict().items())


@pytest.mark.parametrize("quant_convs", [True, False])
@torch.inference_mode()
def test_round_trips(tmp_path, quant_convs):
    vae, image = small(quant_convs=quant_convs), torch.rand(1, 3, 16, 16)
    config = vae.config
    assert AutoencoderKLConfig.from_diffusers(json.loads(json.dumps(config.to_diffusers()))) == config
    assert AutoencoderKLConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    for attention in (ATTENTION_NAMES, LEGACY_ATTENTION_NAMES):
        assert torch.equal(
            AutoencoderKL.from_pretrained(write(tmp_path, vae, attention=attention)).encode(image), vae.encode(image)
        )
    flux = tmp_path / "flux"
    flux.mkdir()
    (flux / "vae_config.json").write_text(json.dumps(config.to_json()))
    save_file(vae.state_dict(), flux / "ae.safetensors")
    assert torch.equal(AutoencoderKL.from_pretrained(flux).encode(image), vae.encode(image))


@torch.inference_mode()
def test_quant_convs_act_on_both_sides():
    vae, image = small(quant_convs=True), torch.rand(1, 3, 8, 8)
    mean, logvar = vae.moments(image)
    assert_close(torch.cat((mean, logvar), 1), vae.quant_conv(vae.encoder(image)))
    assert_close(vae.decode(mean * vae.config.scaling_factor), vae.decoder(vae.post_quant_conv(mean)))


def test_load_casts(tmp_path):
    vae = AutoencoderKL.from_pretrained(write(tmp_path, small()), dtype=torch.bfloat16)
    assert {p.dtype for p in vae.parameters()} == {torch.bfloat16} and not vae.training


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"_class_name": "AutoencoderDC"}, "got _class_name 'AutoencoderDC', expected 'AutoencoderKL'"),
        ({"norm_num_groups": 16}, "got norm_num_groups 16, expected 32"),
        ({"mid_block_add_attention": False}, "expected True"),
        ({"latents_mean": [0.0] * 4}, "expected None"),
        ({"block_out_channels": [64, 96]}, "multiples of the first width"),
        ({"use_quant_conv": False}, "both convolutions or none"),
    ],
)
def test_wrong_configs(files, words):
    with pytest.raises(ValueError, match=words):
        AutoencoderKLConfig.from_diffusers(SDXL | files)


def test_wrong_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"no weights in .*expected .*ae\.safetensors"):
        AutoencoderKL.from_pretrained(tmp_path)
    write(tmp_path, small())
    files = small(quant_convs=True).config.to_diffusers()
    (tmp_path / "config.json").write_text(json.dumps(files))
    with pytest.raises(CheckpointError, match=r"missing keys: post_quant_conv\.bias"):
        AutoencoderKL.from_pretrained(tmp_path)
