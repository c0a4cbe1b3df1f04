"""Training BAGEL on rewards: Flow-GRPO, its noise drawn at a few steps.

The images of a group begin from one noise and go the same way until the first of a few neighbouring steps, at which
each draws noise of its own (`unimm.generation.flow_sde`); the rest are Euler's steps. Those few are what is trained:
the velocity moves towards what led to better images. Liu et al. 2025, arXiv 2505.05470 (Flow-GRPO); a window of steps
with noise: Li et al. 2025, arXiv 2507.21802 (MixGRPO).

Axes: P prompts, G images of each, S trained steps, L latent tokens of an image, C channels of one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from unimm.generation.flow import euler_step, flow_timesteps
from unimm.generation.flow_sde import flow_sde_mean, gaussian_log_prob
from unimm.generation.guidance import Guidance
from unimm.generation.noise import gaussian_noise, seeded_generators
from unimm.kernels import attention
from unimm.kernels.cfg_combine import cfg_combine_reference
from unimm.models.bagel.latent_denoiser import LatentDenoiser
from unimm.models.bagel.model import Bagel
from unimm.processing.images.io import tensor_to_pil
from unimm.sequence.packing import pack_sequences
from unimm.sequence.parts import Part
from unimm.training.fields import AtLeastOne
from unimm.training.freezing import freeze
from unimm.training.tasks.grpo import GRPOTask, GRPOTrainingConfig, Rollout


@dataclass(frozen=True, kw_only=True)
class BagelGRPOTrainingConfig(GRPOTrainingConfig):
    """The recipe's `options`."""

    # steps of the sampler: fewer than for images that are kept
    steps: AtLeastOne
    # neighbouring steps at which noise is drawn, and which are trained
    noisy_steps: AtLeastOne
    # the first of them is one of so many, at random: early steps decide what is in an image
    first_noisy_steps: AtLeastOne
    # how much of the noise is drawn anew at such a step, 1: all of it
    noise_level: Annotated[float, Field(gt=0, le=1)]

    def __post_init__(self) -> None:
        super().__post_init__()
        # nothing is drawn at the last step, which ends at data
        if self.first_noisy_steps + self.noisy_steps > self.steps:
            raise ValueError(
                f"got first_noisy_steps {self.first_noisy_steps} and noisy_steps {self.noisy_steps}, expected at most "
                f"{self.steps} together, the number of steps"
            )


@dataclass(frozen=True, kw_only=True)
class BagelRollout(Rollout):
    """The states between which noise was drawn."""

    # S + 1 of them [P, G, L, C]
    states: tuple[Tensor, ...]
    # of the states
    timesteps: tuple[float, ...]


