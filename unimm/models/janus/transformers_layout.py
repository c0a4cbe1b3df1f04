"""Janus's checkpoints in transformers' layout: their config as the original's, and back; the key map.

docs/originals/janus.md, "transformers layout" and "Key mapping". The defaults are those of JanusConfig in transformers.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from unimm.checkpoint.config_io import JsonLayout, PositiveInt, read_config, read_section, read_value
from unimm.checkpoint.json_files import JsonSection, at_place_of, drop_nulls
from unimm.checkpoint.keymap import KeyMap, Squeeze, equal_slices, renames
from unimm.encoders.timm_vit import RELEASED_VITS, TimmEncoderConfig, TimmViTConfig
from unimm.models.common.deepseek_processor import JanusSpecialTokens
from unimm.tokenizers.vq import VQConfig
from unimm.vlms.llama_layout import EXPERT, llama_key_map

CheckpointLayout = Literal["original", "transformers"]
ProjectorDepth = Annotated[int, range(1, 101)]
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
# the original's keys of the VQ tokenizer -> transformers'
VQ_KEYS = {
    "n_embed": "embed_dim",
    "ch": "base_channels",
    "ch_mult": "channel_multiplier",
    "num_res_blocks": "num_res_blocks",
    "z_channels": "latent_channels",
}
FIXED_FIELDS = ("hidden_act", "layer_norm_eps", "use_qk_norm", "attention_bias", "double_latent")


TOP_LAYOUT = JsonLayout(name="config.json", source="a released Janus in transformers' layout")
VIT_LAYOUT = JsonLayout(
    name="the vision_config",
    source=TOP_LAYOUT.source,
    keys={
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "patch_size": "patch_size",
        "mlp_ratio": "mlp_ratio",
    },
    defaults=VISION_DEFAULTS,
)
CODES_LAYOUT = JsonLayout(
    name="the vq_config",
    source=TOP_LAYOUT.source,
    keys={
        "n_codes": "num_embeddings",
        "code_dim": "embed_dim",
        "width": "base_channels",
        "channel_multipliers": "channel_multiplier",
        "n_res_blocks": "num_res_blocks",
        "latent_channels": "latent_channels",
    },
    defaults=VQ_DEFAULTS,
)


def original_from_transformers(files: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' config.json as the original's. Raises ValueError for what no release has and is not built."""
    llm = drop_nulls(read_section(files, "text_config", TOP_LAYOUT))
    llm = at_place_of(llm, {**TEXT_DEFAULTS, **llm, "tie_word_embeddings": False})
    vision = _with_defaults(files, "vision_config", VISION_DEFAULTS)
    vq = _with_defaults(files, "vq_config", VQ_DEFAULTS)
    _check_fixed("vision_config", vision, VISION_DEFAULTS)
    _check_fixed("vq_config", vq, VQ_DEFAULTS)
    dim = read_value(llm, "hidden_size", PositiveInt, layout=TOP_LAYOUT)
    size = read_value(vision, "image_size", PositiveInt, layout=VIT_LAYOUT)
    depth = read_value(vision, "depth", ProjectorDepth, layout=VIT_LAYOUT)
    gen_depth = read_value(vq, "num_hidden_layers", ProjectorDepth, layout=CODES_LAYOUT)
    head_dim = read_value(vq, "projection_dim", PositiveInt, layout=CODES_LAYOUT)
    vit = read_config(TimmViTConfig, vision, VIT_LAYOUT)
    codes = read_config(VQConfig, vq, CODES_LAYOUT)
    model_name = f"siglip_large_patch16_{size}"
    encoder: dict[str, Any] = {"image_size": size, "model_name": model_name}
    if vit != RELEASED_VITS.get(model_name):
        encoder |= {"model_name": "siglip"} | vit.to_json()
    head = {"image_token_embed": head_dim, "image_token_size": codes.n_codes, "n_embed": dim}
    return at_place_of(
        files,
        {
            "vision_config": {"params": encoder},
            "aligner_config": {"params": _projector(depth, vit.dim, dim)},
            "gen_vision_config": {"cls": "VQ-16", "params": codes.to_json()},
            "gen_aligner_config": {"params": _projector(gen_depth, codes.code_dim, dim)},
            "gen_head_config": {"params": head},
            # transformers' default is tied embeddings, but none of its files has them tied
            "language_config": llm,
            **({"generation": files["generation"]} if "generation" in files else {}),
        },
    )


