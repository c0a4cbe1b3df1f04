"""Emu3: images and text as tokens of one vocabulary, predicted from left to right."""

from unimm.models.release import FamilyFiles, PartRelease, Release

VERBS = ("generate", "understand", "chat")
LICENCE = "Apache-2.0"
VISION_TOKENIZER_HUB = "BAAI/Emu3-VisionTokenizer"
LANGUAGE_PARAMETERS = 8_492_011_520
VISION_TOKENIZER_PARAMETERS = 270_740_359


def _release(hub: str, *, parts: int = LANGUAGE_PARAMETERS) -> Release:
    # all are in float32
    return Release(family="Emu3", hub=hub, licence=LICENCE, parameters=parts, verbs=VERBS, file_bytes=4 * parts)


RELEASES = {
    "BAAI/Emu3-Gen": _release("BAAI/Emu3-Gen"),
    "BAAI/Emu3-Chat": _release("BAAI/Emu3-Chat"),
    "BAAI/Emu3-Stage1": _release("BAAI/Emu3-Stage1"),
    # transformers' layout, with the vision tokenizer
    "BAAI/Emu3-Gen-hf": _release("BAAI/Emu3-Gen-hf", parts=LANGUAGE_PARAMETERS + VISION_TOKENIZER_PARAMETERS),
    "BAAI/Emu3-Chat-hf": _release("BAAI/Emu3-Chat-hf", parts=LANGUAGE_PARAMETERS + VISION_TOKENIZER_PARAMETERS),
}
VISION_TOKENIZER_FOLDER = "vision_tokenizer"  # below a checkpoint of the original layout
FILES = FamilyFiles(
    downloads=("emu3.tiktoken", "emu3_vision_tokens.txt"),
    optional=("emu3.tiktoken", "emu3_vision_tokens.txt", "preprocessor_config.json"),
    optional_folders=(VISION_TOKENIZER_FOLDER,),
)
PARTS = (
    PartRelease(
        hub=VISION_TOKENIZER_HUB,
        what="vision tokenizer",
        licence=LICENCE,
        parameters=VISION_TOKENIZER_PARAMETERS,
        file_bytes=4 * VISION_TOKENIZER_PARAMETERS,
    ),
)
