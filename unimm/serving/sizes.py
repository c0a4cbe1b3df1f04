"""Sizes as OpenAI's clients write them."""

import re


def parse_openai_size(size: str | None) -> tuple[int, int] | None:
    """(height, width) of "WIDTHxHEIGHT"; None for "auto" and where none is given. Raises ValueError."""
    if size is None or size == "auto":
        return None
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size)
    if match is None:
        raise ValueError(f"got size {size!r:.40}: expected WIDTHxHEIGHT in pixels, as in 64x64, or 'auto'")
    return int(match[2]), int(match[1])
