"""JanusFlow: decoupled vision encoders, and rectified flow inside the language model."""

from unimm.models.release import FamilyFiles, PartRelease, Release

HUB = "deepseek-ai/JanusFlow-1.3B"
VERBS = ("generate", "understand", "chat")
RELEASES = {
    "janusflow-nano": Release(family="JanusFlow", hub=None, licence="Apache-2.0", parameters=6_147_955, verbs=VERBS),
    HUB: Release(
        family="JanusFlow",
        hub=HUB,
        licence="DeepSeek Model License",
        parameters=2_046_367_504,
        verbs=VERBS,
        file_bytes=2 * 2_046_367_504,
    ),
}
PARTS = (
    PartRelease(
        hub="stabilityai/sdxl-vae", what="autoencoder", licence="MIT", parameters=83_653_863, file_bytes=334_615_452
    ),
)
FILES = FamilyFiles(optional=("ae.safetensors", "vae_config.json", "preprocessor_config.json"))
