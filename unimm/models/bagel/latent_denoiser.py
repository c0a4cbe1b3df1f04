"""The state of BAGEL's images while they are denoised: cached contexts, guidance and step cache.

Axes: P images, N latent tokens of all images, L latent tokens of one, C channels of a latent token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from unimm.generation.guidance import Branch, Guidance, cfg_velocity, deduplicate_branches, guidance_branches
from unimm.generation.kv_cache import allocate_kv_buffer
from unimm.generation.step_cache import StepCacheOptions
from unimm.generation.step_graphs import StepGraphs
from unimm.models.bagel.cfg_contexts import CONTEXT_NAMES, CFGContexts
from unimm.models.bagel.processor import BagelProcessor
from unimm.nn.decoder import AttentionFn, Decoder, RowsByExpert
from unimm.sequence.segments import Segment, build_layout


@dataclass(frozen=True, eq=False)
class BranchRows:
    """The rows of one forward over some branches, each [boi] latent tokens [eoi] behind its cached context."""

    source: Tensor  # which of [all latent tokens; boi; eoi] each row holds
    position_ids: Tensor
    by_expert: RowsByExpert
    attend: AttentionFn
    lengths: tuple[int, ...]  # latent tokens of each branch


class LatentDenoiser:
    """Images that are denoised in one batch, each under up to three contexts: what stays the same from step to step.

    A branch is an image under one of its contexts. The caches of all branches lie in one buffer, with room behind each
    for its image's rows, which every step overwrites.
    """

    def __init__(
        self,
        decoder: Decoder,
        processor: BagelProcessor,
        contexts: Sequence[CFGContexts],
        grids: Sequence[tuple[int, int]],
        *,
        guidance: Sequence[Guidance],
        step_cache: StepCacheOptions | None = None,
    ):
        """grids: (height, width) of each image in latent tokens. step_cache: what spares forwards."""
        device = decoder.embed.weight.device
        special = processor.special_tokens
        self.guidance = list(guidance)
        self.step_cache = step_cache.start() if step_cache else None
        self.graphs = StepGraphs(decoder, unless=step_cache is not None)
        self.n_tokens = [height * width for height, width in grids]
        self.boundary_ids = torch.tensor([special.boi, special.eoi], device=device)
        self.position_ids = torch.cat([processor.latent_position_ids(*grid) for grid in grids]).to(device)
        # branches of one image with the same cache are computed once, as the first of them
        first: dict[tuple[int, int], Branch] = {}
        self.canonical: dict[Branch, Branch] = {}
        for i, name in product(range(len(contexts)), CONTEXT_NAMES):
            self.canonical[i, name] = first.setdefault((i, id(getattr(contexts[i], name))), (i, name))
        self._slots = {branch: slot for slot, branch in enumerate(first.values())}
        caches = [getattr(contexts[i], name) for i, name in self._slots]
        self._buffer = allocate_kv_buffer(decoder, caches, [self.n_tokens[i] + 2 for i, _ in self._slots])
        self._rows: dict[tuple[Branch, ...], BranchRows] = {}

    def branches(self, timesteps: Tensor) -> list[Branch]:
        """The branches whose velocities guidance needs, at the images' timesteps [P]."""
        return guidance_branches(self.guidance, timesteps)

    def states(
        self, branches: Sequence[Branch], tokens: Tensor, compute: Callable[[Sequence[Branch]], Sequence[Tensor]]
    ) -> dict[Branch, Tensor]:
        """The last hidden states of all branches [L, D], from the embedded latent tokens [N, D] of all images.

        compute: those of the branches that need a forward, equal ones once; the step cache makes the others.
        """
        inputs: dict[Branch, Tensor] = {}
        due = list(branches)
        if self.step_cache is not None:
            by_image = tokens.split(self.n_tokens)
            inputs = {branch: by_image[branch[0]] for branch in branches}
            due = self.step_cache.due(branches, inputs)
        unique = deduplicate_branches(due, self.canonical.__getitem__)
        states = dict(zip(unique, compute(unique), strict=True)) if unique else {}
        computed = {branch: states[self.canonical[branch]] for branch in due}
        return computed if self.step_cache is None else self.step_cache.update(branches, inputs, computed)

    def guide(self, velocities: Mapping[Branch, Tensor], timesteps: Tensor) -> Tensor:
        """The guided velocity of all images, packed [N, C], from that of every branch [L, C], at timesteps [P]."""
        return cfg_velocity(velocities, self.guidance, timesteps)

    def token_values(self, values: Tensor) -> Tensor:
        """One value an image [P] -> one a latent token [N]."""
        return values.repeat_interleave(torch.tensor(self.n_tokens, device=values.device))

    def token_timesteps(self, timesteps: Tensor) -> Tensor:
        """The images' timesteps [P] as the time embedding takes them, float32: [N], or [1] where all are equal."""
        # one row for all: less work, and the numbers of the released code to the bit
        same = bool((timesteps == timesteps[0]).all())
        values = timesteps[:1] if same else self.token_values(timesteps)
        return values.to(self.position_ids.device, torch.float32)

    def rows(self, branches: Sequence[Branch]) -> BranchRows:
        """The sources and the attention of the rows of a forward over these branches; kept for later steps."""
        key = tuple(branches)
        if key not in self._rows:
            self._rows[key] = self._plan_rows(key)
        return self._rows[key]

    def _plan_rows(self, branches: tuple[Branch, ...]) -> BranchRows:
        device = self.position_ids.device
        total = sum(self.n_tokens)
        lengths = tuple(self.n_tokens[i] for i, _ in branches)
        prefixes = [self._buffer.prefix(self._slots[branch]) for branch in branches]
        # nothing follows these rows: they are overwritten at the next step, and the position does not move past them
        segments = [[Segment(length=n + 2, attention="full", visible=False, advance=0)] for n in lengths]
        layout = build_layout(segments, prefixes, device=device)
        spans = torch.arange(total).split(self.n_tokens)
        boi = torch.tensor([total])
        eoi = torch.tensor([total + 1])
        source = torch.cat([torch.cat((boi, spans[i], eoi)) for i, _ in branches]).to(device)
        by_expert = {"und": (source >= total).nonzero().squeeze(1), "gen": (source < total).nonzero().squeeze(1)}
        attend = self._buffer.attend(prefixes, layout.mask)
        return BranchRows(source, layout.position_ids, by_expert, attend, lengths)
