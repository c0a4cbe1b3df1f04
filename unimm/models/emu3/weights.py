"""Emu3's key maps: the released names and ours."""

from unimm.checkpoint.keymap import Concat, KeyMap, renames
from unimm.models.emu3.transformers_layout import transformers_vq_key_map
from unimm.tokenizers.emu3_vq import Emu3VQConfig
from unimm.vlms.llama_layout import EXPERT, llama_key_map

HEAD_PARTS = ("decoder.head.text.weight", "decoder.head.visual.weight")


def language_key_map(prefix: str, head: str) -> KeyMap:
    """The key map of the language model, whose head is two parts of ours: rows of text, and of the codes."""
    body = llama_key_map(prefix, head, EXPERT).filtered(lambda entry: not entry.released.startswith(head))
    return body + KeyMap(Concat(f"{head}.weight", HEAD_PARTS))


def vision_tokenizer_key_map() -> KeyMap:
    """The key map of BAAI/Emu3-VisionTokenizer."""
    return renames({"{*}": "vq.{*}"})


def emu3_transformers_key_map(config: Emu3VQConfig, names: tuple[str, str, str]) -> KeyMap:
    """The key map of transformers' one file. names: of its language model, its head, and its vision tokenizer."""
    language, head, vq = names
    # the vision tokenizer first: its last entry takes any of its names
    return transformers_vq_key_map(config).prefixed(released=vq, ours="vq.") + language_key_map(language, head)
