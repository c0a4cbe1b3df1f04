"""Encoders that Janus looks through: SigLIP by its numbers, any other of timm's by name."""

import json

import pytest
import torch
from helpers.toys import byte_tokenizer, differences, janus, janus_files, picture
from timm.models.vision_transformer import VisionTransformer

import unimm
from unimm import Janus, TextSampling
from unimm.encoders.timm_vit import TimmEncoderConfig, TimmVisionEncoder, TimmViTConfig
from unimm.sequence.packing import pack_sequences


@pytest.mark.parametrize(
    ("name", "size", "width", "n"),
    [
        ("vit_tiny_patch16_224", 64, 192, 16),  # with a class token, which is left out
        ("convnext_atto", 64, 320, 4),  # a grid, channels first
        ("test_vit", 32, 64, 4),
        ("resnet10t", 64, 512, 4),  # with counts of batches, which are whole numbers
        ("eva02_tiny_patch14_224", 45, 192, 9),  # with tables that no file holds; 45 pixels are 3 patches and a rest
    ],
)
def test_encoders_of_timm_by_name(tmp_path, name, size, width, n):
    tower = {"image_size": size, "model_name": name}
    files = janus_files(aligner_config=dict(input_dim=width), generation={"size": [8, 8]})
    (tmp_path / "config.json").write_text(json.dumps(files | {"vision_config": {"params": tower}}))
    byte_tokenizer(tmp_path)
    model = Janus.from_folder(tmp_path).eval()
    model.save_pretrained(tmp_path)
    again = unimm.load(tmp_path)
    assert again.config == model.config and again.config.vision.vit is None
    assert [x for x in differences(model, again) if not x.endswith("num_batches_tracked")] == []
    item = model.processor.conversation_parts([{"role": "user", "content": "a", "images": picture()}])[1]
    assert item.n_tokens == n
    sampling = TextSampling(max_tokens=3)
    assert again.understand(picture(), "what?", text_sampling=sampling) == model.understand(
        picture(), "what?", text_sampling=sampling
    )
    with torch.inference_mode():
        assert model.image_features(pack_sequences([[item]]).und_images).shape == (n, width)


@torch.inference_mode()
def test_a_grid_with_channels_last_is_read_in_raster_order():
    tower = TimmVisionEncoder(
        TimmEncoderConfig(model_name="swin_tiny_patch4_window7_224", image_size=64, vit=None)
    ).eval()
    images = torch.randn(2, 3, 64, 64)
    grid = tower.trunk.forward_features(images)
    assert grid.shape == (2, 2, 2, 768)
    assert torch.equal(tower(images), grid.flatten(1, 2))


@torch.inference_mode()
def test_pixels_that_make_no_patch_are_not_seen(tmp_path):
    """384 pixels are 27 patches of 14 and a rest: the original's convolution leaves it out, too."""
    model = Janus.from_pretrained(janus(tmp_path / "toy", vision_config=dict(patch_size=5)))
    whole = VisionTransformer(
        img_size=24, patch_size=5, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.0, class_token=False, global_pool="map",
        num_classes=0,
    ).eval()  # fmt: skip
    whole.load_state_dict(model.vision.trunk.state_dict())
    image = model.image_processor.preprocess(picture(24, 24))
    item = model.processor.und_image_part(image, (1, 2))
    assert item.n_tokens == 16
    torch.testing.assert_close(
        model.image_features(pack_sequences([[item]]).und_images),
        whole.forward_features(image[None])[0],
        rtol=1e-5,
        atol=1e-5,
    )
    assert isinstance(model.understand(picture(), "what?", text_sampling=TextSampling(max_tokens=2)), str)


def test_a_released_name_with_other_numbers():
    """Numbers in the file go before those that the name means; without any, the name's."""
    files = {"image_size": 384, "model_name": "siglip_large_patch16_384"}
    assert TimmEncoderConfig.from_json(files).vit == TimmViTConfig(dim=1024, n_layers=24, n_heads=16, patch_size=16)
    other = TimmEncoderConfig.from_json(files | {"layers": 3, "width": 64, "heads": 4})
    assert other.vit == TimmViTConfig(dim=64, n_layers=3, n_heads=4, patch_size=16)
    assert TimmEncoderConfig.from_json(other.to_json()) == other
    assert TimmEncoderConfig.from_json(files).to_json().keys() == {
        "image_size",
        "model_name",
        "select_layer",
        "select_feature",
    }
