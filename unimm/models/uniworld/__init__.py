"""UniWorld-V1: a frozen MLLM's hidden states and SigLIP2's features condition FLUX."""

from unimm.models.release import FamilyFiles, PartRelease, Release

VERBS = ("generate", "understand", "chat", "respond")
HUB = "LanguageBind/UniWorld-V1"
LICENCE = "MIT; its denoiser is FLUX.1-dev's: FLUX.1 [dev] non-commercial"
RELEASES = {
    "uniworld-nano": Release(family="UniWorld", hub=None, licence="Apache-2.0", parameters=6_648_141, verbs=VERBS),
    HUB: Release(
        family="UniWorld",
        hub=HUB,
        licence=LICENCE,
        parameters=20_365_253_696,
        verbs=VERBS,
        commercial=False,
        file_bytes=4 * 20_365_253_696,
    ),
}
FLUX_LICENCE = "FLUX.1 [dev] Non-Commercial License"
FILES = FamilyFiles(
    downloads=("task_head_final.pt",),
    optional=("task_head_final.pt", "task_head_final.safetensors", "preprocessor_config.json"),
    optional_folders=("siglip", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    # as the pages of the repositories stated it in 2025
    non_commercial={
        "black-forest-labs/FLUX.1-dev": FLUX_LICENCE,
        HUB: f"{FLUX_LICENCE}, which its denoiser was trained from",
    },
)
PARTS = (
    PartRelease(
        hub="black-forest-labs/FLUX.1-dev",
        what="denoiser, autoencoder, T5, CLIP",
        licence=FLUX_LICENCE,
        parameters=11_901_408_320 + 83_819_683 + 4_762_310_656 + 123_060_480,
        commercial=False,
        file_bytes=2 * (11_901_408_320 + 83_819_683 + 4_762_310_656 + 123_060_480),
        subfolders=("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    ),
    PartRelease(
        hub="google/siglip2-so400m-patch16-512",
        what="vision encoder",
        licence="Apache-2.0",
        parameters=428_772_800,
        file_bytes=4 * 428_772_800,
    ),
)
