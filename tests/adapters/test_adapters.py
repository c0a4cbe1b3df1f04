"""Adapters of a model: several by name, DoRA, gradients, packed and rounded linears, and what is refused."""

import json
import warnings

import pytest
import torch
from helpers.adapters import move_trained
from helpers.toys import picture, toy
from safetensors.torch import load_file, save_file
from torch import nn

from unimm.adapters.config import AdapterConfig
from unimm.adapters.updates import LowRankUpdate, from_released, to_released
from unimm.checkpoint.keymap import KeyMap, Rename, equal_slices
from unimm.nn.packed_linear import PackedLinear, optimize_for_cpu
from unimm.nn.quantized_linear import QuantizedLinear, can_pack

packs = pytest.mark.skipif(not can_pack(), reason="PyTorch has packed products on x86 alone")


def config(*targets: str, **changes) -> AdapterConfig:
    return AdapterConfig(**dict(rank=2, alpha=6, targets=targets or ("gen",)) | changes)


def hidden(model) -> torch.Tensor:
    """Keys and values of an image and a text: what both experts, the ViT and the latents make of them."""
    with torch.inference_mode():
        contexts = model.start_contexts(1, None)
        contexts = model._append_input_images(contexts, [[picture()]], [torch.Generator().manual_seed(0)], latents=True)
        contexts = model.append_text(contexts, model.text_parts(["a b c"]))
        return torch.cat([chunk.flatten() for chunk in contexts[0].full.chunks])


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for rounding: sums of a hundred numbers about 1, in another order, in float32."""
    return torch.allclose(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_equals_unmerged(dora, dtype, tmp_path):
    model = toy().to(dtype)
    base = hidden(model)
    model.add_adapter(config("und", "gen", "vision", "connector", "latents", dora=dora))
    if dtype == torch.float32:
        assert close(hidden(model), base), "a new adapter changes nothing"
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    move_trained(model)
    adapted = hidden(model)
    model.save_adapter(tmp_path)
    model.merge_adapter()
    merged = hidden(model)
    # in bfloat16 the merged weights are rounded to 8 bits, which the base's are, too
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    difference = (adapted - base).float().norm()
    assert (merged - adapted).float().norm() < tolerance * adapted.float().norm() < difference
    again = toy().to(dtype)
    again.load_adapter(tmp_path)
    assert torch.equal(hidden(again), adapted)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] == dora


def test_gradients_reach_the_adapter_alone_and_those_of_merged_weights():
    """d loss / d b of an adapter at its beginning is scale * (d loss / d W) a^T."""
    model = toy()
    linear = model.decoder.blocks[0].experts["und"].q
    x = torch.randn(5, linear.in_features)
    linear(x).square().sum().backward()
    whole = linear.weight.grad.clone()
    model.zero_grad()
    model.add_adapter(config("und.attention"))
    adapted = model.decoder.blocks[0].experts["und"].q
    adapted(x).square().sum().backward()
    a = adapted.lora_A["default"].weight.detach()
    expected = 3.0 * whole @ a.T
    assert torch.allclose(
        adapted.lora_B["default"].weight.grad, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
    )
    assert linear.weight.grad is None and not any(
        p.requires_grad for key, p in model.named_parameters() if "und.k.base" in key
    )
    assert {key.split(".")[4] for key, p in model.named_parameters() if p.requires_grad} == {"und"}


def test_under_autocast_no_copy_of_an_input_is_kept():
    """In bfloat16 with an adapter in float32: q, k and v keep the one input that they share."""
    model = toy().to(torch.bfloat16)
    model.add_adapter(config("und.attention"))
    move_trained(model)
    expert = model.decoder.blocks[0].experts["und"]
    x = torch.randn(7, 48, dtype=torch.bfloat16, requires_grad=True)
    kept = {}

    def keep(tensor):
        if tensor.shape == x.shape:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = [linear(x) for linear in (expert.q, expert.k, expert.v)]
    assert list(kept) == [x.data_ptr()]
    exact = [linear(x) for linear in (expert.q, expert.k, expert.v)]
    # one more rounding to bfloat16, of the smaller update
    assert all(torch.allclose(a, b, rtol=0.02, atol=0.02) for a, b in zip(y, exact, strict=True))


def test_several_adapters_are_switched_summed_and_combined(tmp_path):
    model = toy()
    base = hidden(model)
    single = {}
    for i, name in enumerate(("a", "b")):
        model.add_adapter(config("gen", "und", rank=2 + i, alpha=4), name=name)
        move_trained(model, seed=i)
        single[name] = hidden(model)
        model.save_adapter(tmp_path / name, name=name)
    assert model.adapters.names == ["a", "b"] and model.adapters.active == ["b"]
    model.set_adapter("a")
    assert torch.equal(hidden(model), single["a"])
    model.set_adapter([])
    assert torch.equal(hidden(model), base)
    model.set_adapter(["a", "b"])
    both = hidden(model)
    assert not close(both, single["a"]) and not close(both, single["b"])
    model.combine_adapters({"a": 1.0, "b": 1.0}, name="sum")
    assert close(hidden(model), both) and model.adapters.active == ["sum"]
    model.combine_adapters({"a": 0.5, "b": -2.0}, name="mixed")
    mixed = hidden(model)
    model.save_adapter(tmp_path / "mixed", name="mixed")
    model.unload_adapter(name="mixed")
    assert model.adapters.names == ["a", "b", "sum"] and torch.equal(hidden(model), base)
    model.set_adapter(["a", "b"])
    model.merge_adapter()
    assert close(hidden(model), both) and model.adapters.names == []
    other = toy()
    other.load_adapter(tmp_path / "mixed")
    other.merge_adapter()
    assert close(hidden(other), mixed)


def test_an_adapter_goes_on_being_trained_with_its_dropout(tmp_path):
    model = toy()
    model.add_adapter(config("gen", dropout=0.5))
    move_trained(model)
    model.save_adapter(tmp_path)
    model.unload_adapter()
    model.load_adapter(tmp_path, name="more", trainable=True)
    assert {key.split(".")[-2] for key, p in model.named_parameters() if p.requires_grad} == {"more"}
    assert torch.equal(hidden(model), hidden(model)), "no dropout in evaluation"
    model.train()
    assert not torch.equal(hidden(model), hidden(model))
    model.eval().load_adapter(tmp_path, name="still")
    assert not any(p.requires_grad for p in model.parameters())


@packs
def test_packed_and_rounded_linears_are_adapted_and_not_merged(tmp_path):
    wide = dict(hidden_size=512, num_attention_heads=4, intermediate_size=512)  # large enough to be packed
    model = toy(llm=wide)
    model.add_adapter(config("gen", "und"))
    move_trained(model)
    model.save_adapter(tmp_path)
    adapted = hidden(model)
    ours = optimize_for_cpu(model)  # of a model with adapters
    assert any(isinstance(one, PackedLinear) for one in ours.modules())
    assert close(hidden(ours), adapted)
    model.unload_adapter()
    packed = optimize_for_cpu(model)
    packed.load_adapter(tmp_path)
    assert close(hidden(packed), adapted)
    with pytest.raises(
        ValueError, match=r"und.q is packed or in few bits: merge the adapter into the model that this one"
    ):
        packed.merge_adapter()
    assert close(hidden(packed), adapted)
    rounded = optimize_for_cpu(model, int8=["decoder.blocks"])
    base = hidden(rounded)
    rounded.load_adapter(tmp_path)
    assert any(isinstance(one, QuantizedLinear) for one in rounded.modules())
    # the error of int8, about 1 % of each product, is that of the model without the adapter
    assert (hidden(rounded) - adapted).norm() < 0.05 * adapted.norm() < (hidden(rounded) - base).norm()
    rounded.unload_adapter()
    assert torch.equal(hidden(rounded), base)
    with pytest.raises(ValueError, match="in int8, which an adapter that is trained cannot be of"):
        rounded.add_adapter(config())
    model.add_adapter(config(dora=True), name="d")
    model.save_adapter(tmp_path / "dora", name="d")
    with pytest.raises(ValueError, match="in int8, which a DoRA cannot be of"):
        rounded.load_adapter(tmp_path / "dora")
    assert rounded.adapters.names == []


# ---- released linears that are one of ours


FUSED = KeyMap(Rename("out.{}", "proj.{}")) + equal_slices([f"{x}.{{}}" for x in "qkv"], "qkv.{}")
SHAPES = {"qkv": (12, 5), "proj": (4, 6)}


def update(n_outputs: int, n_inputs: int, rank: int = 2, scale: float = 2.0, *, seed: int = 0, dora: bool = False):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, n_inputs, generator=g), torch.randn(n_outputs, rank, generator=g)
    return LowRankUpdate(a, b, scale, torch.rand(n_outputs, generator=g) if dora else None)


def product(one: LowRankUpdate) -> torch.Tensor:
    return one.scale * one.b @ one.a


@pytest.mark.parametrize("dora", [False, True])
def test_ours_to_released_and_back_is_the_same(dora):
    ours = {"qkv": update(12, 5, dora=dora), "proj": update(4, 6, rank=3, dora=dora)}
    released = to_released(ours, [FUSED])
    assert {name: one.shape for name, one in released.items()} == {"q": (4, 5), "k": (4, 5), "v": (4, 5), "out": (4, 6)}
    back = from_released(released, SHAPES, [FUSED], "here")
    for name, one in ours.items():
        assert torch.equal(back[name].a, one.a) and torch.equal(back[name].b, one.b) and back[name].scale == one.scale
        assert (back[name].magnitude is None) == (not dora)
        if dora:
            assert torch.equal(back[name].magnitude, one.magnitude)


def test_released_updates_that_differ_are_put_together_exactly():
    """As where q and v alone were adapted, each with an a of its own."""
    given = {"q": update(4, 5, seed=1), "v": update(4, 5, rank=3, scale=0.5, seed=2)}
    found = from_released(given, SHAPES, [FUSED], "here")["qkv"]
    assert found.rank == 5
    expected = torch.cat((product(given["q"]), torch.zeros(4, 5), product(given["v"])))
    assert torch.allclose(product(found), expected, rtol=1e-6, atol=1e-6)
    only = from_released({"k": given["q"]}, SHAPES, [FUSED], "here")["qkv"]
    assert torch.equal(product(only)[4:8], product(given["q"])) and not product(only)[:4].any()


def test_a_dora_of_a_part_of_a_linear_is_refused():
    with pytest.raises(ValueError, match="DoRA of q alone: expected one of q, k, v, which are one linear here"):
        from_released({"q": update(4, 5, dora=True)}, SHAPES, [FUSED], "here")


def test_a_foreign_adapter_is_read(tmp_path):
    """With another alpha for some linears, and the root of the rank in the scale."""
    model = toy()
    model.add_adapter(config("gen.attention"))
    move_trained(model)
    model.save_adapter(tmp_path)
    product_before = product(model.adapters.updates("default")["decoder.blocks.1.experts.gen.k"])
    model.unload_adapter()
    path = tmp_path / "adapter_config.json"
    theirs = json.loads(path.read_text()) | {
        "auto_mapping": None,
        "use_rslora": True,
        "alpha_pattern": {r"1\.self_attn\.k_proj_moe_gen": 5},
    }
    path.write_text(json.dumps(theirs))
    model.load_adapter(tmp_path)
    updates = model.adapters.updates("default")
    scales = {name: one.scale for name, one in updates.items()}
    assert scales.pop("decoder.blocks.1.experts.gen.k") == pytest.approx(5 / 2**0.5)
    assert list(scales.values()) == pytest.approx([6 / 2**0.5] * len(scales))
    found = updates["decoder.blocks.1.experts.gen.k"]
    assert torch.allclose(product(found) / found.scale, product_before / 3)


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rank=0), "got rank 0"),
        (dict(rank=2.0), "got rank 2.0"),
        (dict(alpha=float("nan")), "got alpha nan"),
        (dict(dropout=1.0), r"expected a number in \[0, 1\)"),
        (dict(targets=()), "expected a tuple of names"),
        (dict(targets="gen"), "expected a tuple of names"),
        (dict(dora="yes"), "expected True or False"),
    ],
)
def test_wrong_numbers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_wrong_targets_and_names_are_refused():
    model = toy()
    with pytest.raises(ValueError, match=r"got the target 'q_proj': expected groups of linears, und, und.attention, "):
        model.add_adapter(config("q_proj"))
    with pytest.raises(ValueError, match="got the adapter 'x': expected one of none, since none is"):
        model.set_adapter("x")
    model.add_adapter(config())
    with pytest.raises(ValueError, match="there is an adapter 'default' already"):
        model.add_adapter(config())
    with pytest.raises(ValueError, match="expected a word without dots"):
        model.add_adapter(config(), name="a.b")
    with pytest.raises(ValueError, match="cannot save"):
        model.save_pretrained("never")
    blind = toy(top=dict(visual_und=False))
    with pytest.raises(ValueError, match="'vision', of which this model has no linear"):
        blind.add_adapter(config("vision"))


def test_an_adapter_with_nan_is_not_merged():
    model = toy()
    model.add_adapter(config())
    before = model.decoder.blocks[1].experts["gen"].q.weight.clone()
    with torch.no_grad():
        model.decoder.blocks[1].experts["gen"].q.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="blocks.1.experts.gen.q holds infinities or NaN"):
        model.merge_adapter()
    assert torch.equal(model.decoder.blocks[1].experts["gen"].q.weight, before) and model.adapters.names


def test_files_that_do_not_fit_are_refused(tmp_path):
    model = toy()
    model.add_adapter(config())
    model.save_adapter(tmp_path)
    model.unload_adapter()
    path, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    saved, tensors = json.loads(path.read_text()), load_file(weights)

    def refused(other, message, **changes):
        path.write_text(json.dumps(saved | changes))
        with pytest.raises(ValueError, match=message):
            other.load_adapter(tmp_path)
        assert other.adapters is None or other.adapters.names == []

    refused(toy(llm=dict(num_hidden_layers=3)), "is an adapter of a Bagel of another size")
    refused(toy(llm=dict(intermediate_size=96)), "its linears are 44 of 83,712 weights")
    refused(toy(llm=dict(intermediate_size=96)), r"\[80, 48\]: expected \[96, 48\]", auto_mapping=None)
    refused(model, "peft_type 'IA3': expected LORA", peft_type="IA3")
    refused(model, "has modules_to_save", modules_to_save=["lm_head"])
    refused(model, "has bias 'all'", bias="all")
    refused(model, "has init_lora_weights 'pissa', which changed the base model", init_lora_weights="pissa")
    refused(model, "has lora_alpha None", lora_alpha=None)
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(2)}, weights)
    refused(model, "which is no part of a LoRA")
    lost = next(key for key in tensors if "lora_B" in key)
    save_file({key: x for key, x in tensors.items() if key != lost}, weights)
    refused(model, "expected the matrices lora_A and lora_B")
    weights.unlink()
    refused(model, "no adapter_model.safetensors in")
    path.unlink()
    with pytest.raises(ValueError, match=r"no adapter_config.json in"):
        model.load_adapter(tmp_path)


def test_nothing_warns_and_the_layers_are_linears_again():
    model = toy()
    kinds = {name: type(module) for name, module in model.named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_adapter(config("und", "gen", "vision"))
        model.unload_adapter()
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert isinstance(model.decoder.blocks[0].experts["gen"].q, nn.Linear)
