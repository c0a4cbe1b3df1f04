"""Janus's sequences where it generates; conversations, special tokens and images are `DeepseekProcessor`'s.

An image to understand is preprocessed by `DeepseekVLImageProcessor`. A prompt to generate from ends with the id that
begins an image, and the tokens of the image follow. docs/originals/janus.md, "Generation of image tokens".
"""

from collections.abc import Sequence

from unimm.sequence.parts import Part, text_part


def with_image_start(prompt: Sequence[Part], boi: int) -> list[Part]:
    """A prompt that ends with text, and behind it the id that begins an image."""
    *before, last = prompt
    return [*before, text_part([*last.ids.tolist(), boi])]


def padded_unconditional(prompt: Sequence[Part], pad: int) -> list[Part]:
    """The unconditional prompt for classifier-free guidance: as long as the prompt, pads between its two ends."""
    length = sum(part.segment.length for part in prompt)
    first = int(prompt[0].ids[0])
    last = int(prompt[-1].ids[-1])
    return [text_part([first, *[pad] * (length - 2), last])]
