"""The arguments of a call: prompts, images, seeds, sizes and messages, read and checked."""

from collections.abc import Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

Picture = Image.Image | str | Path
Turn = Mapping[str, Any]  # {"role": "user" or "assistant", "content": str, "images": one, several or absent}


def texts_of(given: Any) -> list[str]:
    """A text, or a list of them, as a list. Raises ValueError for anything else, and for halves of characters."""
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"got {given!r:.80} for a prompt: expected a text, or a list of texts")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"got a prompt that is no text: {error}; decode it with errors='replace'") from error
    return list(texts)


def asked(prompt: Any, images: Any) -> tuple[list[str], list[list]]:
    """Texts, and the pictures of each. Raises ValueError as `texts_of` and `pictures_of` do."""
    return texts_of(prompt), pictures_of(images, prompt)


def plain(value: Any) -> Any:
    """A number, or lists of them, in place of numpy's and torch's; anything else as it is."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic | torch.Tensor) else value


def each(value: Any, n: int, what: str) -> list:
    """One value a sample: a sequence, or an array, of n, or one value for all. Raises ValueError for another length."""
    value = plain(value)
    values = [value] * n if isinstance(value, str) or not isinstance(value, Sequence) else list(value)
    if len(values) != n:
        raise ValueError(f"got {len(values)} {what} for {n} prompts: give one, or one for each")
    return values


def seeds(seed: int | Sequence[int], n: int, *, copies: int = 1) -> list[int]:
    """A seed a sample, and for `copies` of each the ones after it; from one number, that number and the ones after it.

    Raises ValueError for a negative one, one of more than 63 bits, and for what is no whole number.
    """
    given = plain(seed)
    try:
        if isinstance(given, Sequence):
            first = [index(one) for one in each(given, n, "seeds")]
        else:
            first = [index(given) + copies * i for i in range(n)]
    except TypeError:
        raise ValueError(f"got seed {seed!r}: expected a whole number, or one for each prompt") from None
    found = [one + i for one in first for i in range(copies)]
    if wrong := [one for one in found if not 0 <= one < 2**63]:
        raise ValueError(f"got seed {wrong[0]}: expected 0 or more, and below 2^63")
    return found


def pictures_of(images: Any, prompt: str | Sequence[str]) -> list[list]:
    """Input pictures as a list for each prompt: for one prompt a picture or several, for a batch one of these each.

    Raises ValueError for no prompts, and where the images are not one entry a prompt.
    """
    if isinstance(prompt, str):
        return [_listed(images)]
    if not prompt:
        raise ValueError("got no prompts: expected at least one")
    if images is not None and (not isinstance(images, list | tuple) or len(images) != len(prompt)):
        n = len(prompt)
        raise ValueError(f"got images for {n} prompts: expected a list of {n}, each a picture, a list or None")
    return [[] for _ in prompt] if images is None else [_listed(one) for one in images]


def _listed(images: Any) -> list:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def sides(size: Any) -> tuple[int, int]:
    """(height, width) in pixels. Raises ValueError for anything else."""
    try:
        height, width = map(index, plain(size))
    except (TypeError, ValueError):
        raise ValueError(f"got size {size!r}: expected (height, width) in pixels, for all pictures") from None
    return height, width


def drawable(size: tuple[int, int], stride: int, most: int) -> tuple[int, int]:
    """The (height, width) to draw. Raises ValueError, with the nearest that works, for other than multiples of stride."""
    given = sides(size)
    height, width = (min(most, max(stride, round(side / stride) * stride)) for side in given)
    if (height, width) != given:
        raise ValueError(
            f"cannot draw (height, width) {given}: expected multiples of {stride} up to {most}; "
            f"the nearest is {(height, width)}"
        )
    return height, width
