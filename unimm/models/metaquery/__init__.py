"""MetaQuery: learned queries of a frozen MLLM condition a diffusion transformer."""

from unimm.models.release import FamilyFiles, PartRelease, Release

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
QWEN = "Qwen/Qwen2.5-VL-{}B-Instruct"
# a denoiser and its autoencoder; repositories in several dtypes
SANA_PARAMETERS = 1_604_462_752 + 312_250_275
PARTS = (
    PartRelease(
        hub=QWEN.format(3),
        what="MLLM",
        licence="Qwen Research License",
        parameters=3_754_622_976,
        commercial=False,
        file_bytes=7_509_245_952,
    ),
    PartRelease(
        hub=QWEN.format(7), what="MLLM", licence="Apache-2.0", parameters=8_292_166_656, file_bytes=16_584_333_312
    ),
    *(
        PartRelease(
            hub=f"Efficient-Large-Model/Sana_1600M_{size}px_diffusers",
            what="denoiser, autoencoder",
            licence=SANA_LICENCE,
            parameters=SANA_PARAMETERS,
            commercial=False,
            subfolders=("transformer", "vae", "scheduler"),
        )
        for size in (512, 1024)
    ),
)
