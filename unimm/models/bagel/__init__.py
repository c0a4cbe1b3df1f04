"""BAGEL: Mixture-of-Transformers, generalized causal attention, rectified flow inside the language model."""

from unimm.models.release import FamilyFiles, Release

VERBS = ("generate", "understand", "interleave")
HUB = "ByteDance-Seed/BAGEL-7B-MoT"
RELEASES = {
    "bagel-nano": Release(family="Bagel", hub=None, licence="Apache-2.0", parameters=9_548_147, verbs=VERBS),
    HUB: Release(
        family="Bagel", hub=HUB, licence="Apache-2.0", parameters=14_691_079_811, verbs=VERBS, file_bytes=29_549_798_938
    ),
}
FILES = FamilyFiles(optional=("ae.safetensors", "llm_config.json", "vit_config.json"))
