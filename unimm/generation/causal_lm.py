"""What prefill and decoding need of a model with a causal decoder."""

from typing import Any, Protocol

import torch

from unimm.nn.decoder import Decoder, Parts
from unimm.sequence.packing import Pack


class Speaker(Protocol):
    """What a model brings to a context."""

    @property
    def decoder(self) -> Decoder: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def hidden(self, batch: Pack, attend: Any) -> Parts:
        """Last hidden states of every row of a pack, by stream, before the final norms."""


def check_position(model: Speaker, clock: int) -> None:
    """Raise ValueError for a position that the model does not know."""
    known = model.decoder.cfg.max_positions
    if clock > known:
        raise ValueError(
            f"the dialogue would reach position {clock}, the model knows {known}: shorten it, or max_tokens"
        )
