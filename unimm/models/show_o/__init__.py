"""Show-o: text from left to right and masked image tokens in one transformer."""

from unimm.models.release import FamilyFiles, PartRelease, Release

VERBS = ("generate", "understand", "chat", "extend")
LICENCE = "Apache-2.0"
PARAMETERS = 1_448_176_770
PARAMETERS_WITH_CLIP = 1_454_472_322  # and the projector of CLIP's features


def _release(hub: str, parameters: int) -> Release:
    # all are believed to be in float32, which the released trainer keeps
    return Release(
        family="ShowO", hub=hub, licence=LICENCE, parameters=parameters, verbs=VERBS, file_bytes=4 * parameters
    )


RELEASES = {
    "showo-nano": Release(family="ShowO", hub=None, licence=LICENCE, parameters=2_976_427, verbs=VERBS),
    "showlab/show-o": _release("showlab/show-o", PARAMETERS),
    "showlab/show-o-512x512": _release("showlab/show-o-512x512", PARAMETERS),
    "showlab/show-o-512x512-wo-llava-tuning": _release("showlab/show-o-512x512-wo-llava-tuning", PARAMETERS),
    "showlab/show-o-w-clip-vit": _release("showlab/show-o-w-clip-vit", PARAMETERS_WITH_CLIP),
    "showlab/show-o-w-clip-vit-512x512": _release("showlab/show-o-w-clip-vit-512x512", PARAMETERS_WITH_CLIP),
}
# tokens of the images that each generates: their files may say another number, which the released code ignores
IMAGE_TOKENS = {name: 1024 if "512x512" in name else 256 for name, row in RELEASES.items() if row.hub}
VQ_HUB_ID = "showlab/magvitv2"
CLIP_HUB_ID = "openai/clip-vit-large-patch14-336"
TOKENIZER_HUB_ID = "microsoft/phi-1_5"
VQ_FOLDER = "magvitv2"
CLIP_FOLDER = "clip"
PHI_FOLDER = "phi"
FILES = FamilyFiles(optional_folders=(VQ_FOLDER, CLIP_FOLDER, PHI_FOLDER))
PARTS = (
    PartRelease(
        hub=VQ_HUB_ID,
        what="image tokenizer",
        licence="Apache-2.0",
        parameters=95_387_004,
        file_bytes=4 * 95_387_004,
    ),
    PartRelease(
        hub=CLIP_HUB_ID,
        what="vision encoder",
        licence="MIT",
        parameters=303_507_456,
        file_bytes=4 * 303_507_456,
    ),
)