class BagelGRPOTask(GRPOTask):
    """BAGEL on rewards of images from texts."""

    name = "bagel_grpo"
    FAMILY = Bagel
    OPTIONS = BagelGRPOTrainingConfig
    model: Bagel
    options: BagelGRPOTrainingConfig

    def prepare(self) -> None:
        """Freeze what is not trained."""
        self.model.processor.check_visual_gen()
        freeze(self.model, self.options.frozen, always=("vae.",))

    @property
    def guidance(self) -> Guidance:
        """The model's own, with the recipe's scale."""
        return replace(self.model.config.defaults.generate_guidance, text_scale=self.options.guidance)

    @torch.inference_mode()
    def rollout(self, prompts: Sequence[str], rng: random.Random) -> BagelRollout:
        """Images of each prompt, which part at the first step with noise."""
        model = self.model
        options = self.options
        size = model.config.defaults.size
        times = flow_timesteps(options.steps, model.config.defaults.timestep_shift).double().tolist()
        first = rng.randrange(options.first_noisy_steps)
        last = first + options.noisy_steps
        generators = seeded_generators([rng.getrandbits(62) for _ in prompts])
        contexts = model.append_text(model.start_contexts(len(prompts), None), model.text_parts(prompts))
        shared = model.latent_denoiser(contexts, [size] * len(prompts), guidance=[self.guidance] * len(prompts))
        x = torch.cat([model.initial_noise(size, generator) for generator in generators]).to(model.device)
        for t, next_t in pairwise(times[: first + 1]):
            x = self.euler_step(shared, x, t, next_t)
        copies = [one for one in contexts for _ in range(options.group_size)]
        denoiser = model.latent_denoiser(copies, [size] * len(copies), guidance=[self.guidance] * len(copies))
        n_tokens = denoiser.n_tokens[0]
        shape = (len(prompts), options.group_size, n_tokens, x.shape[-1])
        x = x.view(len(prompts), 1, n_tokens, -1).expand(shape).flatten(0, 2)
        states = [x]
        for t, next_t in pairwise(times[first : last + 1]):
            velocity = self.velocity(denoiser, x, t)
            mean, std = flow_sde_mean(x, velocity, t, next_t, noise_level=options.noise_level)
            drawn = torch.cat([gaussian_noise((options.group_size * n_tokens, x.shape[-1]), g) for g in generators])
            x = mean + std * drawn.to(mean.device)
            states.append(x)
        for t, next_t in pairwise(times[last:]):
            x = self.euler_step(denoiser, x, t, next_t)
        images = [tensor_to_pil(model.decode_latents(tokens, size)) for tokens in x.split(n_tokens)]
        return BagelRollout(
            prompts=tuple(prompts),
            images=images,
            states=tuple(state.view(shape) for state in states),
            timesteps=tuple(times[first : last + 1]),
        )

    def velocity(self, denoiser: LatentDenoiser, x: Tensor, timestep: float) -> Tensor:
        """The guided velocity [N, C] of all images at one timestep."""
        return self.model.guided_velocity(denoiser, x, _per_image(denoiser, timestep)).float()

    def euler_step(self, denoiser: LatentDenoiser, x: Tensor, timestep: float, next_timestep: float) -> Tensor:
        """One step of all images, x [N, C]."""
        ends = [denoiser.token_values(_per_image(denoiser, t)) for t in (timestep, next_timestep)]
        return euler_step(x, self.velocity(denoiser, x, timestep), *ends)

    def policy(self, model: Bagel, rollout: BagelRollout, chosen: Sequence[int]) -> list[tuple[Tensor, float]]:
        """Of each trained step the mean [P, G, L, C] and the deviation of the state that follows."""
        # copies: the rollout's tensors were made in inference mode, where nothing is kept for gradients
        states = [state[list(chosen)].clone() for state in rollout.states[:-1]]
        prompts = [rollout.prompts[i] for i in chosen]
        velocities = self.velocities(model, prompts, states, rollout.timesteps[:-1])
        return [
            flow_sde_mean(x, velocity, t, next_t, noise_level=self.options.noise_level)
            for x, velocity, (t, next_t) in zip(states, velocities, pairwise(rollout.timesteps), strict=True)
        ]

    def log_probs(self, policy: list[tuple[Tensor, float]], rollout: BagelRollout, chosen: Sequence[int]) -> Tensor:
        """The mean over steps and elements of the log density of the states that were drawn."""
        drawn = [state[list(chosen)].clone() for state in rollout.states[1:]]
        steps = zip(drawn, policy, strict=True)
        return torch.stack([gaussian_log_prob(x, mean, std).mean((-2, -1)) for x, (mean, std) in steps]).mean(0)

    def divergence(
        self, policy: list[tuple[Tensor, float]], reference: list[tuple[Tensor, float]], rollout: BagelRollout
    ) -> Tensor:
        """The mean over steps and elements: of two normal distributions of one deviation."""
        pairs = zip(policy, reference, strict=True)
        found = [((mean - other) / std).square().mean((-2, -1)) / 2 for (mean, std), (other, _) in pairs]
        return torch.stack(found).mean(0)

    def velocities(
        self, model: Bagel, prompts: Sequence[str], states: Sequence[Tensor], timesteps: Sequence[float]
    ) -> list[Tensor]:
        """The guided velocities of the states by a model, [P, G, L, C] each, in one pack, with gradients.

        All images of a prompt stand behind one copy of it, and none of them sees another; for guidance all stand once
        more without a prompt.
        """
        n_prompts, size, n_tokens, _ = states[0].shape
        names = [self.guidance.branches(t) for t in timesteps]
        images = [
            [self.noised_part(one[g], t) for one, t in zip(rows, timesteps, strict=True) for g in range(size)]
            for rows in zip(*(state.cpu() for state in states), strict=True)
        ]
        texts = model.text_parts(prompts)
        samples = [[text, *parts] for text, parts in zip(texts, images, strict=True)]
        if any("no_text" in some for some in names):
            samples += images
        batch = pack_sequences(samples).to(model.device)
        mask = batch.layout.mask
        hidden = model.backbone(batch, lambda layer, q, k, v: attention(q, k, v, mask))
        velocities = model.llm_to_velocity(hidden["gen"]).float()
        # [with a prompt or without, P, S, G, L, C]
        velocities = velocities.view(-1, n_prompts, len(states), size, n_tokens, velocities.shape[-1])
        return [self.guide(velocities[:, :, i], some) for i, some in enumerate(names)]

    def noised_part(self, tokens: Tensor, timestep: float) -> Part:
        """An image's latent tokens [L, C] at a timestep."""
        model = self.model
        height, width = (side // model.config.latent_downsample for side in model.config.defaults.size)
        return model.processor.latent_token_part(tokens, height, width, timestep=timestep, noised=True)

    def guide(self, velocities: Tensor, names: Sequence[str]) -> Tensor:
        """Velocities [with a prompt, without; P, G, L, C] as one, guided by the branches `names`; with gradients,
        which the kernel for it has none of."""
        if "no_text" not in names:
            return velocities[0]
        guidance = self.guidance
        full, no_text = (one.flatten(0, 1) for one in velocities)
        guided = [
            cfg_combine_reference(
                one,
                without,
                # where there are no images, their context is the whole
                one if "no_image" in names else None,
                guidance.text_scale,
                guidance.image_scale,
                guidance.renorm,
                guidance.renorm_min,
            )
            for one, without in zip(full, no_text, strict=True)
        ]
        return torch.stack(guided).view_as(velocities[0])


def _per_image(denoiser: LatentDenoiser, timestep: float) -> Tensor:
    """A timestep for each image [P], as the denoiser takes them."""
    return torch.full((len(denoiser.n_tokens),), timestep, dtype=torch.float64)
