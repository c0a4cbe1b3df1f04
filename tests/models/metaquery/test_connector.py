"""MetaQuery's connector: released names, the definition written out, and what training begins with."""

import json
import math

import pytest
import torch
from helpers.paths import GOLDEN
from safetensors.torch import save_file

from unimm.checkpoint.load import check_keys, load_weights
from unimm.checkpoint.save import released_state_dict
from unimm.models.metaquery.connector import SANA_CONDITION_SCALE, Connector, ConnectorConfig
from unimm.models.metaquery.weights import CONNECTOR_KEY_MAP

MANIFESTS = GOLDEN / "blocks" / "manifests.json"
SMALL = ConnectorConfig(dim=24, condition_dim=10, n_blocks=2, head_dim=8)


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = Connector(SMALL)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim != 2), std=0.3)
    return model.eval().requires_grad_(False)


def written_out(state: dict[str, torch.Tensor], x: torch.Tensor, cfg: ConnectorConfig) -> torch.Tensor:
    """One sample [N, D] under the released names, in float64, head by head."""

    def rms(x, weight, eps):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    w = {key.removeprefix("model.connector."): value.double() for key, value in state.items()}
    x, k = x.double(), cfg.head_dim
    angles = torch.arange(len(x)).double()[:, None] * 10000.0 ** (-torch.arange(k // 2).double() / (k // 2))
    for i in range(cfg.n_blocks):
        layer = {
            key.removeprefix(f"0.layers.{i}."): value for key, value in w.items() if key.startswith(f"0.layers.{i}.")
        }
        h, heads = rms(x, layer["input_layernorm.weight"], 1e-6), []
        for head in range(cfg.dim // k):
            at = slice(head * k, (head + 1) * k)
            q, key, v = (
                h @ layer[f"self_attn.{n}_proj.weight"][at].T + layer[f"self_attn.{n}_proj.bias"][at] for n in "qkv"
            )
            turned = []
            for y, name in ((q, "q"), (key, "k")):
                a, b = y[:, : k // 2], y[:, k // 2 :]
                y = torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), 1)
                turned.append(
                    y / y.norm(dim=1, keepdim=True) * layer[f"self_attn.{name}_norm.gamma"][head] * math.sqrt(k)
                )
            heads.append((turned[0] @ turned[1].T / math.sqrt(k)).softmax(1) @ v)
        x = x + torch.cat(heads, 1) @ layer["self_attn.o_proj.weight"].T
        h = rms(x, layer["post_attention_layernorm.weight"], 1e-6)
        gate, up = (h @ layer[f"mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ layer["mlp.down_proj.weight"].T
    x = torch.nn.functional.gelu(x @ w["1.weight"].T + w["1.bias"], approximate="tanh")
    return rms(x @ w["3.weight"].T + w["3.bias"], w["4.weight"], 1e-5)


@torch.inference_mode()
def test_equals_the_definition(small):
    x = torch.randn(3, 5, 24)
    found, state = small(x), released_state_dict(small, CONNECTOR_KEY_MAP)
    for i in range(3):
        # float32 against float64
        assert torch.allclose(found[i].double(), written_out(state, x[i], SMALL), atol=2e-4)
        assert torch.allclose(small(x[i : i + 1])[0], found[i], atol=1e-5)


def test_manifest_fits_the_released_model():
    manifest = json.loads(MANIFESTS.read_text())["connector_only_qwen3b"]
    shapes = {key.replace("{24}", str(i)): tuple(shape) for key, shape in manifest.items() for i in range(24)}
    with torch.device("meta"):
        model = Connector(ConnectorConfig(dim=2048, condition_dim=2304))
    assert sum(p.numel() for p in model.parameters()) == 1_620_990_720 and len(shapes) == 341
    state = model.state_dict()
    assert {
        name for one in check_keys(shapes, CONNECTOR_KEY_MAP, state, "here").values() for name in one.our_names
    } == set(state)


@torch.inference_mode()
def test_save_and_load(tmp_path, small):
    save_file(released_state_dict(small, CONNECTOR_KEY_MAP), tmp_path / "model.safetensors")
    with torch.device("meta"):
        again = Connector(SMALL)
    load_weights(
        again, [tmp_path / "model.safetensors"], CONNECTOR_KEY_MAP, dtype=torch.float32, device=torch.device("cpu")
    )
    x = torch.randn(2, 5, 24)
    assert torch.equal(again(x), small(x))


def test_what_training_begins_with():
    model = Connector(ConnectorConfig(dim=128, condition_dim=32, n_blocks=1))
    model.init_weights(torch.Generator().manual_seed(0))
    assert model.blocks[0].mlp.up.weight.std().item() == pytest.approx(0.014, rel=0.05)
    assert (
        not model.fc1.bias.any()
        and (model.norm.weight == SANA_CONDITION_SCALE).all()
        and SANA_CONDITION_SCALE**2 == pytest.approx(5.5)
    )
    assert (model.blocks[0].attention.q_scale == 1).all() and not model.blocks[0].attention.qkv.bias.any()
    model(torch.randn(2, 3, 128)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_refusals(small):
    with pytest.raises(ValueError, match="got dim 100, head_dim 64"):
        ConnectorConfig(dim=100, condition_dim=4)
    with pytest.raises(ValueError, match="expected positive"):
        ConnectorConfig(dim=64, condition_dim=0)
    with pytest.raises(ValueError, match=r"expected \[B, N, 24\]"):
        small(torch.zeros(2, 5, 23))
