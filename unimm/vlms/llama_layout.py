"""The released layout of a Llama- or Qwen2-like language model: its config and its key map."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from unimm.checkpoint.config_io import (
    JsonLayout,
    PositiveFloat,
    SameAs,
    read_config,
    read_section,
    read_value,
    write_config,
)
from unimm.checkpoint.json_files import JsonSection, at_place_of, drop_nulls
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
    defaults={
        "num_key_value_heads": SameAs("num_attention_heads"),
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "qk_norm": False,
    },
    fixed={"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False},
)
ROPE_KEYS = ("rope_scaling", "rope_parameters")  # transformers 5 writes the second, with rope_theta in it
# what these may hold and scale nothing, beside their type
PLAIN_ROPE_KEYS = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}


def rope_section(data: Mapping[str, Any], layout: JsonLayout, *, types: tuple[str, ...] = ("default",)) -> JsonSection:
    """What a language model's config says of its rotary positions, in any of the released spellings.

    Raises ValueError for scaled, partial or layer-wise ones, and for sliding windows: none of them is built. types:
    names of what is.
    """
    plain = PLAIN_ROPE_KEYS | ({"mrope_section"} if "mrope" in types else set())
    sections = [drop_nulls(read_section(data, key, layout, required=False)) for key in ROPE_KEYS]
    for name, section in zip(ROPE_KEYS, sections, strict=True):
        named = [read_value(section, key, str, layout=layout) for key in ("type", "rope_type") if key in section]
        if any(one not in types for one in named):
            raise _not_built(data, f"{name} of type {', '.join(dict.fromkeys(named))}", layout)
        # without a type, whatever else is there asks for something
        if any(isinstance(one, Mapping) for one in section.values()) or (not named and section.keys() - plain):
            raise _not_built(data, f"{name} {dict(section)!r:.200}", layout)
    for part in (*sections, data):
        if part.get("partial_rotary_factor") not in (None, 1):
            raise _not_built(data, f"partial_rotary_factor {part['partial_rotary_factor']!r:.80}", layout)
    if read_value(data, "use_sliding_window", bool, False, layout=layout):
        raise _not_built(data, "use_sliding_window", layout)
    layer_types = read_value(data, "layer_types", tuple[str, ...], (), layout=layout)
    if other := sorted(set(layer_types) - {"full_attention"}):
        raise _not_built(data, f"layer_types {', '.join(other)}", layout)
    return at_place_of(sections[1] or sections[0], {**sections[0], **sections[1]})


def _not_built(data: Mapping[str, Any], asked: str, layout: JsonLayout) -> ValueError:
    file = data.file if isinstance(data, JsonSection) and data.file else layout.name
    return ValueError(f"{file} asks for {asked}, which no release does and is not built: expected {layout.source}")


def decoder_config_from_json(
    data: Mapping[str, Any],
    *,
    qkv_bias: bool,
    experts: tuple[str, ...],
    rope_sections: tuple[int, ...] | None = None,
    tie_word_embeddings: bool = False,
    defaults: Mapping[str, Any] | None = None,
) -> DecoderConfig:
    """Read a Llama- or Qwen2-like config.json; the arguments are fields that it does not say. Raises ValueError for
    missing keys, and for rotary positions that are not built.

    rope_sections: of positions of several axes, where the file names none; None for positions of one axis. defaults:
    key -> the value that a file without it means.
    """
    layout = replace(DECODER_LAYOUT, defaults=defaults or {}, derived={"head_dim": "head_dim"})
    types = ("default",) if rope_sections is None else ("default", "mrope")
    rope = rope_section(data, layout, types=types)
    given: dict[str, Any] = {
        "qkv_bias": qkv_bias,
        "experts": experts,
        "tie_word_embeddings": tie_word_embeddings,
    }
    if rope_sections is not None:
        given["rope_sections"] = read_value(rope, "mrope_section", tuple[int, ...], rope_sections, layout=layout)
    return _read_decoder(data, rope, layout, given)


def llama_config_from_json(data: Mapping[str, Any], *, expert: str) -> DecoderConfig:
    """Read a Llama's config.json. Raises ValueError for missing keys, and for what no release has and is not
    supported."""
    data = drop_nulls(data)
    layout = replace(LLAMA_LAYOUT, derived={"head_dim": "head_dim"})
    return _read_decoder(data, rope_section(data, layout), layout, {"qkv_bias": False, "experts": (expert,)})


def _read_decoder(
    data: Mapping[str, Any], rope: Mapping[str, Any], layout: JsonLayout, given: dict[str, Any]
) -> DecoderConfig:
    """A language model's config, with the base of its rotary positions from where newer files have it."""
    if "rope_theta" in rope:
        given["rope_theta"] = read_value(rope, "rope_theta", PositiveFloat, layout=layout)
    if data.get("num_key_value_heads", 0) is None:  # as in transformers: as many as there are heads
        layout = replace(layout, defaults={**layout.defaults, "num_key_value_heads": SameAs("num_attention_heads")})
    return read_config(DecoderConfig, data, layout, given=given)


def read_token_ids(data: Mapping[str, Any], key: str, *, layout: JsonLayout) -> tuple[int, ...]:
    """An id, or a list of them, as released files have it; none where it is left out."""
    hint = tuple[int, ...] if isinstance(data.get(key), list) else int
    found = read_value(data, key, hint, (), layout=layout)
    return found if isinstance(found, tuple) else (found,)


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
