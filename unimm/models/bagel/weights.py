"""BAGEL's key maps: the released names and ours."""

from collections.abc import Mapping

from unimm.checkpoint.keymap import KeyMap

# released names on the left, ours on the right
EXPERT_SUFFIXES = {"und": "", "gen": "_moe_gen"}


def _expert_keys(names: Mapping[str, str]) -> dict[str, str]:
    """A row for each expert: the generation expert's names end in _moe_gen."""
    theirs, ours = "language_model.model.layers.{{}}.{}.{{}}", "decoder.blocks.{{}}.experts.{}.{}.{{}}"
    rows = [
        (name.replace("*", suffix), stream, part)
        for stream, suffix in EXPERT_SUFFIXES.items()
        for name, part in names.items()
    ]
    return {theirs.format(name): ours.format(stream, part) for name, stream, part in rows}


DECODER_KEYS: KeyMap = {
    "language_model.model.embed_tokens.{}": "decoder.embed.{}",
    "language_model.lm_head.{}": "decoder.head.{}",
    "language_model.model.norm.{}": "decoder.norms.und.{}",
    "language_model.model.norm_moe_gen.{}": "decoder.norms.gen.{}",
    **_expert_keys({"input_layernorm*": "attn_norm", "post_attention_layernorm*": "mlp_norm"}),
    **_expert_keys({f"self_attn.{p}_proj*": p for p in "qkv"}),
    **_expert_keys({"self_attn.o_proj*": "out_proj"}),
    **_expert_keys({f"mlp*.{p}_proj": f"mlp.{p}" for p in ("gate", "up", "down")}),
}
QK_NORM_KEYS: KeyMap = _expert_keys({f"self_attn.{p}_norm*": f"{p}_norm" for p in "qk"})
VIT_KEYS: KeyMap = {
    "vit_model.vision_model.embeddings.patch_embedding.{}": "vision.patch_embed.{}",
    "vit_model.vision_model.embeddings.position_embedding.{}": "vision.pos_embed.{}",
    "vit_model.vision_model.encoder.layers.{}.layer_norm1.{}": "vision.blocks.{}.attn_norm.{}",
    "vit_model.vision_model.encoder.layers.{}.layer_norm2.{}": "vision.blocks.{}.mlp_norm.{}",
    "vit_model.vision_model.encoder.layers.{}.self_attn.q_proj.{}": "vision.blocks.{}.q.{}",
    "vit_model.vision_model.encoder.layers.{}.self_attn.k_proj.{}": "vision.blocks.{}.k.{}",
    "vit_model.vision_model.encoder.layers.{}.self_attn.v_proj.{}": "vision.blocks.{}.v.{}",
    "vit_model.vision_model.encoder.layers.{}.self_attn.out_proj.{}": "vision.blocks.{}.out_proj.{}",
    "vit_model.vision_model.encoder.layers.{}.mlp.{}.{}": "vision.blocks.{}.mlp.{}.{}",
    "vit_model.vision_model.post_layernorm.{}": "vision.norm.{}",
    "connector.{}.{}": "connector.{}.{}",
    "vit_pos_embed.pos_embed": "vit_pos_embed",
}
LATENT_KEYS: KeyMap = {
    "time_embedder.{*}": "time_embedder.{*}",
    "vae2llm.{}": "vae2llm.{}",
    "llm2vae.{}": "llm2vae.{}",
    "latent_pos_embed.pos_embed": "latent_pos_embed",
}
VAE_KEYS: KeyMap = {"{*}": "vae.{*}"}
KEYS: KeyMap = {**DECODER_KEYS, **QK_NORM_KEYS, **VIT_KEYS, **LATENT_KEYS}
