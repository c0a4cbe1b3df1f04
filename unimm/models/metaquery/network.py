"""MetaQuery's network: a frozen MLLM with learned queries, the connector and a denoiser."""
from torch import Tensor, nn

TINY_SPREAD = 1e-9  # of new rows of a table, of the covariance of the old ones


class LostHead(nn.Module):
    """In place of a language head that a checkpoint does not hold: MetaQuery draws without one."""

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("this checkpoint holds no language head: ask its `understand`, which takes the reader's own")
