"""SigLIP2's encoder: the released names, transformers' own, its look at images, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from helpers.cases import manifest
from helpers.tolerance import assert_close
from helpers.toys import picture
from safetensors.torch import load_file, save_file

from unimm.checkpoint.load import CheckpointError, check_keys
from unimm.checkpoint.save import released_state_dict, released_tensors
from unimm.encoders.siglip import SiglipConfig, SiglipVisionEncoder, siglip_file_key_map
from unimm.processing.images.siglip import SiglipImageProcessor

# so400m; what is missing is as in the class
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27}
TOY = dict(
    hidden_size=24, intermediate_size=20, num_attention_heads=3, num_hidden_layers=2, patch_size=5, image_size=23,
    layer_norm_eps=1e-5, hidden_act="gelu",
)  # fmt: skip


def shaken(model):
    """Weights larger than usual, so that differences show."""
    torch.manual_seed(5)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.1 * torch.randn(x.shape))
    return model.eval()


def transformers_tower(**changes):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return shaken(SiglipVisionModel(SiglipVisionConfig(**TOY | changes)))


@pytest.fixture
def small() -> SiglipVisionEncoder:
    return shaken(SiglipVisionEncoder(SiglipConfig.from_json(TOY))).requires_grad_(False)


def write(folder: Path, model: SiglipVisionEncoder, **changes) -> Path:
    """A folder in the released layout."""
    (folder / "config.json").write_text(json.dumps(model.config.to_json() | changes))
    (folder / "preprocessor_config.json").write_text(json.dumps(model.image_processor.to_json()))
    save_file(released_state_dict(model, siglip_file_key_map(model.config)), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("patch", "size"), [(14, 224), (14, 384), (16, 512)])
def test_manifests_fit_the_released_encoders(patch, size):
    shapes = manifest(f"siglip2_so400m_patch{patch}_{size}_vision")
    with torch.device("meta"):
        model = SiglipVisionEncoder(
            SiglipConfig.from_json({"vision_config": SO400M | {"patch_size": patch, "image_size": size}})
        )
    assert len(shapes) == 448 and model.config.grid_side**2 == {224: 256, 384: 729, 512: 1024}[size]
    state, table = model.state_dict(), siglip_file_key_map(model.config)
    # in a whole release the encoder of texts stands beside it
    beside = {"text_model.head.bias": (3,), "text_model.encoder.layers.0.mlp.fc1.bias": (4,), "logit_scale": (1,)}
    assert {
        name for one in check_keys(shapes | beside, table, state, "here").values() for name in one.our_names
    } == set(state)
    assert set(released_tensors(model, table)) == set(shapes)
    without = {key: shape for key, shape in shapes.items() if key != "vision_model.encoder.layers.3.mlp.fc1.bias"}
    with pytest.raises(CheckpointError, match=r"missing keys: vision_model\.encoder\.layers\.3\.mlp\.fc1\.bias"):
        check_keys(without, table, state, "here")


@pytest.mark.parametrize("changes", [{}, {"image_size": 40, "num_attention_heads": 4, "hidden_act": "quick_gelu"}])
@torch.inference_mode()
def test_equals_transformers(tmp_path, changes):
    theirs = transformers_tower(**changes)
    theirs.save_pretrained(tmp_path)
    ours = SiglipVisionEncoder.from_pretrained(tmp_path)
    # newer versions write the encoder without the name around it, which the released files have
    state = load_file(tmp_path / "model.safetensors")
    save_file({f"vision_model.{key}": x for key, x in state.items()}, tmp_path / "model.safetensors")
    assert all(
        torch.equal(x, ours.state_dict()[key])
        for key, x in SiglipVisionEncoder.from_pretrained(tmp_path).state_dict().items()
    )
    images = torch.randn(3, 3, ours.config.image_size, ours.config.image_size)
    expected = theirs(images, output_hidden_states=True)
    assert_close(ours(images), expected.last_hidden_state)
    assert_close(ours.pre_norm_features(images), expected.hidden_states[-1])
    assert_close(ours.pool_features(ours(images)), expected.pooler_output)


@torch.inference_mode()
def test_a_whole_release(tmp_path):
    """The files of a whole SigLIP: the encoder of texts is left unread, and its config stands around the encoder's."""
    from transformers import SiglipConfig as Theirs
    from transformers import SiglipModel

    text = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=9)
    theirs = shaken(SiglipModel(Theirs(text_config=text, vision_config=TOY)))
    theirs.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 23, 23)
    assert_close(SiglipVisionEncoder.from_pretrained(tmp_path)(images), theirs.vision_model(images).last_hidden_state)


