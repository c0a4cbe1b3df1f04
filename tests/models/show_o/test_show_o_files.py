"""The released layouts at full size, on meta, name by name; and transformers' Phi and CLIP as a second opinion."""

import json
import math

import pytest
import torch
from helpers.paths import GOLDEN
from helpers.tolerance import assert_close
from transformers import CLIPVisionConfig as PortCLIPConfig
from transformers import CLIPVisionModel, PhiForCausalLM
from transformers import PhiConfig as PortPhiConfig

from unimm import ShowO, ShowOConfig
from unimm.checkpoint.save import released_state_dict, released_tensors
from unimm.encoders.clip_vision import CLIPVisionConfig, CLIPVisionEncoder, clip_vision_key_map
from unimm.kernels import attention
from unimm.models.show_o import IMAGE_TOKENS, RELEASES
from unimm.models.show_o.weights import show_o_key_map
from unimm.sequence.packing import pack_sequences
from unimm.sequence.parts import text_part
from unimm.tokenizers import magvit_v2
from unimm.tokenizers.magvit_v2 import MagvitV2, MagvitV2Config

MANIFESTS = json.loads((GOLDEN / "show_o" / "manifests.json").read_text())
CONFIG = {
    "_class_name": "Showo",
    "vocab_size": 58498,
    "llm_vocab_size": 50295,
    "llm_model_path": "microsoft/phi-1_5",
    "codebook_size": 8192,
    "num_vq_tokens": 256,
    "load_from_showo": True,
    "mask_token_id": 58497,
    "w_clip_vit": False,
}


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released file: `{24}` stands for 0 to 23."""
    whole = {}
    for key, shape in MANIFESTS[name].items():
        head, brace, rest = key.partition("{")
        count, _, tail = rest.partition("}")
        whole |= {f"{head}{i}{tail}": tuple(shape) for i in range(int(count))} if brace else {key: tuple(shape)}
    return whole


def written(module, key_map) -> dict[str, tuple[int, ...]]:
    """Names and shapes as they would be saved."""
    return {name: x.shape for name, x in released_tensors(module, key_map).items()}


@pytest.mark.parametrize("with_clip", [False, True])
def test_every_released_name_and_no_other(with_clip):
    with torch.device("meta"):
        model = ShowO(ShowOConfig.from_json(CONFIG | {"w_clip_vit": with_clip}, {}))
    expected = manifest("showo_w_clip_vit" if with_clip else "showo")
    assert written(model, show_o_key_map(with_clip=with_clip)) == expected
    n = sum(math.prod(shape) for shape in expected.values())
    releases = [row for name, row in RELEASES.items() if row.hub and ("clip" in name) == with_clip]
    assert {row.parameters for row in releases} == {n}


def test_the_image_tokenizer_but_for_its_two_buffers():
    with torch.device("meta"):
        vq = MagvitV2(MagvitV2Config())
    expected = manifest("showo_magvitv2")
    buffers = {name for name in expected if name.startswith("quantize.")}
    assert buffers == {"quantize.embedding", "quantize.power_vals"}
    assert all(magvit_v2.KEY_MAP.ignores(name) for name in buffers)
    assert written(vq, magvit_v2.KEY_MAP) == {name: x for name, x in expected.items() if name not in buffers}


def test_clip_but_for_its_text_tower():
    config = dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    with torch.device("meta"):
        clip = CLIPVisionEncoder(CLIPVisionConfig.from_json(config))
    expected = manifest("clip_vit_large_patch14_336")
    key_map = clip_vision_key_map()
    vision = {
        name: x for name, x in expected.items() if name.startswith("vision_model.") and "position_ids" not in name
    }
    assert written(clip, key_map) == vision
    assert all(key_map.ignores(name) for name in expected.keys() - vision.keys())


def test_released_configs_are_read_and_written():
    config = ShowOConfig.from_json(CONFIG, {})
    assert (config.steps, config.guidance, config.token_grid) == (18, 2.75, (16, 16))
    large = ShowOConfig.from_json(CONFIG | {"num_vq_tokens": 1024}, {})
    assert (large.steps, large.guidance) == (50, 6.0) and config.for_image_tokens(1024) == large
    special = config.special_tokens
    assert (special.pad, special.soi, special.eoi, special.t2i, special.mmu) == (50295, 50296, 50297, 50300, 50301)
    assert (config.first_code_id, config.mask_token_id) == (50305, 58497)
    files = large.to_json()
    assert set(files) == {"config.json"} and ShowOConfig.from_json(files["config.json"], {}) == large
    assert {n for name, n in IMAGE_TOKENS.items() if "512" in name} == {1024}
    assert IMAGE_TOKENS.keys() == RELEASES.keys() - {"showo-nano"}


# ---- transformers


@pytest.mark.parametrize(("heads", "share"), [(4, 0.5), (2, 0.25), (3, 1.0)])
def test_the_decoder_equals_transformers_phi(heads, share):
    """At random toy sizes, under a causal mask and under the one of an image behind a text."""
    torch.manual_seed(heads)
    port_config = PortPhiConfig(
        vocab_size=150,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=heads,
        qk_layernorm=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": share},
        layer_norm_eps=1e-4,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    port = PhiForCausalLM(port_config).eval()
    for p in port.parameters():
        p.data = p.data + 0.1 * torch.randn(p.shape)
    phi = dict(
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        partial_rotary_factor=share,
        rope_theta=500.0,
        layer_norm_eps=1e-4,
        hidden_act="gelu_new",
        max_position_embeddings=64,
    )
    n_codes = 150 - 1 - 10 - 100
    config = CONFIG | dict(
        vocab_size=150, llm_vocab_size=100, codebook_size=n_codes, mask_token_id=149, num_vq_tokens=9
    )
    model = ShowO(ShowOConfig.from_json(config, phi)).eval()
    theirs = {f"showo.{name}": x for name, x in port.state_dict().items()}
    ours = released_state_dict(model, show_o_key_map(with_clip=False))
    assert ours.keys() == theirs.keys()
    for transform in show_o_key_map(with_clip=False).transforms:
        for name, parameter in model.named_parameters():
            if (match := transform.matched(name)) is not None:
                parameter.data.copy_(theirs[match.released])
    ids = torch.randint(0, 100, (7,))
    tokens = torch.randint(0, n_codes + 1, (9,))
    special = model.config.special_tokens
    parts = [text_part(ids.tolist()), model.processor.gen_image_part(tokens)]
    batch = pack_sequences([parts])
    row = torch.cat(
        (ids, torch.tensor([special.soi]), tokens + model.config.first_code_id, torch.tensor([special.eoi]))
    )
    seen = torch.ones(18, 18).tril().bool()
    seen[7:, :] = True
    with torch.no_grad():
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
        expected = port(row[None], attention_mask=mask, position_ids=torch.arange(18)[None]).logits[0]
        hidden = model.backbone(batch, lambda layer, q, k, v: attention(q, k, v, batch.layout.mask))
        assert_close(model.decoder.logits(next(iter(hidden.values()))), expected)


@pytest.mark.parametrize("heads", [2, 3])
def test_the_encoder_equals_transformers_clip(heads):
    torch.manual_seed(heads)
    numbers = dict(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=heads,
        image_size=20,
        patch_size=6,
        layer_norm_eps=1e-3,
    )
    port = CLIPVisionModel(PortCLIPConfig(**numbers)).eval()
    for p in port.parameters():
        p.data = p.data + 0.1 * torch.randn(p.shape)
    clip = CLIPVisionEncoder(CLIPVisionConfig.from_json(numbers)).eval()
    key_map = clip_vision_key_map(port.state_dict())
    for transform in key_map.transforms:
        for name, parameter in clip.named_parameters():
            if (match := transform.matched(name)) is not None:
                parameter.data.copy_(port.state_dict()[match.released])
    images = torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        states = port(images, output_hidden_states=True).hidden_states
        assert_close(clip(images), states[-2][:, 1:])
        assert_close(clip.hidden_states(images, 3), states[-1])
