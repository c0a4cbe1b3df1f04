"""FLUX's transformer: two layouts, diffusers' own, steps modulated at once, a text projected once, and what is
refused."""

import json

import pytest
import torch
from helpers.cases import found, manifest
from helpers.tolerance import assert_close
from safetensors.torch import load_file

from unimm.checkpoint.load import CheckpointError, check_keys
from unimm.checkpoint.save import released_state_dict
from unimm.denoisers.flux import (
    BFL_WEIGHT_FILES,
    FluxConfig,
    FluxTransformer,
    flux_bfl_key_map,
    flux_key_map,
    flux_position_ids,
)
from unimm.denoisers.mmdit import (
    MMDiTCondition,
    joint_attention,
    modulation_per_step,
    patchify_latents,
    unpatchify_latents,
)
from unimm.generation.flow import euler, flow_timesteps
from unimm.nn.rope import apply_complex_rope, complex_rope

CASE = found("blocks/flux/dev")
FILES = json.loads((CASE / "config.json").read_text())
RELEASED = FILES | {
    "in_channels": 64, "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 19, "num_single_layers": 38,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "axes_dims_rope": [16, 56, 56],
}  # fmt: skip
SIZES = [
    {},
    {
        "num_layers": 3,
        "num_single_layers": 1,
        "guidance_embeds": False,
        "joint_attention_dim": 7,
        "pooled_projection_dim": 5,
    },
    {
        "num_attention_heads": 3,
        "attention_head_dim": 20,
        "axes_dims_rope": [8, 2, 10],
        "in_channels": 12,
        "out_channels": 9,
    },
    {"num_single_layers": 0, "num_layers": 1},
    {"num_single_layers": 2, "num_layers": 0},
]
NAMES = ["golden", "schnell", "widths", "doubles", "singles"]


def made(**changes) -> FluxTransformer:
    torch.manual_seed(0)
    model = FluxTransformer(FluxConfig.from_json(FILES | changes)).eval()
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return model.requires_grad_(False)


def inputs(model: FluxTransformer, rows: int = 2, tokens: int = 5, height: int = 3, width: int = 4) -> dict:
    cfg = model.config
    return {
        "latents": torch.randn(rows, height * width, cfg.in_channels),
        "text": torch.randn(rows, tokens, cfg.text_dim),
        "pooled": torch.randn(rows, cfg.pooled_dim),
        "places": flux_position_ids(height, width),
        "guidance": 3.5 if cfg.guidance_embeds else None,
    }


def velocity(model: FluxTransformer, given: dict, times: torch.Tensor) -> torch.Tensor:
    """At times [B]."""
    (modulation,) = model.modulations(times[None], given["pooled"], guidance=given["guidance"])
    return model(given["latents"], model.condition(given["text"], given["places"]), modulation)


@pytest.mark.parametrize(("name", "table"), [("diffusers", flux_key_map), ("bfl", flux_bfl_key_map)])
def test_manifest_fits_the_released_model(name, table):
    shapes = manifest(f"flux1_dev_transformer_{name}")
    config = FluxConfig.from_json(RELEASED)
    with torch.device("meta"):
        state = FluxTransformer(config).state_dict()
    assert sum(p.numel() for p in state.values()) == 11_901_408_320
    assert len(shapes) == {"diffusers": 1160, "bfl": 780}[name]
    assert {name for one in check_keys(shapes, table(config), state, "here").values() for name in one.our_names} == set(
        state
    )
    lost = sorted(shapes)[len(shapes) // 2]
    with pytest.raises(CheckpointError, match=f"missing keys: {lost}"):
        check_keys({key: shape for key, shape in shapes.items() if key != lost}, table(config), state, "here")


def test_sizes_are_read_from_the_released_weights():
    assert FluxConfig.from_shapes(manifest("flux1_dev_transformer_bfl")) == FluxConfig.from_json(RELEASED)
    with pytest.raises(ValueError, match=r"the weights lack txt_in\.weight"):
        FluxConfig.from_shapes({k: s for k, s in manifest("flux1_dev_transformer_bfl").items() if k != "txt_in.weight"})


def test_the_layouts_hold_the_same_weights():
    one, other = FluxTransformer.from_pretrained(CASE), FluxTransformer.from_pretrained(CASE / "model_bfl.safetensors")
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in one.state_dict().items())
    for table, path in ((flux_key_map, "model.safetensors"), (flux_bfl_key_map, "model_bfl.safetensors")):
        state, stored = released_state_dict(one, table(one.config)), load_file(CASE / path)
        assert state.keys() == stored.keys() and all(torch.equal(x, stored[key]) for key, x in state.items())


