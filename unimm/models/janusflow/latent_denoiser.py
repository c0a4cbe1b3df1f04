"""The state of JanusFlow's images while they are denoised: the cached prompts of all branches, and guidance.

Axes: P images, B branches (with guidance two for an image), n latent tokens of an image.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from unimm.generation.kv_cache import KVCache, allocate_kv_buffer, check_max_positions
from unimm.models.common.cfg_branches import CFGBranches
from unimm.nn.decoder import Decoder
from unimm.sequence.segments import Segment, build_layout


class JanusFlowLatentDenoiser:
    """The state that stays the same from step to step: the keys and values of the prompts, which do not depend on the
    time.

    Behind the cache of each branch the buffer has room for 1 + n rows, the time and the latent tokens, which every step
    overwrites. velocity_scale, bf16_time: see `JanusFlow.denoise`. Raises ValueError where the rows would reach a
    position beyond the decoder's last.
    """

    def __init__(
        self,
        decoder: Decoder,
        caches: Sequence[KVCache],
        branches: CFGBranches,
        n_tokens: int,
        *,
        velocity_scale: float = 1.0,
        bf16_time: bool = False,
    ):
        """caches: one for each branch."""
        n_rows = 1 + n_tokens
        check_max_positions(decoder.config, max(cache.next_position for cache in caches) + n_rows)
        buffer = allocate_kv_buffer(decoder, caches, [n_rows] * len(caches))
        prefixes = [buffer.prefix(i) for i in range(len(caches))]
        segments = [[Segment(length=n_rows, attention="causal", advance=0)]] * len(caches)
        layout = build_layout(segments, prefixes, device=decoder.embed.weight.device)
        self.branches = branches
        self.position_ids = layout.position_ids
        self.attend = buffer.attend(prefixes, layout.mask)
        self.velocity_scale = velocity_scale
        self.bf16_time = bf16_time

    def guided_velocity(self, velocities: Tensor) -> Tensor:
        """The velocities of the branches [B, C, H, W] float32 -> those of the images [P, C, H, W]."""
        return self.velocity_scale * self.branches.combine(velocities)


def bf16_velocity_scale(steps: int) -> float:
    """The ratio by which `steps` steps are longer together when each one's length 1 / steps is rounded to bfloat16."""
    return float(torch.tensor(1 / max(steps, 1)).bfloat16()) * steps
