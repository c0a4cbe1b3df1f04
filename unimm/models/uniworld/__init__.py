"""UniWorld-V1: a frozen MLLM's hidden states and SigLIP2's features condition FLUX."""

from unimm.models.release import Release

VERBS = ("generate", "understand", "chat", "respond")
HUB = "LanguageBind/UniWorld-V1"
LICENCE = "MIT; its painter is FLUX.1-dev's: FLUX.1 [dev] non-commercial"
RELEASES = {
    "uniworld-nano": Release(family="UniWorld", hub=None, licence="Apache-2.0", parameters=3_922_461, verbs=VERBS),
    HUB: Release(family="UniWorld", hub=HUB, licence=LICENCE, parameters=20_365_253_696, verbs=VERBS),
}
