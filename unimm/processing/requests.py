"""The arguments of a call: prompts, images, seeds, sizes and messages, read and checked."""

from collections.abc import Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ImageInput = Image.Image | str | Path
Message = Mapping[str, Any]  # {"role": "user" or "assistant", "content": str, "images": one, several or absent}


def parse_prompts(prompt: Any) -> list[str]:
    """A text, or a list of them, as a list. Raises ValueError for anything else, and for halves of characters."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"got {prompt!r:.80} for a prompt: expected a text, or a list of texts")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"got a prompt that is no text: {error}; decode it with errors='replace'") from error
    return list(texts)


def parse_requests(prompt: Any, images: Any) -> tuple[list[str], list[list]]:
    """Texts, and the pictures of each. Raises ValueError as `texts_of` and `pictures_of` do."""
    return parse_prompts(prompt), parse_images(images, prompt)


def to_python(value: Any) -> Any:
    """A number, or lists of them, in place of numpy's and torch's; anything else as it is."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic | torch.Tensor) else value


def broadcast(value: Any, n_prompts: int, noun: str) -> list:
    """One value a sample: a sequence, or an array, of n, or one value for all. Raises ValueError for another length."""
    value = to_python(value)
    values = [value] * n_prompts if isinstance(value, str) or not isinstance(value, Sequence) else list(value)
    if len(values) != n_prompts:
        raise ValueError(f"got {len(values)} {noun} for {n_prompts} prompts: give one, or one for each")
    return values


def expand_seeds(seed: int | Sequence[int], n_prompts: int, *, n_images: int = 1) -> list[int]:
    """A seed a sample, and for `copies` of each the ones after it; from one number, that number and the ones after it.

    Raises ValueError for a negative one, one of more than 63 bits, and for what is no whole number.
    """
    given = to_python(seed)
    try:
        if isinstance(given, Sequence):
            first = [index(one) for one in broadcast(given, n_prompts, "seeds")]
        else:
            first = [index(given) + n_images * i for i in range(n_prompts)]
    except TypeError:
        raise ValueError(f"got seed {seed!r}: expected a whole number, or one for each prompt") from None
    expanded = [one + i for one in first for i in range(n_images)]
    if wrong := [one for one in expanded if not 0 <= one < 2**63]:
        raise ValueError(f"got seed {wrong[0]}: expected 0 or more, and below 2^63")
    return expanded


def parse_images(images: Any, prompt: str | Sequence[str]) -> list[list]:
    """Input pictures as a list for each prompt: for one prompt a picture or several, for a batch one of these each.

    Raises ValueError for no prompts, and where the images are not one entry a prompt.
    """
    if isinstance(prompt, str):
        return [_as_list(images)]
    if not prompt:
        raise ValueError("got no prompts: expected at least one")
    if images is not None and (not isinstance(images, list | tuple) or len(images) != len(prompt)):
        n = len(prompt)
        raise ValueError(f"got images for {n} prompts: expected a list of {n}, each a picture, a list or None")
    return [[] for _ in prompt] if images is None else [_as_list(one) for one in images]


def _as_list(images: Any) -> list:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def parse_size(size: Any) -> tuple[int, int]:
    """(height, width) in pixels. Raises ValueError for anything else."""
    try:
        height, width = map(index, to_python(size))
    except (TypeError, ValueError):
        raise ValueError(f"got size {size!r}: expected (height, width) in pixels, for all pictures") from None
    return height, width


def check_size(size: tuple[int, int], stride: int, max_side: int) -> tuple[int, int]:
    """The (height, width) to draw. Raises ValueError, with the nearest that works, for other than multiples of stride."""
    wanted = parse_size(size)
    height, width = (min(max_side, max(stride, round(side / stride) * stride)) for side in wanted)
    if (height, width) != wanted:
        raise ValueError(
            f"cannot draw (height, width) {wanted}: expected multiples of {stride} up to {max_side}; "
            f"the nearest is {(height, width)}"
        )
    return height, width
