"""Qwen-Image's transformer: the released names, diffusers' own, places from the middle, texts with padding, bad
input."""

import json

import pytest
import torch
from helpers.cases import found, manifest
from helpers.tolerance import assert_close

from unimm.checkpoint.load import CheckpointError, check_keys
from unimm.denoisers.mmdit import modulation_per_step
from unimm.denoisers.qwen_image import (
    KEY_MAP,
    QwenImageConfig,
    QwenImageTransformer,
    msrope_position_ids,
)

FILES = json.loads((found("blocks/qwenimage/dev") / "config.json").read_text())
RELEASED = FILES | {
    "in_channels": 64, "out_channels": 16, "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 60,
    "joint_attention_dim": 3584, "axes_dims_rope": [16, 56, 56],
}  # fmt: skip
SIZES = [
    {},
    {"num_layers": 3, "joint_attention_dim": 7, "in_channels": 12, "out_channels": 5},
    {"num_attention_heads": 3, "attention_head_dim": 20, "axes_dims_rope": [8, 2, 10]},
]
PICTURES = [
    [(1, 4, 3)],
    [(1, 2, 5), (1, 7, 3)],  # one to be drawn, one to be seen
    [(2, 3, 3)],
]


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = QwenImageTransformer(QwenImageConfig.from_json(FILES)).eval()
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return model.requires_grad_(False)


def count(pictures) -> int:
    return sum(f * h * w for f, h, w in pictures)


def test_manifest_fits_the_released_model():
    shapes = manifest("qwenimage_transformer")
    with torch.device("meta"):
        state = QwenImageTransformer(QwenImageConfig.from_json(RELEASED)).state_dict()
    assert sum(p.numel() for p in state.values()) == 20_430_401_088 and len(shapes) == 1933
    assert {name for one in check_keys(shapes, KEY_MAP, state, "here").values() for name in one.our_names} == set(state)
    without = {key: shape for key, shape in shapes.items() if key != "transformer_blocks.7.txt_mlp.net.2.bias"}
    with pytest.raises(CheckpointError, match=r"missing keys: transformer_blocks\.7\.txt_mlp\.net\.2\.bias"):
        check_keys(without, KEY_MAP, state, "here")


@pytest.mark.parametrize(("changes", "pictures"), [*zip(SIZES, PICTURES, strict=True)], ids=["golden", "two", "frames"])
@torch.inference_mode()
def test_equal_to_diffusers(tmp_path, changes, pictures):
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(1)
    theirs = QwenImageTransformer2DModel.from_config(FILES | changes).eval()
    for p in theirs.parameters():
        p.add_(0.05 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    ours = QwenImageTransformer.from_pretrained(tmp_path)
    latents, text = torch.randn(3, count(pictures), ours.config.in_channels), torch.randn(3, 6, ours.config.text_dim)
    seen, times = (
        torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 1, 0, 0, 1, 0]]),
        torch.tensor([0.97, 0.5, 0.1]),
    )
    for mask in (None, seen):
        wanted = theirs(latents, text, mask, times, img_shapes=[pictures] * 3, return_dict=False)[0]
        (modulation,) = ours.modulations(times[None])
        assert_close(ours(latents, ours.condition(text, pictures, key_padding_mask=mask), modulation), wanted)
    # and what we write, diffusers reads
    ours.save_pretrained(tmp_path)
    again = QwenImageTransformer2DModel.from_pretrained(tmp_path)
    assert all(torch.equal(x, theirs.state_dict()[key]) for key, x in again.state_dict().items())


def test_places():
    of_pictures, of_text = msrope_position_ids([(1, 3, 4), (2, 1, 7)], 3)
    assert of_pictures[:5].tolist() == [[0, -2, -2], [0, -2, -1], [0, -2, 0], [0, -2, 1], [0, -1, -2]]
    # the second's frames count from 1; of 7 columns the middle is the fifth
    assert of_pictures[12].tolist() == [1, -1, -4] and of_pictures[-1].tolist() == [2, -1, 2]
    assert of_text.tolist() == [[3, 3, 3], [4, 4, 4], [5, 5, 5]]
    with pytest.raises(ValueError, match="expected one or more of"):
        msrope_position_ids([(1, 0, 4)], 3)
    with pytest.raises(ValueError, match="to end before 4096"):
        msrope_position_ids([(1, 64, 64)], 4090)


