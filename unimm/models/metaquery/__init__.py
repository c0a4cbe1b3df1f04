"""MetaQuery: learned queries of a frozen MLLM condition a diffusion transformer."""

from unimm.models.release import Release

VERBS = ("generate", "understand", "chat")
# no official weights exist: https://github.com/facebookresearch/metaquery/issues/1
RELEASES = {
    "metaquery-nano": Release(family="MetaQuery", hub=None, licence="Apache-2.0", parameters=3_133_475, verbs=VERBS),
}
