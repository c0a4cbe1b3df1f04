"""UniWorld's key maps: the released names and ours."""

from unimm.checkpoint.keymap import Table
from unimm.denoisers import flux
from unimm.models.uniworld.config import TOWER, UniWorldConfig
from unimm.vlms.qwen2_5_vl.weights import qwen_keys


def keys(cfg: UniWorldConfig) -> Table:
    """Released names on the left, ours on the right."""
    rows = dict(qwen_keys(head=not cfg.reader.decoder.tied, ours="reader."))
    for name, ours in {"denoise": "from_reader", "siglip": "from_look", "vae": "from_latents"}.items():
        rows |= {f"{TOWER}{name}_projector.{i}.{{}}": f"{ours}.fc{fc}.{{}}" for i, fc in ((0, 1), (2, 2))}
    painter = {f"{TOWER}denoiser.{theirs}": f"painter.{target}" for theirs, target in flux.keys(cfg.painter).items()}
    return rows | painter
