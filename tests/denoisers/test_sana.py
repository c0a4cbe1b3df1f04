"""Sana's transformer: the released names, diffusers' own, conditions computed once, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from helpers.paths import GOLDEN as STORE
from helpers.sana_toys import FILES, RELEASED
from helpers.tolerance import assert_close
from safetensors.torch import save_file

from unimm.checkpoint.load import CheckpointError, check_keys
from unimm.checkpoint.save import released_state_dict
from unimm.denoisers.sana import KEY_MAP, SanaConfig, SanaTransformer

GOLDEN = STORE / "blocks"
SIZES = [
    {},
    {"patch_size": 2, "num_layers": 2, "caption_channels": 7, "mlp_ratio": 1.7},
    {"num_attention_heads": 3, "attention_head_dim": 12, "cross_attention_dim": 36, "num_cross_attention_heads": 5,
     "cross_attention_head_dim": 4, "attention_bias": True, "in_channels": 3, "out_channels": 5},
]  # fmt: skip


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = SanaTransformer(SanaConfig.from_json(FILES)).eval()
    for name, p in model.named_parameters():
        if name.endswith("table"):
            torch.nn.init.normal_(p, std=0.3)
    return model.requires_grad_(False)


def write(folder: Path, model: SanaTransformer) -> Path:
    """A folder in the released layout."""
    (folder / "config.json").write_text(json.dumps(model.config.to_json()))
    save_file(released_state_dict(model, KEY_MAP), folder / "diffusion_pytorch_model.safetensors")
    return folder


def named(manifest: dict) -> dict[str, tuple[int, ...]]:
    """A stored manifest's keys and shapes: `{20}` stands for 0 to 19."""
    whole = {}
    for key, shape in manifest.items():
        head, brace, rest = key.partition("{")
        count, _, tail = rest.partition("}")
        whole |= {f"{head}{i}{tail}": tuple(shape) for i in range(int(count))} if brace else {key: tuple(shape)}
    return whole


@pytest.mark.parametrize("name", ["sana_1600m_512_transformer", "sana_1600m_1024_transformer"])
def test_manifest_fits_the_released_model(name):
    shapes = named(json.loads((GOLDEN / "manifests.json").read_text())[name])
    with torch.device("meta"):
        model = SanaTransformer(SanaConfig.from_json(RELEASED | {"sample_size": 16 if "512" in name else 32}))
    assert sum(p.numel() for p in model.parameters()) == 1_604_462_752 and len(shapes) == 396
    state = model.state_dict()
    assert {name for one in check_keys(shapes, KEY_MAP, state, "here").values() for name in one.our_names} == set(state)
    without = {key: shape for key, shape in shapes.items() if key != "transformer_blocks.3.attn1.to_k.weight"}
    with pytest.raises(CheckpointError, match=r"missing keys: transformer_blocks\.3\.attn1\.to_k\.weight"):
        check_keys(without, KEY_MAP, state, "here")


@pytest.mark.parametrize("changes", SIZES, ids=["golden", "patches", "bias"])
@torch.inference_mode()
def test_equal_to_diffusers(tmp_path, changes):
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(1)
    theirs = SanaTransformer2DModel.from_config(FILES | changes).eval()
    for p in theirs.parameters():
        p.add_(0.05 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    ours = SanaTransformer.from_pretrained(tmp_path)
    cfg = ours.config
    latents, caption = torch.randn(3, cfg.in_channels, 4, 10), torch.randn(3, 5, cfg.caption_dim)
    seen, times = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [1, 0, 0, 0, 0]]), torch.tensor([1.0, 523.0, 999.0])
    for mask in (None, seen):
        wanted = theirs(latents, caption, times, encoder_attention_mask=mask).sample
        assert_close(ours(latents, times / 1000, ours.condition(caption, mask)), wanted)
    # and what we write, diffusers reads
    again = SanaTransformer2DModel.from_pretrained(write(tmp_path, ours))
    assert all(torch.equal(x, theirs.state_dict()[key]) for key, x in again.state_dict().items())


