"""MetaQuery's key maps: the released names and ours."""

from pathlib import Path

from unimm.checkpoint.keymap import KeyMap
from unimm.checkpoint.load import HUB_WEIGHT_FILES, read_shapes, weight_files
from unimm.denoisers import sana
from unimm.models.metaquery import connector
from unimm.models.metaquery.config import MetaQueryConfig
from unimm.models.metaquery.mllms import MLLMSpec
from unimm.tokenizers import dc_ae


def read_folder_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a folder's weights; nothing where it has none."""
    return (
        read_shapes(weight_files(folder, HUB_WEIGHT_FILES))
        if any((folder / name).exists() for name in HUB_WEIGHT_FILES)
        else {}
    )


def metaquery_key_map(config: MetaQueryConfig, spec: MLLMSpec, *, with_head: bool) -> KeyMap:
    """Released names on the left, ours on the right. head: whether the files hold a language head, which is untied."""
    rows = spec.key_map(config.mllm, with_head=with_head)
    rows |= {theirs: f"connector.{ours}" for theirs, ours in connector.CONNECTOR_KEY_MAP.items()}
    rows |= {DENOISER_PREFIX + theirs: f"denoiser.{ours}" for theirs, ours in sana.KEY_MAP.items()}
    rows |= {f"vae.{theirs}": f"vae.{ours}" for theirs, ours in dc_ae.dc_ae_key_map(config.vae).items()}
    return rows


DENOISER_PREFIX = "model.transformer."  # what the released names of the painter's weights begin with
