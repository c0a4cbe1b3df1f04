"""UniWorld's key maps: the released names and ours."""

from unimm.checkpoint.keymap import KeyMap
from unimm.denoisers import flux
from unimm.models.uniworld.config import DENOISE_TOWER, UniWorldConfig
from unimm.vlms.qwen2_5_vl.weights import qwen_key_map


def uniworld_key_map(config: UniWorldConfig) -> KeyMap:
    """Released names on the left, ours on the right."""
    rows = dict(qwen_key_map(head=not config.mllm.decoder.tie_word_embeddings, module_prefix="mllm."))
    for name, ours in {"denoise": "mllm_projector", "siglip": "siglip_projector", "vae": "vae_projector"}.items():
        rows |= {f"{DENOISE_TOWER}{name}_projector.{i}.{{}}": f"{ours}.fc{fc}.{{}}" for i, fc in ((0, 1), (2, 2))}
    painter = {
        f"{DENOISE_TOWER}denoiser.{theirs}": f"denoiser.{target}"
        for theirs, target in flux.flux_key_map(config.denoiser).items()
    }
    return rows | painter
