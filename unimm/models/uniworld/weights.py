"""UniWorld's key maps; those of the auxiliary encoders lie with these."""

from unimm.checkpoint.keymap import KeyMap, renames
from unimm.denoisers.flux import flux_key_map
from unimm.models.uniworld.config import DENOISE_TOWER, UniWorldConfig
from unimm.vlms.qwen2_5_vl.weights import qwen_key_map

# a dropout lies between the released head's layers 0 and 3
TASK_HEAD_KEY_MAP = renames({"0.{}": "task_head.fc1.{}", "3.{}": "task_head.fc2.{}"})


def uniworld_key_map(config: UniWorldConfig) -> KeyMap:
    """The key map of model.safetensors: the MLLM, the projectors and the denoiser."""
    mllm = qwen_key_map(head=not config.mllm.decoder.tie_word_embeddings, module_prefix="mllm.")
    projectors = renames(
        {
            f"{released}_projector.{i}.{{}}": f"{ours}_projector.fc{fc}.{{}}"
            for released, ours in {"denoise": "mllm", "siglip": "siglip", "vae": "vae"}.items()
            for i, fc in ((0, 1), (2, 2))
        }
    )
    denoiser = flux_key_map(config.denoiser).prefixed(released="denoiser.", ours="denoiser.")
    return mllm + (projectors + denoiser).prefixed(released=DENOISE_TOWER)
