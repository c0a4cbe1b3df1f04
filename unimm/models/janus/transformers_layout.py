"""Janus's checkpoints as transformers lays them out: their config as the original's, and back; the key table.

docs/originals/janus.md, "transformers layout" and "Key mapping". The numbers for what a config leaves out are those of
its JanusConfig.
"""

from collections.abc import Mapping
from typing import Any, Literal

from unimm.checkpoint.keymap import KeyMap, Squeeze, equal_slices, renames
from unimm.encoders.timm_vit import RELEASED_VITS, TimmEncoderConfig, TimmViTConfig
from unimm.models.common.deepseek_processor import JanusSpecialTokens
from unimm.vlms.llama_layout import llama_key_map

CheckpointLayout = Literal["original", "transformers"]
ConfigFiles = dict[str, dict[str, Any]]

TEXT_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 16,
    "mlp_ratio": 4.0,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "use_qk_norm": False,
    "attention_bias": True,
    "projection_dim": 2048,
    "depth": 2,
}
VQ_DEFAULTS: dict[str, Any] = {
    "embed_dim": 8,
    "num_embeddings": 16384,
    "latent_channels": 256,
    "base_channels": 128,
    "channel_multiplier": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
    "projection_dim": 2048,
    "image_token_embed_dim": 2048,
    "num_hidden_layers": 2,
    "hidden_act": "gelu",
    "double_latent": False,
}
FIXED_FIELDS = ("hidden_act", "layer_norm_eps", "use_qk_norm", "attention_bias", "double_latent")


