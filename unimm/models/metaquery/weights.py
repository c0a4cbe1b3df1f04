"""MetaQuery's key maps: the released names and ours."""

from pathlib import Path

from unimm.checkpoint.keymap import Table
from unimm.checkpoint.load import HUB_WEIGHTS, read_shapes, weight_files
from unimm.denoisers import sana
from unimm.models.metaquery import connector
from unimm.models.metaquery.config import MetaQueryConfig
from unimm.models.metaquery.mllms import Kind
from unimm.tokenizers import dc_ae


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a folder's weights; nothing where it has none."""
    return (
        read_shapes(weight_files(folder, HUB_WEIGHTS)) if any((folder / name).exists() for name in HUB_WEIGHTS) else {}
    )


def keys(cfg: MetaQueryConfig, kind: Kind, *, head: bool) -> Table:
    """Released names on the left, ours on the right. head: whether the files hold a language head, which is untied."""
    rows = kind.keys(cfg.reader, head=head)
    rows |= {theirs: f"connector.{ours}" for theirs, ours in connector.KEYS.items()}
    rows |= {PAINTER + theirs: f"painter.{ours}" for theirs, ours in sana.KEYS.items()}
    rows |= {f"vae.{theirs}": f"vae.{ours}" for theirs, ours in dc_ae.keys(cfg.vae).items()}
    return rows


PAINTER = "model.transformer."  # what the released names of the painter's weights begin with