@torch.inference_mode()
def test_save_and_load(tmp_path, small):
    again = SanaTransformer.from_pretrained(write(tmp_path, small))
    assert again.config == small.config and not again.training
    latents, times, caption = torch.randn(1, 6, 4, 4), torch.tensor([0.3]), torch.randn(1, 5, 20)
    assert torch.equal(again(latents, times, again.condition(caption)), small(latents, times, small.condition(caption)))
    assert {p.dtype for p in SanaTransformer.from_pretrained(tmp_path, dtype=torch.bfloat16).parameters()} == {
        torch.bfloat16
    }


@torch.inference_mode()
def test_an_image_does_not_depend_on_its_batch(small):
    latents, times, caption = torch.randn(3, 6, 4, 6), torch.tensor([0.9, 0.1, 0.5]), torch.randn(3, 5, 20)
    seen = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0]])
    together = small(latents, times, small.condition(caption, seen))
    for i in range(3):
        # alone, without its padding
        alone = small(latents[i : i + 1], times[i : i + 1], small.condition(caption[i : i + 1, seen[i].bool()]))
        assert_close(together[i : i + 1], alone)


@torch.inference_mode()
def test_a_condition_serves_every_step_and_image(small, monkeypatch):
    caption, latents = torch.randn(2, 5, 20), torch.randn(4, 6, 4, 4)
    condition = small.condition(caption, torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]))
    index = torch.tensor([1, 1, 0, 1])
    want = small(latents, torch.full((4,), 0.5), small.condition(caption[index], condition.attention_mask[index, 0, 0]))
    # a step touches neither the caption's layers nor the projections of keys and values
    for module in (small.caption_proj, small.caption_norm, *(block.cross_attention.kv for block in small.blocks)):
        monkeypatch.setattr(module, "forward", None)
    assert_close(small(latents, torch.full((4,), 0.5), condition.select_rows(index)), want)


def test_gradients_reach_every_parameter(small):
    small.requires_grad_(True)
    small(torch.randn(2, 6, 4, 4), torch.rand(2), small.condition(torch.randn(2, 3, 20))).square().mean().backward()
    assert [name for name, p in small.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_config_round_trips():
    for changes in SIZES:
        config = SanaConfig.from_json(FILES | changes)
        assert SanaConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert SanaConfig.from_json(FILES | {"out_channels": None}).out_channels == 6
    assert SanaConfig.from_json(RELEASED).dim == 2240


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "got _class_name 'Flux.*', expected 'SanaTransformer2DModel'"),
        ({"interpolation_scale": 2}, "got interpolation_scale 2, expected None"),
        ({"qk_norm": "rms_norm_across_heads"}, "got qk_norm"),
        ({"guidance_embeds": True}, "expected False"),
        ({"cross_attention_dim": 31}, "got cross_attention_dim 31, expected 32"),
        ({"num_layers": None}, "lacks num_layers"),
        ({"patch_size": 0}, "got patch_size 0 .*positive"),
    ],
)
def test_wrong_configs(changes, words):
    with pytest.raises(ValueError, match=words):
        SanaConfig.from_json(FILES | changes)


def test_wrong_inputs(small):
    condition = small.condition(torch.randn(1, 3, 20))
    with pytest.raises(ValueError, match=r"got latents \[1, 5, 4, 4\]: expected \[B, 6, h, w\]"):
        small(torch.zeros(1, 5, 4, 4), torch.zeros(1), condition)
    with pytest.raises(ValueError, match=r"got 2 latents, 2 timesteps, a condition of 1 rows.*rows\(index\)"):
        small(torch.zeros(2, 6, 4, 4), torch.zeros(2), condition)
    with pytest.raises(ValueError, match=r"expected \[B, M, 20\]"):
        small.condition(torch.zeros(1, 3, 21))
    with pytest.raises(ValueError, match="a token that is no padding in every row"):
        small.condition(torch.zeros(2, 3, 20), torch.tensor([[1, 0, 0], [0, 0, 0]]))


def test_wrong_weights(tmp_path, small):
    write(tmp_path, small)
    (tmp_path / "config.json").write_text(json.dumps(small.config.to_json() | {"num_layers": 4}))
    with pytest.raises(CheckpointError, match=r"missing keys: transformer_blocks\.3"):
        SanaTransformer.from_pretrained(tmp_path)