def original_from_transformers(files: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' config.json as the original's. Raises ValueError for what no release asks for and is not built."""
    llm, vision, vq = (
        TEXT_DEFAULTS | files["text_config"],
        VISION_DEFAULTS | files["vision_config"],
        VQ_DEFAULTS | files.get("vq_config", {}),
    )
    for name, asked, usual in (("vision_config", vision, VISION_DEFAULTS), ("vq_config", vq, VQ_DEFAULTS)):
        if wrong := [f"{key} {asked[key]!r}" for key in FIXED_FIELDS if key in usual and asked[key] != usual[key]]:
            raise ValueError(f"the {name} asks for {', '.join(wrong)}, which no release does and is not built")
    d = llm["hidden_size"]
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "mlp_ratio")
    vit = TimmViTConfig(
        **dict(zip(("dim", "n_layers", "n_heads", "patch_size", "mlp_ratio"), (vision[k] for k in sizes), strict=True))
    )
    name = f"siglip_large_patch16_{vision['image_size']}"
    params: dict[str, Any] = {"image_size": vision["image_size"], "model_name": name}
    if vit != RELEASED_VITS.get(name):
        params |= {"model_name": "siglip"} | vit.to_json()
    codes = {"image_token_size": vq["num_embeddings"], "n_embed": vq["embed_dim"], "ch": vq["base_channels"]}
    codes |= {
        "ch_mult": vq["channel_multiplier"],
        "num_res_blocks": vq["num_res_blocks"],
        "z_channels": vq["latent_channels"],
    }
    look = {"projector_type": "mlp_gelu", "depth": vision["depth"], "input_dim": vit.dim, "n_embed": d}
    draw = {"projector_type": "mlp_gelu", "depth": vq["num_hidden_layers"], "input_dim": vq["embed_dim"], "n_embed": d}
    head = {"image_token_embed": vq["projection_dim"], "image_token_size": vq["num_embeddings"], "n_embed": d}
    return {
        "vision_config": {"params": params},
        "aligner_config": {"params": look},
        "gen_vision_config": {"cls": "VQ-16", "params": codes},
        "gen_aligner_config": {"params": draw},
        "gen_head_config": {"params": head},
        # transformers ties the embeddings unless told, but no file of theirs has them tied
        "language_config": llm | {"tie_word_embeddings": False},
        **({"generation": files["generation"]} if "generation" in files else {}),
    }


def transformers_from_original(
    files: ConfigFiles, *, special_tokens: JanusSpecialTokens | None, image_token_id: int | None
) -> ConfigFiles:
    """The original's config.json and preprocessor_config.json as transformers', with its generation_config.json.

    Raises ValueError for what that layout cannot say: a code head of another width than the model, another encoder.
    """
    top, look = files["config.json"], files["preprocessor_config.json"]
    llm, head, codes = top["language_config"], top["gen_head_config"]["params"], top["gen_vision_config"]["params"]
    tower, aligners = (
        TimmEncoderConfig.from_json(top["vision_config"]["params"]),
        ("aligner_config", "gen_aligner_config"),
    )
    vit, d = tower.vit, llm["hidden_size"]
    if vit is None:
        raise ValueError(
            f'got the encoder {tower.model_name}: transformers knows SigLIP alone; save it with layout="original"'
        )
    if short := [name for name in aligners if top[name]["params"]["projector_type"] == "identity"]:
        raise ValueError(
            f'got an identity as {short[0]}: transformers has a linear at least; save it with layout="original"'
        )
    if head["image_token_embed"] != d:
        raise ValueError(
            f"got a code head of width {head['image_token_embed']} in a model of width {d}: transformers has one number "
            'for both; save it with layout="original"'
        )
    vision = dict(VISION_DEFAULTS) | {
        "hidden_size": vit.dim,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": vit.n_heads,
    }
    vision |= {
        "patch_size": vit.patch_size,
        "mlp_ratio": vit.mlp_ratio,
        "image_size": tower.image_size,
        "projection_dim": d,
    }
    vision |= {"depth": top["aligner_config"]["params"]["depth"], "model_type": "janus_vision_model"}
    vision |= {"num_image_tokens": (tower.image_size // vit.patch_size) ** 2}
    vq = dict(VQ_DEFAULTS) | {
        "embed_dim": codes["n_embed"],
        "num_embeddings": codes["image_token_size"],
        "projection_dim": d,
    }
    names = {"ch": "base_channels", "ch_mult": "channel_multiplier", "num_res_blocks": "num_res_blocks"}
    vq |= {theirs: codes[ours] for ours, theirs in {**names, "z_channels": "latent_channels"}.items() if ours in codes}
    vq |= {"image_token_embed_dim": d, "num_hidden_layers": top["gen_aligner_config"]["params"]["depth"]}
    vq |= {"model_type": "janus_vqgan", "num_patches": tower.image_size // 2 ** (len(vq["channel_multiplier"]) - 1)}
    config: dict[str, Any] = {"architectures": ["JanusForConditionalGeneration"], "model_type": "janus"}
    config |= {"tie_word_embeddings": False}
    config |= {"text_config": llm, "vision_config": vision, "vq_config": vq, "generation": top["generation"]}
    config |= {"image_token_id": image_token_id} if image_token_id is not None else {}
    side = {"height": look["image_size"], "width": look["image_size"]}
    look = {**look, "image_processor_type": "JanusImageProcessor", "processor_class": "JanusProcessor", "size": side}
    drawn: dict[str, Any] = {
        "guidance_scale": top["generation"]["guidance"],
        "temperature": 1.0,
        "do_sample": True,
        "top_k": 0,
    }
    if special_tokens:
        drawn |= {
            "bos_token_id": special_tokens.bos,
            "eos_token_id": special_tokens.eos,
            "pad_token_id": special_tokens.pad,
        }
        drawn |= {"generation_kwargs": {"boi_token_id": special_tokens.boi}}
    return {"config.json": config, "preprocessor_config.json": look, "generation_config.json": drawn}


def transformers_key_map(aligner_depth: int, gen_aligner_depth: int) -> KeyMap:
    """The key map of transformers' layout; the aligners have `aligner_depth` and `gen_aligner_depth` linears."""
    block, ours = "model.vision_model.encoder.layers.{}.", "vision.trunk.blocks.{}."
    vision = renames(
        {
            "model.vision_model.embeddings.patch_embedding.{}": "vision.trunk.patch_embed.proj.{}",
            **{block + f"layer_norm{i}.{{}}": ours + f"norm{i}.{{}}" for i in (1, 2)},
            block + "self_attn.projection_layer.{}": ours + "attn.proj.{}",
            block + "mlp.{}.{}": ours + "mlp.{}.{}",
            "model.vision_model.post_layernorm.{}": "vision.trunk.norm.{}",
        }
    )
    vision += KeyMap(Squeeze("model.vision_model.embeddings.position_embedding.weight", "vision.trunk.pos_embed"))
    vision += equal_slices([block + f"self_attn.{p}_proj.{{}}" for p in "qkv"], ours + "attn.qkv.{}")
    heads = renames(
        {
            **_projector_names("model.aligner.", "aligner.", aligner_depth),
            **_projector_names("model.generation_aligner.", "gen_aligner.", gen_aligner_depth),
            "model.generation_embeddings.{}": "gen_embed.{}",
            "model.generation_head.proj_out.{}": "gen_head.fc1.{}",
            "model.generation_head.vision_head.{}": "gen_head.fc2.{}",
        }
    )
    vq = renames(
        {
            "quantize.embedding.{}": "quantize.embedding.{}",
            **{
                f"{side}.mid.{theirs}.{{*}}": f"{side}.mid.{i}.{{*}}"
                for side in VQ_STACKS
                for i, theirs in VQ_MID_BLOCKS
            },
            **{
                f"{side}.{stack}.{{}}.{theirs}.{{*}}": f"{side}.conv_blocks.{{}}.{part}.{{*}}"
                for side, (stack, change) in VQ_STACKS.items()
                for theirs, part in (("block", "res"), ("attn", "attn"), (change, change))
            },
            **{f"{side}.{{}}.{{}}": f"{side}.{{}}.{{}}" for side in VQ_STACKS},
            **{f"{part}.{{}}": f"{part}.{{}}" for part in ("quant_conv", "post_quant_conv")},
        }
    ).prefixed(released="model.vqmodel.", ours="vq.")
    return vision + heads + vq + llama_key_map("model.language_model.", "lm_head", "all")


VQ_STACKS = {"encoder": ("down", "downsample"), "decoder": ("up", "upsample")}
VQ_MID_BLOCKS = ((0, "block_1"), (1, "attn_1"), (2, "block_2"))


def _projector_names(released: str, ours: str, depth: int) -> dict[str, str]:
    """{released name: our name} of the `depth` linears of an aligner."""
    names = {released + "fc1.{}": ours + "layers.0.{}"}
    return names | {released + f"hidden_layers.{i}.{{}}": ours + f"layers.{2 * i + 2}.{{}}" for i in range(depth - 1)}