@pytest.mark.parametrize("changes", SIZES, ids=NAMES)
@torch.inference_mode()
def test_equal_to_diffusers(tmp_path, changes):
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(1)
    theirs = FluxTransformer2DModel.from_config(FILES | changes).eval()
    for p in theirs.parameters():
        p.add_(0.05 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    ours = FluxTransformer.from_pretrained(tmp_path)
    given, times = inputs(ours), torch.tensor([0.93, 0.12])
    text_places = torch.randint(0, 9, (5, 3)).float()
    guidance = torch.tensor([1.0, 4.5]) if ours.config.guidance_embeds else None
    wanted = theirs(
        given["latents"],
        given["text"],
        given["pooled"],
        times,
        given["places"],
        text_places,
        guidance,
        return_dict=False,
    )[0]
    condition = ours.condition(given["text"], given["places"], text_position_ids=text_places)
    (modulation,) = ours.modulations(times[None], given["pooled"], guidance=guidance)
    assert_close(ours(given["latents"], condition, modulation), wanted)
    # and what we write, diffusers reads
    ours.save_pretrained(tmp_path)
    again = FluxTransformer2DModel.from_pretrained(tmp_path)
    assert all(torch.equal(x, theirs.state_dict()[key]) for key, x in again.state_dict().items())


@pytest.mark.parametrize("layout", ["diffusers", "bfl"])
@pytest.mark.parametrize("changes", SIZES, ids=NAMES)
@torch.inference_mode()
def test_save_and_load(tmp_path, changes, layout):
    model = made(**changes)
    model.save_pretrained(tmp_path, layout=layout)
    again = FluxTransformer.from_pretrained(tmp_path)
    assert again.config == model.config and not again.training
    given = inputs(model)
    assert torch.equal(*(velocity(x, given, torch.tensor([0.5, 0.2])) for x in (model, again)))
    assert {p.dtype for p in FluxTransformer.from_pretrained(tmp_path, dtype=torch.bfloat16).parameters()} == {
        torch.bfloat16
    }


@torch.inference_mode()
def test_the_original_layout_needs_no_config(tmp_path):
    model = made(attention_head_dim=128, axes_dims_rope=[16, 56, 56], num_attention_heads=1)
    model.save_pretrained(tmp_path, layout="bfl")
    (tmp_path / "config.json").unlink()
    assert (
        FluxTransformer.from_pretrained(tmp_path).config
        == FluxTransformer.from_pretrained(tmp_path / BFL_WEIGHT_FILES[0]).config
        == model.config
    )
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        FluxTransformer.from_pretrained(tmp_path)


def test_a_feed_forward_of_any_width(tmp_path):
    """Shares of the fused linear are no whole multiples of the width."""
    config = FluxConfig(**(vars(FluxConfig.from_json(FILES)) | {"mlp_ratio": 2.25}))
    torch.manual_seed(0)
    model = FluxTransformer(config)
    state = released_state_dict(model, flux_key_map(config))
    assert state["single_transformer_blocks.1.proj_mlp.weight"].shape == (72, 32)
    parts = [
        state[f"single_transformer_blocks.1.{name}.bias"]
        for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ]
    assert torch.equal(torch.cat(parts), model.mmdit.single_blocks[1].qkv_mlp.bias)
    # FLUX's config.json cannot say the width, so that the folder would not load
    with pytest.raises(CheckpointError, match=r"cannot save: .*img_mlp.*got \[72\], expected \[128\]"):
        model.save_pretrained(tmp_path, layout="bfl")
    assert not list(tmp_path.iterdir())
    made().save_pretrained(tmp_path, layout="bfl")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="head_dim, 16"):  # whose axes nothing tells
        FluxTransformer.from_pretrained(tmp_path)


