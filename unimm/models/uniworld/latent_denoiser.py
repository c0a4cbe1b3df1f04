"""UniWorld's latent denoiser: the state of denoising several images of one size.

Axes: P images, B rows (P, or 2 P under classifier-free guidance), L tokens of an image, M of a condition, C channels,
S steps, h w latent grid.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from unimm.denoisers.flux import FluxTransformer, flux_position_ids
from unimm.denoisers.mmdit import PATCH_SIZE, Modulation, patchify_latents
from unimm.generation.step_cache import StepCacheOptions, row_step_cache
from unimm.generation.step_graphs import StepGraphs
from unimm.models.uniworld.network import pad_conditions


class UniWorldLatentDenoiser:
    """Conditions, scales and modulations of P images of one size; gives their velocity, each image at its own timestep.

    Under classifier-free guidance the rows are twice the images: all with their conditions, then all with empty ones.
    """

    def __init__(
        self,
        flux: FluxTransformer,
        conditions: Sequence[Tensor],
        latent_size: tuple[int, int],
        *,
        pooled: Tensor,
        guidance: float | Tensor,
        true_cfg_scale: Tensor | None = None,
        reference_latents: Tensor | None = None,
        schedule: Tensor | None = None,
        step_cache: StepCacheOptions | None = None,
    ):
        """conditions [M, C] and pooled [P, C] of the images; latent_size (h, w), even; guidance, embedded: one, or [P].

        true_cfg_scale [P]: classifier-free, 1 or None is none. reference_latents [P, C, k h, w]: stand below the
        images. schedule [S]: timesteps that all images share; their modulations are computed here, all at once, which
        is a quarter of FLUX's weights read once in place of S times. Other timesteps are modulated at their step.
        """
        h, w = latent_size
        self.flux = flux
        self.n_tokens = h * w // PATCH_SIZE**2
        self.dtype = conditions[0].dtype
        self.device = conditions[0].device
        self.true_cfg_scale = None
        owners = [(i, "full") for i in range(len(conditions))]
        if true_cfg_scale is not None and bool((true_cfg_scale != 1).any()):
            self.true_cfg_scale = true_cfg_scale[:, None, None]
            conditions = [*conditions, *[conditions[0][:0]] * len(conditions)]
            owners += [(i, "no_text") for i, _ in owners]
            pooled = torch.cat((pooled, pooled))
            guidance = guidance.repeat(2) if isinstance(guidance, Tensor) and guidance.ndim else guidance
        self.step_cache = row_step_cache(step_cache, owners)
        self.graphs = StepGraphs(flux, unless=step_cache is not None)
        self.pooled = pooled.to(self.dtype)
        self.guidance = guidance if flux.config.guidance_embeds else None
        self.reference_tokens = None
        height = h
        if reference_latents is not None:
            self.reference_tokens = patchify_latents(reference_latents.to(self.device, self.dtype))
            height += reference_latents.shape[2]
        text, key_padding_mask = pad_conditions(conditions)
        position_ids = flux_position_ids(height // PATCH_SIZE, w // PATCH_SIZE).to(self.device)
        self.condition = flux.condition(text, position_ids, key_padding_mask=key_padding_mask)
        self.modulations: dict[float, Modulation] = {}
        if schedule is not None:
            self.modulations = dict(zip(schedule.tolist(), self._modulate(schedule), strict=True))

    def velocity(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Velocity of patchified latents [P, L, C] at timesteps [P], in float32 [P, L, C]."""
        tokens = x.to(self.dtype)
        if self.reference_tokens is not None:
            # a reference stays as it is at every step; its own velocity is not used
            tokens = torch.cat((tokens, self.reference_tokens), 1)
        modulation = self.modulation(timesteps)
        if self.true_cfg_scale is None:
            return self._velocity(tokens, modulation)
        v = self._velocity(torch.cat((tokens, tokens)), modulation)
        conditional, unconditional = v.chunk(2)
        return torch.lerp(unconditional, conditional, self.true_cfg_scale)

    def _velocity(self, tokens: Tensor, modulation: Modulation) -> Tensor:
        """The velocity of all rows in float32 [B, L, C], without the references'."""

        def step(tokens: Tensor, *tensors: Tensor) -> Tensor:
            shifts = modulation.with_tensors(tensors)
            return self.flux(tokens, self.condition, shifts, step_cache=self.step_cache)[:, : self.n_tokens].float()

        return self.graphs.run("step", step, tokens, *modulation.tensors())

    def modulation(self, timesteps: Tensor) -> Modulation:
        """The modulation of all rows at the images' timesteps [P], from the schedule where all are at one step of
        it."""
        distinct = timesteps.unique()
        if len(distinct) == 1:
            known = self.modulations.get(distinct.item())
            return known if known is not None else self._modulate(distinct)[0]
        rows = timesteps if self.true_cfg_scale is None else timesteps.repeat(2)
        return self._modulate(rows[None])[0]

    def _modulate(self, timesteps: Tensor) -> list[Modulation]:
        """A modulation a step: timesteps [S] of all rows, or [S, B]."""
        return self.flux.modulations(timesteps.to(self.device, torch.float32), self.pooled, guidance=self.guidance)
