"""JanusFlow: decoupled vision encoders, and rectified flow inside the language model."""

from unimm.models.release import FamilyFiles, Release

HUB = "deepseek-ai/JanusFlow-1.3B"
VERBS = ("generate", "understand", "chat")
RELEASES = {
    "janusflow-nano": Release(family="JanusFlow", hub=None, licence="Apache-2.0", parameters=6_147_955, verbs=VERBS),
    HUB: Release(family="JanusFlow", hub=HUB, licence="DeepSeek Model License", parameters=2_046_367_504, verbs=VERBS),
}
FILES = FamilyFiles(optional=("ae.safetensors", "vae_config.json", "preprocessor_config.json"))
