"""JanusFlow's sequences where it generates; conversations, special tokens and images are `DeepseekProcessor`'s.

An image to understand is preprocessed by `DeepseekVLImageProcessor`.

Axes: n tokens of an image, C channels, p patch (latents a token, along each side).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from unimm.sequence.parts import Part, image_part, position_gap, text_part


def noised_part(tokens: Tensor, boi: int, *, timestep: float) -> Part:
    """The tokens [n, p*p*C] of a latent to be noised up to a timestep; the time takes the row of the id before them.

    Later parts do not see it and their positions do not count it, so copies of an image at other timesteps may follow
    the same prompt, with the result of each alone.
    """
    part = image_part(
        "gen_image", tokens, torch.arange(len(tokens)), boundary_ids=(boi,), causal=True, timestep=timestep, noised=True
    )
    return replace(part, segment=replace(part.segment, advance=0))


def bos_unconditional(prompt: Sequence[Part]) -> list[Part]:
    """The unconditional prompt for classifier-free guidance: the prompt's first id, and a gap until where it ends."""
    length = sum(part.segment.length for part in prompt)
    return [text_part([int(prompt[0].ids[0])]), position_gap(length - 1)]