def test_pixels_equal_transformers():
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    for resample in (2, 3):
        theirs = SiglipImageProcessorPil(size={"height": 30, "width": 30}, resample=resample)
        rule = SiglipImageProcessor.from_json(theirs.to_dict(), size=30)
        assert rule.resample == resample and SiglipImageProcessor.from_json(rule.to_json(), size=30) == rule
        for i, size in enumerate([(30, 30), (7, 90), (101, 40)]):
            image = picture(*size, seed=i)
            assert torch.equal(rule.preprocess(image), theirs(image, return_tensors="pt")["pixel_values"][0])


@torch.inference_mode()
def test_save_and_load(tmp_path, small):
    again = SiglipVisionEncoder.from_pretrained(write(tmp_path, small))
    images = torch.stack([small.image_processor.preprocess(picture(40, 31, seed=i)) for i in range(2)])
    assert again.config == small.config and again.image_processor == small.image_processor and not again.training
    assert torch.equal(again(images), small(images))
    assert_close(small(images)[1:], small(images[1:]))
    assert {p.dtype for p in SiglipVisionEncoder.from_pretrained(tmp_path, dtype=torch.bfloat16).parameters()} == {
        torch.bfloat16
    }


@torch.inference_mode()
def test_without_a_head(tmp_path, small):
    """A head in the files that the config does not want is left unread; one that it wants must be there."""
    write(tmp_path, small, vision_use_head=False)
    tower, images = SiglipVisionEncoder.from_pretrained(tmp_path), torch.randn(1, 3, 23, 23)
    assert torch.equal(tower(images), small(images))
    with pytest.raises(ValueError, match="no pooling head"):
        tower.pool_features(tower(images))
    save_file(released_state_dict(tower, siglip_file_key_map(tower.config)), tmp_path / "model.safetensors")
    assert torch.equal(SiglipVisionEncoder.from_pretrained(tmp_path)(images), small(images))
    (tmp_path / "config.json").write_text(json.dumps(TOY))
    with pytest.raises(CheckpointError, match=r"missing keys: vision_model\.head"):
        SiglipVisionEncoder.from_pretrained(tmp_path)


def test_gradients_reach_every_parameter(small):
    small.requires_grad_(True)
    small.pool_features(small(torch.randn(2, 3, 23, 23))).square().mean().backward()
    assert [name for name, p in small.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "siglip2_vision_model"}, "got model_type 'siglip2_vision_model'.*NaFlex"),
        ({"hidden_size": 25}, "a multiple of the heads"),
        ({"image_size": 3}, "images of a patch or more"),
        ({"num_hidden_layers": 0}, "got num_hidden_layers 0 .*a positive whole number"),
    ],
)
def test_wrong_configs(changes, words):
    with pytest.raises(ValueError, match=words):
        SiglipConfig.from_json(TOY | changes)


def test_wrong_inputs(tmp_path, small):
    with pytest.raises(ValueError, match=r"got images \[1, 3, 24, 24\]: expected \[B, 3, 23, 23\]"):
        small(torch.zeros(1, 3, 24, 24))
    with pytest.raises(ValueError, match="got hidden_act 'gelo'.*expected one of 'silu'"):
        SiglipVisionEncoder(SiglipConfig.from_json(TOY | {"hidden_act": "gelo"}))
    for changes, words in [
        ({"size": {"height": 24, "width": 23}}, "got size.height 24, expected 23"),
        ({"size": 24}, "got size.height 24, expected 23"),
        ({"do_normalize": False}, "got do_normalize False, expected True"),
        ({"image_std": [0.5, 0.0, 0.5]}, "deviations"),
        ({"resample": 9}, "got resample 9"),
    ]:
        with pytest.raises(ValueError, match=words):
            SiglipImageProcessor.from_json(changes, size=23)


def test_wrong_weights(tmp_path, small):
    write(tmp_path, small, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"missing keys: vision_model\.encoder\.layers\.2"):
        SiglipVisionEncoder.from_pretrained(tmp_path)