@torch.inference_mode()
def test_an_image_does_not_depend_on_its_batch():
    model, times = made(), torch.tensor([0.9, 0.1, 0.5])
    given = inputs(model, rows=3)
    together = velocity(model, given, times)
    for i in range(3):
        alone = given | {name: given[name][i : i + 1] for name in ("latents", "text", "pooled")}
        assert_close(together[i : i + 1], velocity(model, alone, times[i : i + 1]))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision_does_not_round_as_the_neighbours_do(dtype):
    """Equal to the bit to the sample alone, without its padding, where the result is 0."""
    torch.manual_seed(0)
    text, image, lengths = 37, 48, [37, 5, 20]
    q, k, v = torch.randn(3, len(lengths), text + image, 2, 24).to(dtype)
    rotations = complex_rope(torch.zeros(text + image, 3), [8, 8, 8], dtype=torch.float64)
    seen = torch.arange(text + image) < torch.tensor(lengths)[:, None]
    seen[:, text:] = True
    y = joint_attention(q, k, v, MMDiTCondition(q, rotations, seen[:, None, None]))
    for i, rows in enumerate(seen):
        alone = joint_attention(*(x[i : i + 1, rows] for x in (q, k, v)), MMDiTCondition(q, rotations[rows]))
        assert torch.equal(y[i : i + 1, rows], alone)
        assert not y[i, ~rows].any()


def test_steps_modulated_at_once_are_the_steps():
    model = made()
    given, times = inputs(model), flow_timesteps(4, 3.0)
    condition = model.condition(given["text"], given["places"])
    steps = model.modulations(times[:-1], given["pooled"], guidance=3.5)
    assert len(steps) == 4
    at_once = euler(modulation_per_step(model, condition, steps), given["latents"], times)
    one_by_one = euler(lambda x, t: velocity(model, given | {"latents": x}, t.float()), given["latents"], times)
    assert_close(at_once, one_by_one)


@torch.inference_mode()
def test_a_step_computes_nothing_that_is_known(monkeypatch):
    """Neither the text's projection nor a linear of the modulation, and a condition serves every image of its
    text."""
    model = made()
    given = inputs(model, rows=3)
    want = velocity(model, given | {"text": given["text"][[1, 1, 0]]}, torch.full((3,), 0.4))
    condition = model.condition(given["text"], given["places"]).select_rows(torch.tensor([1, 1, 0]))
    (modulation,) = model.modulations(torch.tensor([0.4]), given["pooled"], guidance=3.5)
    known = [model.time_embed, model.guidance_embed, model.pooled_embed, model.mmdit.text_in]
    known += [module for name, module in model.named_modules() if name.endswith("modulation")]
    assert len(known) == 4 + 2 * 2 + 2 + 1
    for module in known:
        monkeypatch.setattr(module, "forward", None)
    assert_close(model(given["latents"], condition, modulation), want)