@torch.inference_mode()
def test_save_and_load(tmp_path, small):
    small.save_pretrained(tmp_path)
    again = QwenImageTransformer.from_pretrained(tmp_path)
    assert again.config == small.config and not again.training
    latents, text, times = torch.randn(2, 6, 16), torch.randn(2, 4, 36), torch.rand(1, 2)
    got, want = (x(latents, x.condition(text, [(1, 2, 3)]), x.modulations(times)[0]) for x in (again, small))
    assert torch.equal(got, want)


@torch.inference_mode()
def test_an_image_does_not_depend_on_its_batch(small):
    latents, text, times = torch.randn(3, 6, 16), torch.randn(3, 5, 36), torch.tensor([[0.9, 0.1, 0.5]])
    seen = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    together = small(latents, small.condition(text, [(1, 3, 2)], key_padding_mask=seen), small.modulations(times)[0])
    for i in range(3):
        # alone, without the padding behind its text
        condition = small.condition(text[i : i + 1, : seen[i].sum()], [(1, 3, 2)])
        assert_close(together[i : i + 1], small(latents[i : i + 1], condition, small.modulations(times[:, i])[0]))


@torch.inference_mode()
def test_a_step_computes_nothing_that_is_known(small, monkeypatch):
    latents, text = torch.randn(2, 6, 16), torch.randn(1, 5, 36)
    condition = small.condition(text, [(1, 3, 2)], key_padding_mask=torch.tensor([[1, 1, 1, 0, 1]])).select_rows(
        torch.tensor([0, 0])
    )
    steps = small.modulations(torch.tensor([0.8, 0.3]), batch_size=2)
    want = [small(latents, condition, small.modulations(torch.full((1, 2), t))[0]) for t in (0.8, 0.3)]
    known = [module for name, module in small.named_modules() if name.endswith("modulation")]
    for module in (small.time_embed, small.text_norm, small.mmdit.text_in, *known):
        monkeypatch.setattr(module, "forward", None)
    velocity = modulation_per_step(small, condition, steps)
    for expected in want:
        assert_close(velocity(latents, 0.0), expected)


def test_gradients_reach_every_parameter_but_the_last_texts(small):
    small.requires_grad_(True)
    condition, (modulation,) = small.condition(torch.randn(2, 3, 36), [(1, 2, 3)]), small.modulations(torch.rand(1, 2))
    small(torch.randn(2, 6, 16), condition, modulation).square().mean().backward()
    dead = {name for name, p in small.named_parameters() if p.grad is None or not p.grad.any()}
    # nothing reads what the last block makes of its text
    last = "mmdit.double_blocks.1.text."
    assert {name.removeprefix(last).split(".")[0] for name in dead} == {"out_proj", "mlp", "q_norm"}
    assert all(name.startswith(last) for name in dead)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "got _class_name 'Flux.*', expected 'QwenImageTransformer2DModel'"),
        ({"use_layer3d_rope": True}, "got use_layer3d_rope True, expected False"),
        ({"num_layers": None}, "lacks num_layers"),
        ({"axes_dims_rope": [8, 8]}, "expected three"),
        ({"axes_dims_rope": [4, 6, 8]}, "head_dim, 16"),
        ({"num_layers": 0}, "got num_layers 0 .*a positive whole number"),
    ],
)
def test_wrong_configs(changes, words):
    with pytest.raises(ValueError, match=words):
        QwenImageConfig.from_json(FILES | changes)


def test_wrong_inputs(small):
    condition = small.condition(torch.randn(1, 3, 36), [(1, 2, 3)])
    (modulation,) = small.modulations(torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"got latents \[1, 5, 16\]: expected \[B, 6, 16\]"):
        small(torch.zeros(1, 5, 16), condition, modulation)
    with pytest.raises(ValueError, match=r"got 2 latents, a condition of 1 rows"):
        small(torch.zeros(2, 6, 16), condition, modulation)
    with pytest.raises(ValueError, match=r"got key_padding_mask \[1, 2\] for a text \[1, 3, 36\]"):
        small.condition(torch.zeros(1, 3, 36), [(1, 2, 3)], key_padding_mask=torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"expected \[B, M, 36\]"):
        small.condition(torch.zeros(1, 3, 35), [(1, 2, 3)])
    with pytest.raises(ValueError, match=r"expected \[S\] or \[S, B\]"):
        small.modulations(torch.zeros(1, 1, 1))


def test_wrong_weights(tmp_path, small):
    small.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(small.config.to_json() | {"num_layers": 3}))
    with pytest.raises(CheckpointError, match=r"missing keys: transformer_blocks\.2"):
        QwenImageTransformer.from_pretrained(tmp_path)
