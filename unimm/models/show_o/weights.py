"""Show-o's key maps: the released names and ours."""

from unimm.checkpoint.keymap import Ignore, KeyMap, renames

LAYER = "showo.model.layers.{}."
BLOCK = "decoder.blocks.{}."
PROJECTOR = renames({"mm_projector.0.{}": "projector.fc1.{}", "mm_projector.2.{}": "projector.fc2.{}"})
# released names on the left, ours on the right
DECODER = renames(
    {
        "showo.model.embed_tokens.{}": "decoder.embed.{}",
        **{f"{LAYER}self_attn.{p}_proj.{{}}": f"{BLOCK}{p}.{{}}" for p in "qkv"},
        f"{LAYER}self_attn.dense.{{}}": f"{BLOCK}out_proj.{{}}",
        f"{LAYER}self_attn.q_layernorm.{{}}": f"{BLOCK}q_norm.{{}}",
        f"{LAYER}self_attn.k_layernorm.{{}}": f"{BLOCK}k_norm.{{}}",
        f"{LAYER}mlp.fc1.{{}}": f"{BLOCK}mlp.fc1.{{}}",
        f"{LAYER}mlp.fc2.{{}}": f"{BLOCK}mlp.fc2.{{}}",
        f"{LAYER}input_layernorm.{{}}": f"{BLOCK}norm.{{}}",
        "showo.model.final_layernorm.{}": "decoder.norm.{}",
        "showo.lm_head.{}": "decoder.head.{}",
    }
)
UNREAD = KeyMap(
    Ignore(f"{LAYER}self_attn.rotary_emb.inv_freq", because="a buffer of older files, computed from the config")
)


def show_o_key_map(*, with_clip: bool) -> KeyMap:
    """The key map of the decoder, and of CLIP's projector where the model has it."""
    return DECODER + (PROJECTOR if with_clip else KeyMap()) + UNREAD
