"""MetaQuery's key maps."""

from unimm.checkpoint.keymap import KeyMap, equal_slices, renames
from unimm.denoisers import sana
from unimm.models.metaquery.config import MetaQueryConfig
from unimm.models.metaquery.mllms import MLLMSpec
from unimm.tokenizers.dc_ae import dc_ae_key_map

DENOISER_PREFIX = "model.transformer."  # of the released names of the denoiser's weights

_BLOCK_KEY_MAP = renames(
    {
        "self_attn.o_proj.weight": "attention.out_proj.weight",
        "self_attn.{}_norm.gamma": "attention.{}_scale",
        "mlp.{}_proj.weight": "mlp.{}.weight",
        "input_layernorm.weight": "attn_norm.weight",
        "post_attention_layernorm.weight": "mlp_norm.weight",
    }
) + equal_slices([f"self_attn.{name}_proj.{{}}" for name in "qkv"], "attention.qkv.{}")
CONNECTOR_KEY_MAP = _BLOCK_KEY_MAP.prefixed(released="model.connector.0.layers.{}.", ours="blocks.{}.") + renames(
    {
        "model.connector.1.{}": "fc1.{}",
        "model.connector.3.{}": "fc2.{}",
        "model.connector.4.weight": "norm.weight",
    }
)


def metaquery_key_map(config: MetaQueryConfig, spec: MLLMSpec, *, with_head: bool) -> KeyMap:
    """The key map of model.safetensors. with_head: whether it holds a language head apart from the embedding table."""
    connector = CONNECTOR_KEY_MAP.prefixed(ours="connector.")
    denoiser = sana.KEY_MAP.prefixed(released=DENOISER_PREFIX, ours="denoiser.")
    vae = dc_ae_key_map(config.vae).prefixed(released="vae.", ours="vae.")
    return spec.key_map(config.mllm, with_head=with_head) + connector + denoiser + vae
