"""A sample of a family that answers in words and generates images of one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unimm.sequence.parts import Part


@dataclass(frozen=True, kw_only=True)
class ChatSample:
    """The rows of a sample. kind: of its loss. target: the image to generate, uint8 [h, w, 3], None for an answer.

    The tokens of a target are blank until its tokenizer has encoded the image. Where packing numbers the images their
    content is [n, 2], (0, the token's place in the image).
    """

    kind: str
    parts: Sequence[Part]
    target: NDArray[np.uint8] | None

    @property
    def n_tokens(self) -> int:
        """Its rows."""
        return sum(part.segment.length for part in self.parts)
