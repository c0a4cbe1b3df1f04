"""MetaQuery: learned queries of a frozen MLLM condition a diffusion transformer."""

from unimm.models.release import FamilyFiles, Release

VERBS = ("generate", "understand", "chat")
# no official weights exist: https://github.com/facebookresearch/metaquery/issues/1
RELEASES = {
    "metaquery-nano": Release(family="MetaQuery", hub=None, licence="Apache-2.0", parameters=6_794_435, verbs=VERBS),
}
SANA_LICENCE = "NVIDIA License (NSCL v2-custom)"
FILES = FamilyFiles(
    # of the parts that a model may be made of, as their pages stated it in 2025
    non_commercial={
        "Qwen/Qwen2.5-VL-3B-Instruct": "Qwen Research License",
        "Efficient-Large-Model/Sana_600M_512px_diffusers": SANA_LICENCE,
        "Efficient-Large-Model/Sana_1600M_512px_diffusers": SANA_LICENCE,
        "Efficient-Large-Model/Sana_1600M_1024px_diffusers": SANA_LICENCE,
    },
)