def test_gradients_reach_every_parameter():
    model = made().requires_grad_(True)
    velocity(model, inputs(model), torch.rand(2)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_packing():
    latents = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    tokens = patchify_latents(latents)
    # token (row 1, column 2), channel 1, its lower left number
    assert tokens.shape == (2, 6, 12) and tokens[1, 1 * 3 + 2, 1 * 4 + 2] == latents[1, 1, 3, 4]
    assert torch.equal(unpatchify_latents(tokens, height=4, width=6), latents)
    with pytest.raises(ValueError, match=r"\[2, 3, 4, 5\].*even sides"):
        patchify_latents(latents[..., :5])
    with pytest.raises(ValueError, match="for 6 x 6 latents"):
        unpatchify_latents(tokens, height=6, width=6)


def test_turns_are_exact_far_away():
    """In float64: at place 4000 a float32 angle would be off by 1e-4."""
    table = complex_rope(torch.tensor([[0.0, 4000.0, 1.0]]), (2, 4, 2), dtype=torch.float64)
    assert table[0].angle()[[0, 3]].tolist() == [0.0, 1.0]
    assert torch.allclose(table[0, 2], torch.polar(torch.tensor(1.0), torch.tensor(40.0)), atol=1e-6)


@torch.inference_mode()
def test_compiled_turns_are_the_turns():
    table, x = complex_rope(torch.randint(0, 9, (5, 2)), (4, 8), dtype=torch.float64), torch.randn(2, 5, 3, 12)
    assert_close(
        torch.compile(apply_complex_rope, backend="eager", fullgraph=True)(x, table), apply_complex_rope(x, table)
    )
    assert apply_complex_rope(x.bfloat16(), table).dtype == torch.bfloat16
    assert_close(apply_complex_rope(x, table).square().sum(-1), x.square().sum(-1))


def test_config_round_trips():
    for changes in SIZES:
        config = FluxConfig.from_json(FILES | changes)
        assert FluxConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert FluxConfig.from_json(RELEASED).mmdit.dim == 3072


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "SanaTransformer2DModel"}, "got _class_name 'Sana.*', expected 'FluxTransformer2DModel'"),
        ({"patch_size": 2}, "got patch_size 2, expected 1"),
        ({"joint_attention_dim": None}, "lacks joint_attention_dim"),
        ({"axes_dims_rope": [4, 6, 8]}, r"got rope_axes_dims \[4, 6, 8\]: .*head_dim, 16"),
        ({"axes_dims_rope": [4, 7, 5]}, "even numbers"),
        ({"num_attention_heads": 0}, "got num_attention_heads 0 .*a positive whole number"),
        ({"num_layers": 0, "num_single_layers": 0}, "a block of either kind"),
    ],
)
def test_wrong_configs(changes, words):
    with pytest.raises(ValueError, match=words):
        FluxConfig.from_json(FILES | changes)


def test_wrong_inputs():
    model = made()
    given = inputs(model)
    condition = model.condition(given["text"], given["places"])
    (modulation,) = model.modulations(torch.tensor([0.5]), given["pooled"], guidance=1.0)
    with pytest.raises(ValueError, match=r"got latents \[2, 11, 16\]: expected \[B, 12, 16\]"):
        model(given["latents"][:, 1:], condition, modulation)
    with pytest.raises(ValueError, match=r"got 1 latents, a condition of 2 rows, a modulation of 2.*rows\(index\)"):
        model(given["latents"][:1], condition, modulation)
    with pytest.raises(ValueError, match=r"expected \[B, M, 40\]"):
        model.condition(given["text"][..., 1:], given["places"])
    with pytest.raises(ValueError, match=r"expected \[J, 3\]"):
        model.condition(given["text"], given["places"][:, 1:])
    with pytest.raises(ValueError, match="got guidance None: expected a number"):
        model.modulations(torch.tensor([0.5]), given["pooled"])
    with pytest.raises(ValueError, match=r"got times \[2, 3\] for 2 rows"):
        model.modulations(torch.rand(2, 3), given["pooled"], guidance=1.0)
    with pytest.raises(ValueError, match=r"expected \[B, 24\]"):
        model.modulations(torch.rand(2), given["pooled"][:, 1:], guidance=1.0)
    plain = made(guidance_embeds=False)
    with pytest.raises(ValueError, match="embeds none"):
        plain.modulations(torch.tensor([0.5]), given["pooled"], guidance=1.0)
    with pytest.raises(ValueError, match="expected 'diffusers' or 'bfl'"):
        plain.save_pretrained(CASE, layout="other")


def test_wrong_weights(tmp_path):
    model = made()
    model.save_pretrained(tmp_path, layout="bfl")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_json() | {"num_layers": 3}))
    with pytest.raises(CheckpointError, match=r"missing keys: double_blocks\.2"):
        FluxTransformer.from_pretrained(tmp_path)
