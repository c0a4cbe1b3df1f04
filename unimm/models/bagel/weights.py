"""BAGEL's key maps: the released names and ours."""

from collections.abc import Mapping

from unimm.checkpoint.keymap import KeyMap, Rename, renames

# what the released names of each expert's parameters end with
EXPERT_SUFFIXES = {"und": "", "gen": "_moe_gen"}


def _expert_names(names: Mapping[str, str]) -> dict[str, str]:
    """{released name: our name} of every expert; `*` in a released name stands for the expert's suffix."""
    return {
        f"language_model.model.layers.{{}}.{released.replace('*', suffix)}.{{}}": (
            f"decoder.blocks.{{}}.experts.{expert}.{ours}.{{}}"
        )
        for expert, suffix in EXPERT_SUFFIXES.items()
        for released, ours in names.items()
    }


DECODER_KEY_MAP = renames(
    {
        "language_model.model.embed_tokens.{}": "decoder.embed.{}",
        "language_model.lm_head.{}": "decoder.head.{}",
        "language_model.model.norm.{}": "decoder.norms.und.{}",
        "language_model.model.norm_moe_gen.{}": "decoder.norms.gen.{}",
        **_expert_names({"input_layernorm*": "attn_norm", "post_attention_layernorm*": "mlp_norm"}),
        **_expert_names({f"self_attn.{p}_proj*": p for p in "qkv"}),
        **_expert_names({"self_attn.o_proj*": "out_proj"}),
        **_expert_names({f"mlp*.{p}_proj": f"mlp.{p}" for p in ("gate", "up", "down")}),
    }
)
QK_NORM_KEY_MAP = renames(_expert_names({f"self_attn.{p}_norm*": f"{p}_norm" for p in "qk"}))
VIT_KEY_MAP = renames(
    {
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
)
LATENT_KEY_MAP = renames(
    {
        "time_embedder.{*}": "time_embedder.{*}",
        "vae2llm.{}": "vae2llm.{}",
        "llm2vae.{}": "llm2vae.{}",
        "latent_pos_embed.pos_embed": "latent_pos_embed",
    }
)
VAE_KEY_MAP = KeyMap(Rename("{*}", "vae.{*}"))
KEY_MAP = DECODER_KEY_MAP + QK_NORM_KEY_MAP + VIT_KEY_MAP + LATENT_KEY_MAP
