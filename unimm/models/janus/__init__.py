"""Janus and Janus-Pro: decoupled vision encoders on one autoregressive transformer."""

from unimm.models.release import FamilyFiles, Release

VERBS = ("generate", "understand", "chat")
LICENCE = "DeepSeek Model License"


def _release(hub: str, parameters: int) -> Release:
    # all are in bfloat16
    return Release(
        family="Janus", hub=hub, licence=LICENCE, parameters=parameters, verbs=VERBS, file_bytes=2 * parameters
    )


RELEASES = {
    "janus-nano": Release(family="Janus", hub=None, licence="Apache-2.0", parameters=7_396_843, verbs=VERBS),
    "deepseek-ai/Janus-1.3B": _release("deepseek-ai/Janus-1.3B", 2_089_297_547),
    "deepseek-ai/Janus-Pro-1B": _release("deepseek-ai/Janus-Pro-1B", 2_089_297_547),
    "deepseek-ai/Janus-Pro-7B": _release("deepseek-ai/Janus-Pro-7B", 7_420_434_059),
}
FILES = FamilyFiles(optional=("preprocessor_config.json",))
