"""Emu3's checkpoints in transformers' layout: their config as the original's, and back; the key map.

docs/originals/emu3.md, "transformers layout". The defaults are those of Emu3Config in transformers.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from unimm.checkpoint.config_io import JsonLayout, read_section, read_value
from unimm.checkpoint.json_files import JsonSection, at_place_of, drop_nulls
from unimm.checkpoint.keymap import KeyMap, Rename, Squeeze, renames
from unimm.models.emu3 import VISION_TOKENIZER_FOLDER
from unimm.models.emu3.text_tokenizer import UNUSED_TOKEN, Emu3SpecialTokens
from unimm.tokenizers.emu3_vq import Emu3VQConfig

CheckpointLayout = Literal["original", "transformers"]
TokenId = Annotated[int, range(2**31)]
ConfigFiles = dict[str, dict[str, Any]]

IMAGE_TOKEN = "<image>"  # what transformers calls UNUSED_TOKEN
VISUAL_TOKEN = "<|visual token {:06d}|>"
# the original's keys of the vision tokenizer -> transformers', where they differ
VQ_KEYS = {"z_channels": "latent_channels", "ch": "base_channels", "ch_mult": "channel_multiplier"}
VQ_DEFAULTS: dict[str, Any] = {
    "codebook_size": 32768,
    "embed_dim": 4,
    "latent_channels": 4,
    "double_latent": False,
    "in_channels": 3,
    "out_channels": 3,
    "temporal_downsample_factor": 4,
    "base_channels": 256,
    "channel_multiplier": [1, 2, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [3],
    "hidden_size": 1024,
    "num_attention_heads": 1,
    "attention_dropout": 0.0,
}
# names of the two parts, and of the language head, in files of two ages of transformers
RELEASED_NAMES = ("text_model.model.", "text_model.lm_head", "vqmodel.")
CURRENT_NAMES = ("model.text_model.", "lm_head", "model.vqmodel.")
TOP_LAYOUT = JsonLayout(name="config.json", source="a released Emu3 in transformers' layout")


def emu3_from_transformers(files: Mapping[str, Any]) -> JsonSection:
    """transformers' config.json as the original's, with the vision tokenizer's as a section.

    Raises ValueError for what no release has and is not built.
    """
    vocabulary = read_section(files, "vocabulary_map", TOP_LAYOUT)
    ids = {
        f"{name}_token_id": read_value(vocabulary, token, TokenId, layout=TOP_LAYOUT)
        for name, token in Emu3SpecialTokens.TOKENS.items()
    }
    kept = {key: files[key] for key in ("generation", "image_area") if key in files}
    language = read_section(files, "text_config", TOP_LAYOUT)
    return at_place_of(language, {**drop_nulls(language), **ids, **kept, VISION_TOKENIZER_FOLDER: _original_vq(files)})


def _original_vq(files: Mapping[str, Any]) -> JsonSection:
    section = read_section(files, "vq_config", TOP_LAYOUT, required=False)
    vq = at_place_of(section, {**VQ_DEFAULTS, **drop_nulls(section)})
    for key, expected in (("double_latent", False), ("num_attention_heads", 1)):
        if vq[key] != expected:
            raise ValueError(f"the vq_config asks for {key} {vq[key]!r:.80}, which no release does and is not built")
    theirs = {one: other for other, one in VQ_KEYS.items()}
    left_out = ("model_type", "double_latent", "hidden_size", "num_attention_heads", "attention_dropout")
    original = at_place_of(section, {theirs.get(key, key): x for key, x in vq.items() if key not in left_out})
    widths = attention_widths(Emu3VQConfig.from_json(original))
    if widths != {vq["hidden_size"]}:
        raise ValueError(
            f"the vq_config says hidden_size {vq['hidden_size']!r:.80}: expected {', '.join(map(str, sorted(widths)))}, "
            "the channels of the levels that attend; correct it"
        )
    return original


def attention_widths(config: Emu3VQConfig) -> set[int]:
    """The channels of the attentions of a vision tokenizer."""
    return {config.widths[-1], *(config.widths[level] for level in config.attention_levels)}


def emu3_to_transformers(
    files: ConfigFiles, *, vision_tokenizer: Emu3VQConfig, vocabulary: Mapping[str, int]
) -> ConfigFiles:
    """The original's config files as transformers', with its generation_config.json. vocabulary: ids by tokens.

    Raises ValueError for a vision tokenizer that the layout cannot hold: attentions of several widths.
    """
    top = files["config.json"]
    widths = attention_widths(vision_tokenizer)
    if len(widths) > 1:
        raise ValueError(
            f"got a vision tokenizer with attentions of {', '.join(map(str, sorted(widths)))} channels: transformers has "
            'one number for all; save it with layout="original"'
        )
    apart = ("architectures", "model_type", "generation", "image_area")
    ids = {key: top[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    special = {f"{name}_token_id" for name in Emu3SpecialTokens.TOKENS}
    language = {key: x for key, x in top.items() if key not in special and key not in apart}
    vq = {VQ_KEYS.get(key, key): x for key, x in vision_tokenizer.to_json().items()}
    vocabulary = {IMAGE_TOKEN if token == UNUSED_TOKEN else token: at for token, at in vocabulary.items()}
    config: dict[str, Any] = {
        "architectures": ["Emu3ForConditionalGeneration"],
        "model_type": "emu3",
        "tie_word_embeddings": False,
        "text_config": {**language, **ids, "model_type": "emu3_text_model"},
        "vq_config": {
            **{key: vq.get(key, default) for key, default in VQ_DEFAULTS.items()},
            "hidden_size": widths.pop(),
            "model_type": "emu3_vqgan",
        },
        "vocabulary_map": vocabulary,
        "generation": top["generation"],
        "image_area": top["image_area"],
    }
    if IMAGE_TOKEN in vocabulary:
        config["image_token_id"] = vocabulary[IMAGE_TOKEN]
    images = files[f"{VISION_TOKENIZER_FOLDER}/preprocessor_config.json"]
    images = {**images, "image_processor_type": "Emu3ImageProcessor", "processor_class": "Emu3Processor"}
    sampling = top["generation"]["image"]["sampling"]
    generation = {key: ids[key] for key in ("pad_token_id", "eos_token_id")}
    generation |= {"do_sample": True, "top_k": sampling["top_k"], "max_new_tokens": 50000}
    return {"config.json": config, "preprocessor_config.json": images, "generation_config.json": generation}


def vocabulary_of_ids(special_tokens: Emu3SpecialTokens, n_codes: int) -> dict[str, int]:
    """The ids of the tokens that transformers' model reads, by their strings, for a checkpoint without tokenizer."""
    ids = {token: getattr(special_tokens, name) for name, token in Emu3SpecialTokens.TOKENS.items()}
    return ids | {VISUAL_TOKEN.format(code): special_tokens.code0 + code for code in range(n_codes)}


