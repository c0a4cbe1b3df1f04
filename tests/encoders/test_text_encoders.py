"""CLIP's and T5's text encoders: the released names, transformers' own, what is pooled, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from helpers.cases import manifest
from helpers.tolerance import assert_close
from safetensors.torch import load_file, save_file

from unimm.checkpoint.load import CheckpointError, check_keys
from unimm.checkpoint.save import released_state_dict, released_tensors
from unimm.encoders import clip_text, t5
from unimm.encoders.clip_text import CLIPTextConfig, CLIPTextEncoder
from unimm.encoders.t5 import T5Config, T5Encoder, relative_position_buckets

CLIP = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20, vocab_size=50, max_position_embeddings=11,
    layer_norm_eps=1e-4, hidden_act="gelu", eos_token_id=2,
)  # fmt: skip
T5 = dict(
    d_model=20, num_layers=2, num_heads=3, d_kv=5, d_ff=26, vocab_size=40, relative_attention_num_buckets=12,
    relative_attention_max_distance=30, layer_norm_epsilon=1e-5, feed_forward_proj="gated-gelu",
)  # fmt: skip
# FLUX's
CLIP_L = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "eos_token_id": 2}
T5_XXL = {"d_model": 4096, "num_layers": 24, "num_heads": 64, "d_ff": 10240, "feed_forward_proj": "gated-gelu"}
KINDS = {
    "clip": (CLIPTextEncoder, CLIPTextConfig, CLIP, clip_text.clip_text_key_map(), CLIPTextEncoder.from_pretrained),
    "t5": (T5Encoder, T5Config, T5, t5.KEY_MAP, T5Encoder.from_pretrained),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def shaken(model):
    """Weights larger than usual, so that differences show."""
    torch.manual_seed(5)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.2 * torch.randn(x.shape))
    return model.eval()


def small(kind: str):
    build, config, files, _, _ = KINDS[kind]
    torch.manual_seed(4)
    return shaken(build(config.from_json(files))).requires_grad_(False)


def write(folder: Path, model, keys) -> Path:
    """A folder in the released layout."""
    (folder / "config.json").write_text(json.dumps(model.config.to_json()))
    save_file(released_state_dict(model, keys), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("kind", "name", "files", "n", "without"),
    [
        ("clip", "flux_clip_l_text", CLIP_L, 123_060_480, "text_model.encoder.layers.7.mlp.fc2.bias"),
        ("t5", "flux_t5_xxl_encoder", T5_XXL, 4_762_310_656, "encoder.block.3.layer.0.SelfAttention.k.weight"),
    ],
)
def test_manifests_fit_the_released_encoders(kind, name, files, n, without):
    build, config, _, keys, _ = KINDS[kind]
    shapes = manifest(name)
    with torch.device("meta"):
        model = build(config.from_json(files))
    state = model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == n
    assert {name for one in check_keys(shapes, keys, state, "here").values() for name in one.our_names} == set(state)
    assert {key: tuple(x.shape) for key, x in released_tensors(model, keys).items()} == shapes
    with pytest.raises(CheckpointError, match=f"missing keys: {without}"):
        check_keys({key: shape for key, shape in shapes.items() if key != without}, keys, state, "here")


@pytest.mark.parametrize("changes", [{}, {"eos_token_id": 45, "hidden_act": "quick_gelu", "num_attention_heads": 4}])
@torch.inference_mode()
def test_clip_equals_transformers(tmp_path, changes):
    from transformers import CLIPTextConfig, CLIPTextModel

    theirs = shaken(CLIPTextModel(CLIPTextConfig(**CLIP | changes)))
    theirs.save_pretrained(tmp_path)
    ours = CLIPTextEncoder.from_pretrained(tmp_path)
    # newer versions write the encoder without the name around it, which the released files have
    state = load_file(tmp_path / "model.safetensors")
    save_file({f"text_model.{key}": x for key, x in state.items()}, tmp_path / "model.safetensors")
    assert all(
        torch.equal(x, ours.state_dict()[key])
        for key, x in CLIPTextEncoder.from_pretrained(tmp_path).state_dict().items()
    )
    ids = torch.randint(3, 45, (3, 11))
    ids[0, 4:], ids[1, 10], ids[2, 6:] = 45, 45, 45
    ids[2, 2] = 49  # above the end: of the two rules only the older one looks for the largest id
    expected = theirs(ids)
    assert_close(ours(ids), expected.last_hidden_state)
    assert_close(ours.pool(ids), expected.pooler_output)
    assert torch.equal(ours.pool(ids), ours(ids)[[0, 1, 2], [4, 10, 6 if changes else 2]])


@torch.inference_mode()
def test_clip_of_a_whole_release(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    vision = dict(
        hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1, image_size=4, patch_size=2
    )
    theirs = shaken(CLIPModel(CLIPConfig(text_config=CLIP, vision_config=vision, projection_dim=6)))
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(0, 50, (2, 9))
    assert_close(CLIPTextEncoder.from_pretrained(tmp_path)(ids), theirs.text_model(ids).last_hidden_state)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"feed_forward_proj": "gated-silu", "num_heads": 4, "d_kv": 8},
        {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128},
    ],
)
@torch.inference_mode()
def test_t5_equals_transformers(tmp_path, changes):
    from transformers import T5Config as Theirs
    from transformers import T5EncoderModel

    theirs = shaken(T5EncoderModel(Theirs(**T5 | changes)))
    theirs.save_pretrained(tmp_path)
    ours = T5Encoder.from_pretrained(tmp_path)
    ids = torch.randint(0, 40, (2, 70))
    assert_close(ours(ids), theirs(ids).last_hidden_state)
    # and what we write, transformers reads
    again = T5EncoderModel.from_pretrained(write(tmp_path, ours, t5.KEY_MAP))
    assert all(torch.equal(x, theirs.state_dict()[key]) for key, x in again.state_dict().items())


@torch.inference_mode()
def test_t5_of_a_whole_release(tmp_path):
    """The half that writes is left unread."""
    from transformers import T5Config as Theirs
    from transformers import T5ForConditionalGeneration

    theirs = shaken(T5ForConditionalGeneration(Theirs(**T5, num_decoder_layers=1, decoder_start_token_id=0)))
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(0, 40, (1, 9))
    assert_close(T5Encoder.from_pretrained(tmp_path)(ids), theirs.encoder(ids).last_hidden_state)


@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (12, 30), (4, 2), (64, 500)])
def test_distances_equal_transformers(buckets, furthest):
    from transformers.models.t5.modeling_t5 import T5Attention

    apart = torch.arange(600)[None] - torch.arange(600)[:, None]
    expected = T5Attention._relative_position_bucket(apart, True, buckets, furthest)
    got = relative_position_buckets(600, buckets, furthest, torch.device("cpu"))
    assert torch.equal(got, expected) and got.unique().tolist() == [n for n in range(buckets) if n != buckets // 2]


@each_kind
@torch.inference_mode()
def test_save_and_load(tmp_path, kind):
    _, config, _, keys, load = KINDS[kind]
    model, ids = small(kind), torch.randint(0, 40, (2, 7))
    again = load(write(tmp_path, model, keys))
    assert (
        again.config == model.config == config.from_json(json.loads(json.dumps(model.config.to_json())))
        and not again.training
    )
    assert torch.equal(again(ids), model(ids))
    assert_close(model(ids[1:]), model(ids)[1:])
    half = load(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} == {half(ids).dtype}
    (tmp_path / "config.json").write_text(
        json.dumps(model.config.to_json() | {"num_hidden_layers": 3, "num_layers": 3})
    )
    with pytest.raises(CheckpointError, match=r"missing keys: .*\.2\."):
        load(tmp_path)


@each_kind
def test_gradients_reach_every_parameter(kind):
    model = small(kind).requires_grad_(True)
    model(torch.randint(0, 40, (2, 11))).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.inference_mode()
def test_who_sees_whom():
    """CLIP's ids see those before them; T5's see all, those of padding, too."""
    ids = torch.randint(3, 40, (1, 8))
    other = ids.clone()
    other[0, 5] = 1
    same = {kind: (small(kind)(ids) == small(kind)(other)).all(-1)[0].tolist() for kind in KINDS}
    assert same == {"clip": [True] * 5 + [False] * 3, "t5": [False] * 8}


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("clip", {"model_type": "siglip_text_model"}, "got model_type 'siglip_text_model', expected 'clip_text_model'"),
        ("clip", {"hidden_size": 25}, "a multiple of the heads"),
        ("clip", {"vocab_size": 0}, "got vocab_size 0 .*a positive whole number"),
        ("t5", {"model_type": "umt5"}, "got model_type 'umt5', expected 't5'"),
        ("t5", {"feed_forward_proj": "relu"}, r"got feed_forward_proj 'relu': expected gated-gelu.*v1\.1"),
        ("t5", {"relative_attention_num_buckets": 7}, "an even number of buckets"),
        ("t5", {"relative_attention_max_distance": 3}, "max_distance above a quarter"),
        ("t5", {"num_heads": 0}, "got num_heads 0 .*a positive whole number"),
    ],
)
def test_wrong_configs(kind, changes, words):
    _, config, files, _, _ = KINDS[kind]
    with pytest.raises(ValueError, match=words):
        config.from_json(files | changes)


def test_wrong_inputs():
    with pytest.raises(ValueError, match=r"got ids \[1, 12\]: expected \[B, L\], L from 1 to 11"):
        small("clip")(torch.zeros(1, 12, dtype=torch.long))
    with pytest.raises(ValueError, match=r"got ids \[3\]: expected \[B, L\]"):
        small("t5")(torch.zeros(3, dtype=torch.long))


def test_a_t5_whose_table_goes_by_its_other_name(tmp_path):
    model = small("t5")
    write(tmp_path, model, t5.KEY_MAP)
    weights = load_file(tmp_path / "model.safetensors")
    weights["encoder.embed_tokens.weight"] = weights.pop("shared.weight")
    save_file(weights, tmp_path / "model.safetensors")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(T5Encoder.from_pretrained(tmp_path)(ids), model(ids))


def test_an_activation_beside_the_feed_forwards_own():
    T5Config.from_json(T5 | {"dense_act_fn": "gelu_new"})
    with pytest.raises(
        ValueError, match="got dense_act_fn 'relu' beside feed_forward_proj 'gated-gelu': expected 'gelu_new'"
    ):
        T5Config.from_json(T5 | {"dense_act_fn": "relu"})
