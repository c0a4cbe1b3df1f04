"""The key map of a Llama- or Qwen2-like language model."""

from unimm.checkpoint.keymap import KeyMap


def llama_key_map(prefix: str, head: str, stream: str) -> KeyMap:
    """Rows of a key table for a Llama: its body's names begin with `prefix`; the language head's name is `head`."""
    block = f"decoder.blocks.{{}}.experts.{stream}."
    return {
        prefix + "embed_tokens.{}": "decoder.embed.{}",
        prefix + "layers.{}.input_layernorm.{}": block + "attn_norm.{}",
        prefix + "layers.{}.post_attention_layernorm.{}": block + "mlp_norm.{}",
        **{prefix + f"layers.{{}}.self_attn.{p}_proj.{{}}": block + f"{p}.{{}}" for p in "qkv"},
        prefix + "layers.{}.self_attn.o_proj.{}": block + "out_proj.{}",
        **{prefix + f"layers.{{}}.mlp.{p}_proj.{{}}": block + f"mlp.{p}.{{}}" for p in ("gate", "up", "down")},
        prefix + "norm.{}": f"decoder.norms.{stream}.{{}}",
        head + ".{}": "decoder.head.{}",
        # buffers that older files hold
        prefix + "layers.{}.self_attn.rotary_emb.inv_freq": None,
    }
