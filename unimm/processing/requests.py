"""The arguments of a call, read and checked: prompts, images, messages, sizes, seeds, scales. Every family uses these.

A request is one prompt with its images; a batch is several. Every function raises ValueError with what was got and what
was expected.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unimm.generation.numbers import MOST, parse_float, parse_int, to_python
from unimm.processing.images.io import load_images
from unimm.tokenizers.text import check_text

ImageInput = Image.Image | str | Path
Message = Mapping[str, Any]  # {"role": "user" or "assistant", "content": str, "images": one, several or absent}
ROLES = ("user", "assistant")


# ---- prompts, images, messages


def parse_requests(prompt: Any, images: Any, *, allow_empty: bool = False) -> tuple[list[str], list[list[Image.Image]]]:
    """The prompts of a call, and the images of each; an empty prompt is refused unless `allow_empty`."""
    prompts = parse_prompts(prompt)
    if not allow_empty and any(not text.strip() for text in prompts):
        raise ValueError("got an empty prompt: expected at least a word")
    return prompts, parse_images(images, prompt)


def parse_prompts(prompt: Any) -> list[str]:
    """A text, or a list of them, as a list; text that is no valid Unicode (half a character) is refused."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"got {prompt!r:.80} for a prompt: expected a text, or a list of texts")
    return [check_text(text, "a prompt") for text in texts]


def parse_negative_prompts(given: Any, n_prompts: int) -> list[str]:
    """A negative prompt for each prompt, from one for all or one each; None is an empty one."""
    return [
        check_text("" if one is None else one, "negative_prompt")
        for one in broadcast(given, n_prompts, "negative prompts")
    ]


def parse_images(images: Any, prompt: str | Sequence[str], *, noun: str = "image") -> list[list[Image.Image]]:
    """The RGB images of each prompt: for one prompt an image or several, for a batch one of these (or None) each.

    All are loaded here, so that one that cannot be read is named by its place before anything is computed. noun: what
    the messages call one, "image" or "mask".
    """
    if isinstance(prompt, str):
        return [load_images(_as_list(images), noun=noun)]
    if not prompt:
        raise ValueError("got no prompts: expected at least one")
    if images is not None and (not isinstance(images, list | tuple) or len(images) != len(prompt)):
        n = len(prompt)
        got = f"{len(images)} {noun}s" if isinstance(images, list | tuple) else f"one {noun}"
        raise ValueError(f"got {got} for {n} prompts: expected a list of {n}, each an image, a list or None")
    given = [None for _ in prompt] if images is None else images
    return [load_images(_as_list(one), of=f"prompt {i + 1}", noun=noun) for i, one in enumerate(given)]


def parse_message(message: Message, *, placeholder: str, separator: str = "") -> tuple[str, str, list]:
    """Role, content and images of a message; the content has a `placeholder` for each image: see `place_images`."""
    known = isinstance(message, Mapping) and message.keys() <= {"role", "content", "images"}
    if not known or message.get("role") not in ROLES or not isinstance(message.get("content"), str):
        raise ValueError(
            f"got the message {message!r}: expected a dict of role ('user' or 'assistant'), content (a text), and, if "
            "any, images"
        )
    role = message["role"]
    images = _as_list(message.get("images"))
    content = check_text(message["content"], f"a message of the {role}")
    if not content.strip():
        raise ValueError(f"got an empty prompt: expected at least a word from the {role}")
    return role, place_images(content, images, placeholder=placeholder, separator=separator), images


def place_images(content: str, images: Sequence, *, placeholder: str, separator: str = "") -> str:
    """The content with one `placeholder` for each image: in front, each with the separator behind, unless it says
    where.
    """
    if placeholder not in content:
        content = (placeholder + separator) * len(images) + content
    if (n := content.count(placeholder)) != len(images):
        raise ValueError(
            f"got {n} {placeholder} for {len(images)} images: expected one for each; give as many images, or leave the "
            "placeholders out to have the images in front"
        )
    return content


def _as_list(images: Any) -> list:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


# ---- numbers


def broadcast(value: Any, n_prompts: int, noun: str) -> list:
    """One value for each prompt: from a sequence, or an array, of as many, or from one value for all."""
    value = to_python(value)
    values = [value] * n_prompts if isinstance(value, str | bytes) or not isinstance(value, Sequence) else list(value)
    if len(values) != n_prompts:
        raise ValueError(f"got {len(values)} {noun} for {n_prompts} prompts: give one, or one for each")
    return values


def parse_scales(value: Any, n_prompts: int, noun: str, *, n_images: int = 1) -> list[float]:
    """A guidance scale of 0 or more for each image, from one for all or one a prompt; images of a prompt share it."""
    scales = [parse_float(one, noun, "scales of 0 or more", low=0) for one in broadcast(value, n_prompts, noun)]
    return [scale for scale in scales for _ in range(n_images)]


def parse_n_images(n: Any) -> int:
    """The number of images of each prompt, at least 1."""
    return parse_int(n, "n", low=1, high=MOST, unit="image of each prompt")


def expand_seeds(seed: int | Sequence[int], n_prompts: int, *, n_images: int = 1) -> list[int]:
    """One seed for each image, prompt by prompt: from one number, that number and the ones after it, image by image;
    from one number a prompt, that number and the ones after it for the prompt's images.

    Whole numbers from 0 and below 2^63.
    """
    given = to_python(seed)
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        first = [parse_int(one, "seed") for one in broadcast(given, n_prompts, "seeds")]
    else:
        first = [parse_int(given, "seed") + n_images * i for i in range(n_prompts)]
    expanded = [one + i for one in first for i in range(n_images)]
    if wrong := [one for one in expanded if not 0 <= one < 2**63]:
        raise ValueError(f"got seed {wrong[0]}: expected 0 or more, and below 2^63")
    return expanded


def parse_size(size: Any) -> tuple[int, int]:
    """(height, width) in pixels."""
    sides = to_python(size)
    if not isinstance(sides, Sequence) or isinstance(sides, str | bytes) or len(sides) != 2:
        raise ValueError(f"got size {size!r:.80}: expected (height, width) in pixels, for all images")
    height, width = (parse_int(side, "size") for side in sides)
    return height, width


def check_size(size: tuple[int, int], stride: int, max_side: int) -> tuple[int, int]:
    """The (height, width) to generate, both multiples of `stride` up to `max_side`; the error names the nearest such
    size.
    """
    wanted = parse_size(size)
    height, width = (max(stride, round(min(max(side, 0), max_side) / stride) * stride) for side in wanted)
    if (height, width) != wanted:
        raise ValueError(
            f"cannot generate (height, width) {wanted}: expected multiples of {stride} up to {max_side}; "
            f"the nearest is {(height, width)}"
        )
    return height, width
