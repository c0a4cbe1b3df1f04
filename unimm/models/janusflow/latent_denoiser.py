"""The state of JanusFlow's images while they are denoised: the cached prompts of all branches, and guidance.

Axes: P images, B branches (with guidance two for an image), n latent tokens of an image.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unimm.generation.kv_cache import KVCache, allocate_kv_buffer, check_max_positions
from unimm.generation.step_cache import StepCacheOptions, row_step_cache
from unimm.generation.step_graphs import StepGraphs
from unimm.models.common.cfg_branches import CFGBranches
from unimm.nn.decoder import AttentionFn, Decoder
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
        step_cache: StepCacheOptions | None = None,
    ):
        """caches: one for each branch."""
        self.n_rows = 1 + n_tokens
        check_max_positions(decoder.config, max(cache.next_position for cache in caches) + self.n_rows)
        self.branches = branches
        self.velocity_scale = velocity_scale
        self.bf16_time = bf16_time
        self._device = decoder.embed.weight.device
        self._buffer = allocate_kv_buffer(decoder, caches, [self.n_rows] * len(caches))
        names = ["full"] * branches.n_images + ["no_text"] * len(branches.guided)
        owners = [*range(branches.n_images), *branches.guided]
        self.step_cache = row_step_cache(step_cache, list(zip(owners, names, strict=True)))
        self.graphs = StepGraphs(decoder, unless=step_cache is not None)
        self._all = list(range(len(caches)))
        self._plans: dict[tuple[int, ...], tuple[Tensor, AttentionFn]] = {}

    def hidden_states(self, x: Tensor, run_decoder: Callable[[Tensor, Tensor, AttentionFn], Tensor]) -> Tensor:
        """Embedded rows of the branches [B, 1 + n, D] -> their last hidden states [B, 1 + n, D].

        run_decoder: (rows [N, D], position ids [N], attention) -> [N, D]; the step cache spares that of some branches.
        """

        def compute(branches: list[int]) -> Tensor:
            position_ids, attend = self.plan(branches)
            rows = x if branches == self._all else x[torch.tensor(branches, device=x.device)]
            return run_decoder(rows.flatten(0, 1), position_ids, attend).unflatten(0, rows.shape[:2])

        return compute(self._all) if self.step_cache is None else self.step_cache.run(x, compute)

    def plan(self, branches: Sequence[int]) -> tuple[Tensor, AttentionFn]:
        """The position ids and the attention of the rows of some branches; kept for later steps."""
        key = tuple(branches)
        if key not in self._plans:
            prefixes = [self._buffer.prefix(i) for i in branches]
            segments = [[Segment(length=self.n_rows, attention="causal", advance=0)]] * len(key)
            layout = build_layout(segments, prefixes, device=self._device)
            self._plans[key] = layout.position_ids, self._buffer.attend(prefixes, layout.mask)
        return self._plans[key]

    def guided_velocity(self, velocities: Tensor) -> Tensor:
        """The velocities of the branches [B, C, H, W] float32 -> those of the images [P, C, H, W]."""
        return self.velocity_scale * self.branches.combine(velocities)


def bf16_velocity_scale(steps: int) -> float:
    """The ratio by which `steps` steps are longer together when each one's length 1 / steps is rounded to bfloat16."""
    return float(torch.tensor(1 / max(steps, 1)).bfloat16()) * steps
