"""The released layout of a Llama- or Qwen2-like language model: its config and its key map."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from unimm.checkpoint.config_io import JsonLayout, SameAs, read_config, write_config
from unimm.checkpoint.keymap import Ignore, KeyMap, Rename, renames
from unimm.nn.decoder import DecoderConfig

EXPERT = "all"  # the expert of a decoder that has one set of weights for all rows


DECODER_LAYOUT = JsonLayout(
    name="the language model's config",
    source="the released llm_config.json",
    keys={
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "mlp_dim": "intermediate_size",
        "vocab_size": "vocab_size",
        "max_positions": "max_position_embeddings",
        "rope_theta": "rope_theta",
        "norm_eps": "rms_norm_eps",
        "act": "hidden_act",
        "qk_norm": "qk_norm",
        "tie_word_embeddings": "tie_word_embeddings",
    },
)
# of a Llama: what LlamaConfig in transformers takes for missing keys, which Janus's releases leave out
LLAMA_LAYOUT = replace(
    DECODER_LAYOUT,
    source="every release",
    keys={**(DECODER_LAYOUT.keys or {}), "rope_theta": ("rope_parameters.rope_theta", "rope_theta")},
    defaults={
        "num_key_value_heads": SameAs("num_attention_heads"),
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "qk_norm": False,
    },
    fixed={
        "rope_scaling": None,
        "rope_parameters.rope_type": "default",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    },
    derived={"head_dim": "head_dim"},
)


def decoder_config_from_json(
    data: Mapping[str, Any],
    *,
    qkv_bias: bool,
    experts: tuple[str, ...],
    rope_sections: tuple[int, ...] = (),
    tie_word_embeddings: bool = False,
) -> DecoderConfig:
    """Read a Llama- or Qwen2-like config.json; the arguments are fields that it does not say. Raises ValueError for
    missing keys."""
    given = {
        "qkv_bias": qkv_bias,
        "experts": experts,
        "rope_sections": rope_sections,
        "tie_word_embeddings": tie_word_embeddings,
    }
    return read_config(DecoderConfig, data, DECODER_LAYOUT, given=given)


def llama_config_from_json(data: Mapping[str, Any], *, expert: str) -> DecoderConfig:
    """Read a Llama's config.json. Raises ValueError for missing keys, and for what no release has and is not
    supported."""
    data = {key: value for key, value in data.items() if value is not None}
    return read_config(DecoderConfig, data, LLAMA_LAYOUT, given={"qkv_bias": False, "experts": (expert,)})


def decoder_config_to_json(config: DecoderConfig) -> dict[str, Any]:
    """The mapping that `decoder_config_from_json` and `llama_config_from_json` read."""
    return write_config(config, DECODER_LAYOUT)


def llama_key_map(prefix: str, head: str, expert: str, *, has_head: bool = True) -> KeyMap:
    """The key map of a language model: its body's released names begin with `prefix`; `head` is the language head's.

    has_head: whether the model has a language head of its own; a file may hold one all the same.
    """
    layer = prefix + "layers.{}."
    block = f"decoder.blocks.{{}}.experts.{expert}."
    body = renames(
        {
            prefix + "embed_tokens.{}": "decoder.embed.{}",
            layer + "input_layernorm.{}": block + "attn_norm.{}",
            layer + "post_attention_layernorm.{}": block + "mlp_norm.{}",
            **{layer + f"self_attn.{p}_proj.{{}}": block + f"{p}.{{}}" for p in "qkv"},
            layer + "self_attn.o_proj.{}": block + "out_proj.{}",
            **{layer + f"mlp.{p}_proj.{{}}": block + f"mlp.{p}.{{}}" for p in ("gate", "up", "down")},
            prefix + "norm.{}": f"decoder.norms.{expert}.{{}}",
        }
    )
    no_head = Ignore(head + ".{}", because="the head is the table of embeddings, or the model has none")
    inv_freq = Ignore(
        layer + "self_attn.rotary_emb.inv_freq", because="a buffer of older files, computed from the config"
    )
    return body + KeyMap(Rename(head + ".{}", "decoder.head.{}") if has_head else no_head, inv_freq)
