"""MetaQuery's key maps: the released names and ours."""

from pathlib import Path

from unimm.checkpoint.keymap import KeyMap
from unimm.checkpoint.load import HUB_WEIGHT_FILES, read_shapes, weight_files
from unimm.denoisers import sana
from unimm.models.metaquery.config import MetaQueryConfig
from unimm.models.metaquery.connector import CONNECTOR_KEY_MAP
from unimm.models.metaquery.mllms import MLLMSpec
from unimm.tokenizers.dc_ae import dc_ae_key_map


def read_folder_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a folder's weights; nothing where it has none."""
    return (
        read_shapes(weight_files(folder, HUB_WEIGHT_FILES))
        if any((folder / name).exists() for name in HUB_WEIGHT_FILES)
        else {}
    )


def metaquery_key_map(config: MetaQueryConfig, spec: MLLMSpec, *, with_head: bool) -> KeyMap:
    """The key map. with_head: whether the files hold a language head, apart from the table of embeddings."""
    connector = CONNECTOR_KEY_MAP.prefixed(ours="connector.")
    denoiser = sana.KEY_MAP.prefixed(released=DENOISER_PREFIX, ours="denoiser.")
    vae = dc_ae_key_map(config.vae).prefixed(released="vae.", ours="vae.")
    return spec.key_map(config.mllm, with_head=with_head) + connector + denoiser + vae


DENOISER_PREFIX = "model.transformer."  # what the released names of the painter's weights begin with
