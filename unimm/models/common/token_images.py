"""Images step by step that are decoded from left to right: a step is a token, in rows that come and go.

Axes: P images, B branches (with guidance two for an image), D model.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from unimm.generation.decode_batch import DecodeBatch, DecodeRow
from unimm.generation.kv_cache import KVCache
from unimm.generation.stepwise import ImageBatch, ImageInProgress
from unimm.models.common.cfg_branches import CFGBranches
from unimm.nn.decoder import CausalDecoder

GREY = 127


class TokenImage(ImageInProgress):
    """An image on its way: the caches of its branches, and the embedded row of each [branches, D] that its next token
    comes after. n_steps: the rows that are fed."""

    def __init__(
        self,
        caches: Sequence[KVCache],
        next_rows: Tensor,
        *,
        scale: float,
        generator: torch.Generator,
        n_steps: int,
    ):
        self.caches = caches
        self.next_rows = next_rows
        self.scale = scale
        self.generator = generator
        self.n_steps = n_steps

    def grey_below(self, image: Image.Image, n_rows: int, of: int) -> Image.Image:
        """The image, grey below so many of its rows of tokens; the whole one at the end."""
        if not self.is_done:
            image.paste((GREY, GREY, GREY), (0, n_rows * (image.height // of), image.width, image.height))
        return image


class TokenImageBatch(ImageBatch):
    """Images whose tokens are decoded together, each at its own."""

    def __init__(self, decoder: CausalDecoder):
        self.batch = DecodeBatch(decoder)
        self._rows: dict[TokenImage, list[DecodeRow]] = {}

    @abstractmethod
    def choose(self, images: Sequence, branches: CFGBranches, hidden: Tensor) -> Tensor:
        """Choose the next token of each image, and note it; hidden [B, D] -> the embedded tokens [P, D]."""

    @torch.inference_mode()
    def advance(self, images: Sequence[ImageInProgress]) -> None:
        """One token of each image in one forward."""
        mine = [one for one in images if isinstance(one, TokenImage)]
        for gone in [one for one in self._rows if one not in mine]:
            for row in self._rows.pop(gone):
                self.batch.leave(row)
        for new in [one for one in mine if one not in self._rows]:
            self._rows[new] = [self.batch.join(cache, new.n_steps) for cache in new.caches]
        branches = CFGBranches.plan([one.scale for one in mine], self.batch.device)
        second = [mine[i] for i in branches.guided]
        rows = [self._rows[one][0] for one in mine] + [self._rows[one][1] for one in second]
        x = torch.stack([one.next_rows[0] for one in mine] + [one.next_rows[1] for one in second])
        embedded = self.choose(mine, branches, self.batch.append(rows, x))
        for image, row in zip(mine, embedded, strict=True):
            image.next_rows = row.expand(len(image.caches), -1)
            image.step += 1