def _with_defaults(files: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> JsonSection:
    section = read_section(files, name, TOP_LAYOUT, required=False)
    return at_place_of(section, {**defaults, **drop_nulls(section)})


def _check_fixed(name: str, section: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    wrong = [f"{key} {section[key]!r}" for key in FIXED_FIELDS if key in defaults and section[key] != defaults[key]]
    if wrong:
        raise ValueError(f"the {name} asks for {', '.join(wrong)}, which no release does and is not built")


def _projector(depth: int, dim_in: int, dim_out: int) -> dict[str, Any]:
    return {"projector_type": "mlp_gelu", "depth": depth, "input_dim": dim_in, "n_embed": dim_out}


def transformers_from_original(
    files: ConfigFiles, *, special_tokens: JanusSpecialTokens | None, image_token_id: int | None
) -> ConfigFiles:
    """The original's config.json and preprocessor_config.json as transformers', with its generation_config.json.

    Raises ValueError for what that layout cannot hold: an image head of another width than the model, another encoder.
    """
    top = files["config.json"]
    look = files["preprocessor_config.json"]
    encoder = TimmEncoderConfig.from_json(top["vision_config"]["params"])
    dim = top["language_config"]["hidden_size"]
    _check_expressible(top, encoder, dim)
    config: dict[str, Any] = {
        "architectures": ["JanusForConditionalGeneration"],
        "model_type": "janus",
        "tie_word_embeddings": False,
        "text_config": top["language_config"],
        "vision_config": _transformers_vision(top, encoder, dim),
        "vq_config": _transformers_vq(top, encoder, dim),
        "generation": top["generation"],
    }
    if image_token_id is not None:
        config["image_token_id"] = image_token_id
    side = {"height": look["image_size"], "width": look["image_size"]}
    look = {**look, "image_processor_type": "JanusImageProcessor", "processor_class": "JanusProcessor", "size": side}
    generation: dict[str, Any] = {
        "guidance_scale": top["generation"]["guidance"], "temperature": 1.0, "do_sample": True, "top_k": 0,
    }  # fmt: skip
    if special_tokens:
        generation |= {
            "bos_token_id": special_tokens.bos, "eos_token_id": special_tokens.eos, "pad_token_id": special_tokens.pad,
            "generation_kwargs": {"boi_token_id": special_tokens.boi},
        }  # fmt: skip
    return {"config.json": config, "preprocessor_config.json": look, "generation_config.json": generation}


def _check_expressible(top: Mapping[str, Any], encoder: TimmEncoderConfig, dim: int) -> None:
    advice = 'save it with layout="original"'
    if encoder.vit is None:
        raise ValueError(f"got the encoder {encoder.model_name}: transformers knows SigLIP alone; {advice}")
    names = ("aligner_config", "gen_aligner_config")
    if identities := [name for name in names if top[name]["params"]["projector_type"] == "identity"]:
        raise ValueError(f"got an identity as {identities[0]}: transformers has a linear at least; {advice}")
    head_dim = top["gen_head_config"]["params"]["image_token_embed"]
    if head_dim != dim:
        raise ValueError(
            f"got an image head of width {head_dim} in a model of width {dim}: transformers has one number for both; "
            f"{advice}"
        )


def _transformers_vision(top: Mapping[str, Any], encoder: TimmEncoderConfig, dim: int) -> dict[str, Any]:
    vit = encoder.vit
    assert vit is not None, "checked before"
    return VISION_DEFAULTS | {
        "hidden_size": vit.dim,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": vit.n_heads,
        "patch_size": vit.patch_size,
        "mlp_ratio": vit.mlp_ratio,
        "image_size": encoder.image_size,
        "projection_dim": dim,
        "depth": top["aligner_config"]["params"]["depth"],
        "model_type": "janus_vision_model",
        "num_image_tokens": (encoder.image_size // vit.patch_size) ** 2,
    }


def _transformers_vq(top: Mapping[str, Any], encoder: TimmEncoderConfig, dim: int) -> dict[str, Any]:
    codes = top["gen_vision_config"]["params"]
    vq = VQ_DEFAULTS | {"num_embeddings": codes["image_token_size"], "projection_dim": dim}
    vq |= {theirs: codes[ours] for ours, theirs in VQ_KEYS.items() if ours in codes}
    return vq | {
        "image_token_embed_dim": dim,
        "num_hidden_layers": top["gen_aligner_config"]["params"]["depth"],
        "model_type": "janus_vqgan",
        "num_patches": encoder.image_size // 2 ** (len(vq["channel_multiplier"]) - 1),
    }


def transformers_key_map(aligner_depth: int, gen_aligner_depth: int) -> KeyMap:
    """The key map of transformers' layout; the aligners have `aligner_depth` and `gen_aligner_depth` linears."""
    block = "model.vision_model.encoder.layers.{}."
    ours = "vision.trunk.blocks.{}."
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
    return vision + heads + vq + llama_key_map("model.language_model.", "lm_head", EXPERT)


VQ_STACKS = {"encoder": ("down", "downsample"), "decoder": ("up", "upsample")}
VQ_MID_BLOCKS = ((0, "block_1"), (1, "attn_1"), (2, "block_2"))


def _projector_names(released: str, ours: str, depth: int) -> dict[str, str]:
    """{released name: our name} of the `depth` linears of an aligner."""
    names = {released + "fc1.{}": ours + "layers.0.{}"}
    return names | {released + f"hidden_layers.{i}.{{}}": ours + f"layers.{2 * i + 2}.{{}}" for i in range(depth - 1)}
