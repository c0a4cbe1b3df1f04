"""DC-AE: the released names, diffusers' own, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from helpers.dc_ae_toys import FILES, RELEASED
from helpers.paths import GOLDEN as STORE
from helpers.tolerance import assert_close
from safetensors.torch import save_file

from unimm.checkpoint.load import CheckpointError, check_keys
from unimm.checkpoint.save import released_state_dict
from unimm.nn.linear_attention import linear_attention
from unimm.tokenizers.dc_ae import DCAE, DCAEConfig, DCAELevel, dc_ae_key_map

GOLDEN = STORE / "blocks"
CONVOLUTIONS, ATTENTION = "ResBlock", "EfficientViTBlock"


def three(**changes):
    """A config of three levels."""
    files = {name: value for name, value in FILES.items() if not name.startswith(("encoder_", "decoder_"))}
    for side, widths in (("encoder", [4, 8, 8]), ("decoder", [8, 16, 32])):
        files |= {f"{side}_block_out_channels": widths, f"{side}_layers_per_block": [1, 2, 1]}
        files |= {
            f"{side}_block_types": [CONVOLUTIONS, ATTENTION, ATTENTION],
            f"{side}_qkv_multiscales": [[], [3, 5], []],
        }
    return files | {"attention_head_dim": 4, "latent_channels": 4, "scaling_factor": 0.3} | changes


PLAIN = {f"{side}_block_types": [CONVOLUTIONS] * 3 for side in ("encoder", "decoder")} | {
    f"{side}_qkv_multiscales": [[], [], []] for side in ("encoder", "decoder")
}


@pytest.fixture
def small():
    torch.manual_seed(0)
    return DCAE(DCAEConfig.from_json(three())).eval().requires_grad_(False)


def write(folder: Path, model: DCAE) -> Path:
    """A folder in the released layout."""
    (folder / "config.json").write_text(json.dumps(model.config.to_json()))
    save_file(released_state_dict(model, dc_ae_key_map(model.config)), folder / "diffusion_pytorch_model.safetensors")
    return folder


def test_manifest_fits_the_released_model():
    manifest = json.loads((GOLDEN / "manifests.json").read_text())["dcae_f32c32_sana"]
    shapes = {key: tuple(shape) for key, shape in manifest.items()}
    with torch.device("meta"):
        model = DCAE(DCAEConfig.from_json(RELEASED))
    assert sum(p.numel() for p in model.parameters()) == 312_250_275 and len(shapes) == 375
    assert model.config.stride == 32
    state, table = model.state_dict(), dc_ae_key_map(model.config)
    assert {name for one in check_keys(shapes, table, state, "here").values() for name in one.our_names} == set(state)
    lost = "encoder.down_blocks.4.1.attn.to_v.weight"
    with pytest.raises(CheckpointError, match=f"missing keys: {lost}"):
        check_keys({key: shape for key, shape in shapes.items() if key != lost}, table, state, "here")


@pytest.mark.parametrize("files", [FILES, three(), three(**PLAIN)], ids=["golden", "three levels", "convolutions"])
@torch.inference_mode()
def test_equal_to_diffusers(tmp_path, files):
    from diffusers import AutoencoderDC

    torch.manual_seed(1)
    theirs = AutoencoderDC.from_config(files).eval()
    for p in theirs.parameters():
        p.add_(0.05 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    ours = DCAE.from_pretrained(tmp_path)
    image = torch.rand(2, 3, 3 * ours.config.stride, 2 * ours.config.stride) * 2 - 1
    latent = theirs.encode(image).latent
    assert_close(ours.encode(image), ours.config.scaling_factor * latent)
    assert_close(ours.decode(ours.config.scaling_factor * latent), theirs.decode(latent).sample)
    # and what we write, diffusers reads
    again = AutoencoderDC.from_pretrained(write(tmp_path, ours))
    assert all(torch.equal(x, theirs.state_dict()[key]) for key, x in again.state_dict().items())


@torch.inference_mode()
def test_save_and_load(tmp_path, small):
    again, image = DCAE.from_pretrained(write(tmp_path, small)), torch.rand(1, 3, 8, 8)
    assert again.config == small.config and not again.training
    assert torch.equal(again.decode(again.encode(image)), small.decode(small.encode(image)))
    assert {p.dtype for p in DCAE.from_pretrained(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


@torch.inference_mode()
def test_an_image_does_not_depend_on_its_batch(small):
    image = torch.rand(3, 3, 8, 12) * 2 - 1
    latent = small.encode(image)
    for i in range(3):
        assert_close(latent[i : i + 1], small.encode(image[i : i + 1]))
        assert_close(small.decode(latent)[i : i + 1], small.decode(latent[i : i + 1]))


@torch.inference_mode()
def test_channels_last_changes_nothing(small):
    image = torch.rand(1, 3, 8, 8)
    assert_close(small.encode(image.to(memory_format=torch.channels_last)), small.encode(image))


def test_linear_attention_is_a_mean():
    q, k, v = torch.randn(3, 2, 7, 4).unbind(0)
    scores = q.relu() @ k.relu().mT
    assert_close(linear_attention(q, k, v), scores / (scores.sum(-1, keepdim=True) + 1e-15) @ v)
    assert not linear_attention(-q.abs(), k, v).any(), "a row that sees nothing gets 0"


def test_gradients_reach_every_parameter(small):
    small.requires_grad_(True)
    small.decode(small.encode(torch.rand(2, 3, 8, 8))).square().mean().backward()
    assert [name for name, p in small.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_config_round_trips():
    for files in (FILES, RELEASED, three(), three(**PLAIN)):
        config = DCAEConfig.from_json(files)
        assert DCAEConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert DCAEConfig.from_json(three()).encoder[1] == DCAELevel(width=8, n_blocks=2, kernels=(3, 5))
    assert DCAEConfig.from_json(three(decoder_norm_types=["rms_norm"] * 3)) == DCAEConfig.from_json(three())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "AutoencoderKL"}, "got _class_name 'AutoencoderKL', expected 'AutoencoderDC'"),
        ({"decoder_norm_types": ["batch_norm", "rms_norm", "rms_norm"]}, "expected 'rms_norm'"),
        ({"upsample_block_type": "pixel_shuffle"}, "expected 'interpolate'"),
        ({"encoder_block_types": ["Mamba"] * 3}, "got encoder_block_types 'Mamba'.*expected one of 'ResBlock', 'Eff"),
        ({"encoder_layers_per_block": [1, 1]}, "different lengths"),
        ({"encoder_layers_per_block": [0, 1, 1]}, "got encoder_layers_per_block 0.*expected a positive whole number"),
        ({"encoder_block_out_channels": [4, 12, 12]}, "four of the first must divide"),
        ({"latent_channels": 3}, "got a last width 8: expected a multiple of 3 latents"),
        ({"attention_head_dim": 3}, "expected a multiple of the heads' 3"),
        ({"encoder_qkv_multiscales": [[], [4], []]}, "odd kernels"),
        ({"scaling_factor": 0.0}, "got scaling_factor 0.0"),
    ],
)
def test_wrong_configs(changes, words):
    with pytest.raises(ValueError, match=words):
        DCAEConfig.from_json(three(**changes))
    with pytest.raises(ValueError, match="lacks latent_channels"):
        DCAEConfig.from_json({})


@pytest.mark.parametrize("shape", [(1, 3, 9, 8), (1, 1, 8, 8), (3, 8, 8)])
def test_wrong_images(small, shape):
    with pytest.raises(ValueError, match=r"multiples of 4.*resize"):
        small.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"expected \[B, 4, h, w\]"):
        small.decode(torch.zeros(1, 3, 2, 2))
