"""What prefill and decoding need of a model with a causal decoder."""

from typing import Any, Protocol

import torch

from unimm.nn.decoder import Decoder, RowsByExpert
from unimm.sequence.packing import PackedBatch


class CausalLM(Protocol):
    """What a model brings to a context."""

    @property
    def decoder(self) -> Decoder: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def backbone(self, batch: PackedBatch, attend: Any) -> RowsByExpert:
        """Last hidden states of every row of a pack, by stream, before the final norms."""


def check_max_positions(model: CausalLM, position: int) -> None:
    """Raise ValueError for a position that the model does not know."""
    known = model.decoder.config.max_positions
    if position > known:
        raise ValueError(
            f"the dialogue would reach position {position}, the model knows {known}: shorten it, or max_tokens"
        )
