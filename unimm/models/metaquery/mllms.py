"""The MLLMs that MetaQuery can be built around, one row each: config, network, processor and weights all need these
rows.

docs/originals/metaquery.md, "Composition" and "Queries and prompt".
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from unimm.checkpoint.keymap import Concat, Entry, KeyMap, Rename
from unimm.models.metaquery.processor import MLLMChatFormat
from unimm.vlms.base import VisionLanguageModel
from unimm.vlms.llava_onevision.model import LlavaOneVision
from unimm.vlms.llava_onevision.weights import llava_key_map
from unimm.vlms.qwen2_5_vl.model import QwenVL
from unimm.vlms.qwen2_5_vl.weights import qwen_key_map

RELEASED_PREFIX = "model.mllm_backbone."  # of the released names of the MLLM's weights
PREFIX = "mllm."
EMBED_PREFIX = PREFIX + "decoder.embed."
QUERIES_NAME = "queries"


@dataclass(frozen=True, kw_only=True)
class MLLMSpec:
    """A kind of MLLM.

    inner_key_map: (config, whether the files hold a language head) -> the key map of the MLLM alone. limits_pixels:
    whether MetaQuery's limits of an input image's pixels replace those in the MLLM's own config.
    """

    model_class: type[VisionLanguageModel]
    chat_format: MLLMChatFormat
    inner_key_map: Callable[[Any, bool], KeyMap]
    limits_pixels: bool

    def key_map(self, config: Any, *, with_head: bool) -> KeyMap:
        """The key map of the MLLM inside a MetaQuery, whose released embedding table ends with the queries."""
        entries = self.inner_key_map(config, with_head)
        embed_and_queries = Concat(self.embedding_key(config), (EMBED_PREFIX + "weight", QUERIES_NAME))
        return KeyMap(*(embed_and_queries if _is_embedding(entry) else entry for entry in entries))

    def embedding_key(self, config: Any) -> str:
        """The released name of the embedding table."""
        (entry,) = filter(_is_embedding, self.inner_key_map(config, True))
        return entry.released.replace("{}", "weight")

    def head_prefix(self, config: Any) -> str:
        """The prefix of the released name of the language head."""
        return self.embedding_key(config).replace("model.embed_tokens.weight", "lm_head.")


def _is_embedding(entry: Entry) -> bool:
    return isinstance(entry, Rename) and entry.ours.startswith(EMBED_PREFIX)


def _qwen2_5_vl_key_map(config: Any, with_head: bool) -> KeyMap:
    return qwen_key_map(head=with_head, prefix=RELEASED_PREFIX, module_prefix=PREFIX)


def _llava_onevision_key_map(config: Any, with_head: bool) -> KeyMap:
    return llava_key_map(config, {}, head=with_head, prefix=RELEASED_PREFIX, module_prefix=PREFIX)


# by the model_type of the MLLM's config.json
MLLMS = {
    "qwen2_5_vl": MLLMSpec(
        model_class=QwenVL,
        chat_format=MLLMChatFormat(
            before_system="system\n",
            between_messages="\n",
            before_images="user\n",
            after_images="",
        ),
        inner_key_map=_qwen2_5_vl_key_map,
        limits_pixels=True,
    ),
    "llava_onevision": MLLMSpec(
        model_class=LlavaOneVision,
        chat_format=MLLMChatFormat(
            before_system="system \n",
            between_messages="",
            before_images="user ",
            after_images="\n",
        ),
        inner_key_map=_llava_onevision_key_map,
        limits_pixels=False,
    ),
}


def mllm_spec_of(mllm: Any) -> MLLMSpec:
    """The row of an MLLM, or of its config."""
    return next(spec for spec in MLLMS.values() if isinstance(mllm, spec.model_class | spec.model_class.config_class))


def mllm_spec_for(data: Mapping[str, Any]) -> MLLMSpec:
    """The row of the MLLM that a config.json describes. Raises ValueError for another model's."""
    name = data.get("model_type")
    if not isinstance(name, str) or name not in MLLMS:
        raise ValueError(f"got an MLLM of model_type {name!r}: expected {' or '.join(MLLMS)}; correct mllm_id")
    return MLLMS[name]
