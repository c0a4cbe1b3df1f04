"""The readers that MetaQuery can ask: their classes, their chat formats, and how their pictures are made ready.

docs/originals/metaquery.md, "Composition" and "Queries and prompt".
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from unimm.checkpoint.keymap import Table
from unimm.models.metaquery.processor import Template
from unimm.vlms.base import Reader
from unimm.vlms.llava_onevision.model import LlavaOneVision
from unimm.vlms.llava_onevision.weights import llava_keys
from unimm.vlms.qwen2_5_vl.model import QwenVL
from unimm.vlms.qwen2_5_vl.weights import qwen_keys

READER = "model.mllm_backbone."  # what the released names of a reader's weights begin with
OURS = "reader."
EMBED, QUERIES = OURS + "decoder.embed.", "queries"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of reader. pixels: whether the numbers of pixels of the original's own go in place of its config's."""

    home: type[Reader]
    template: Template
    named: Callable[[Any, bool], Table]  # (config, whether the files hold a language head) -> the key table
    pixels: bool

    def keys(self, cfg: Any, *, head: bool) -> dict[str, str | None]:
        """The key table of a reader inside a MetaQuery, whose table of embeddings holds the queries, too."""
        rows = self.named(cfg, head)
        return {table_name(theirs) if _embeds(ours) else theirs: _with_queries(ours) for theirs, ours in rows.items()}

    def table(self, cfg: Any) -> str:
        """The released name of the table of embeddings."""
        return next(table_name(theirs) for theirs, ours in self.named(cfg, True).items() if _embeds(ours))

    def head(self, cfg: Any) -> str:
        """What the released name of the language head begins with."""
        return self.table(cfg).replace("model.embed_tokens.weight", "lm_head.")


def _embeds(ours: str | None) -> bool:
    return ours is not None and ours.startswith(EMBED)


def table_name(theirs: str) -> str:
    """The name of the one tensor that a row of a table of embeddings stands for."""
    return theirs.replace("{}", "weight")


def _with_queries(ours: str | None) -> str | None:
    return f"{EMBED}weight + {QUERIES}" if _embeds(ours) else ours


def _qwen(cfg: Any, head: bool) -> Table:
    return qwen_keys(head=head, prefix=READER, ours=OURS)


def _llava(cfg: Any, head: bool) -> Table:
    return llava_keys(cfg, {}, head=head, prefix=READER, ours=OURS)


# by the model_type of the reader's config.json
READERS = {
    "qwen2_5_vl": Kind(
        home=QwenVL,
        template=Template(
            opening="<|im_start|>system\n{}<|im_end|>\n<|im_start|>",
            turn="user\n{pictures}{caption}<|im_end|>\n<|im_start|>assistant\n\n",
            shown="<|vision_start|><|image_pad|><|vision_end|>",
        ),
        named=_qwen,
        pixels=True,
    ),
    "llava_onevision": Kind(
        home=LlavaOneVision,
        template=Template(
            opening="<|im_start|>system \n{}<|im_end|><|im_start|>",
            turn="user {pictures}\n{caption}<|im_end|><|im_start|>assistant\n\n",
            shown="<image>",
        ),
        named=_llava,
        pixels=False,
    ),
}


def kind_of(reader: Any) -> Kind:
    """The kind of a reader, or of its config."""
    return next(kind for kind in READERS.values() if isinstance(reader, kind.home | kind.home.Config))


def kind_in(files: Mapping[str, Any]) -> Kind:
    """The kind that a reader's config.json describes. Raises ValueError for another model's."""
    name = files.get("model_type")
    if name not in READERS:
        raise ValueError(f"got a reader of model_type {name!r}: MetaQuery asks {' or '.join(READERS)}; correct mllm_id")
    return READERS[name]