def transformers_vq_key_map(config: Emu3VQConfig) -> KeyMap:
    """The key map of the vision tokenizer in transformers' layout; our names are the original's."""
    entries = KeyMap()
    for side, stack in (("encoder", "down"), ("decoder", "up")):
        levels = f"{side}.{stack}_block.{stack}"
        if config.attention_levels:
            entries += _attention_key_map(
                f"{levels}.{{}}.attn.{{}}", f"{levels}.{{}}.attn_norms.{{}}", f"{side}.{stack}.{{}}.attn.{{}}"
            )
        middle = f"{side}.middle_block"
        entries += _attention_key_map(f"{middle}.attn_1", f"{middle}.attn_norm", f"{side}.mid.attn_1")
        entries += renames({f"{levels}.{{*}}": f"{side}.{stack}.{{*}}", f"{middle}.{{*}}": f"{side}.mid.{{*}}"})
    return entries + renames({"{*}": "{*}"})


def _attention_key_map(released: str, released_norm: str, ours: str) -> KeyMap:
    """An attention, whose 1x1 convolutions are linears in transformers."""
    parts = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "proj_out"}
    weights = [Squeeze(f"{released}.{theirs}.weight", f"{ours}.{part}.weight") for theirs, part in parts.items()]
    biases = [Rename(f"{released}.{theirs}.bias", f"{ours}.{part}.bias") for theirs, part in parts.items()]
    return KeyMap(*weights, *biases, Rename(f"{released_norm}.{{*}}", f"{ours}.norm.{{*}}"))
