"""Training Janus on rewards: GRPO over the image tokens that were sampled.

Shao et al. 2024, arXiv 2402.03300; the policy is the distribution that tokens are sampled from, with classifier-free
guidance and temperature, and both of its branches are trained.

Axes: P prompts, G images of each, n tokens of an image, V vocabulary of image tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unimm.generation.image_tokens import ImageTokenSampling
from unimm.generation.noise import seeded_generators
from unimm.kernels import attention
from unimm.models.common.cfg_branches import CFGBranches
from unimm.models.janus.model import Janus
from unimm.models.janus.processor import padded_unconditional, with_image_start
from unimm.processing.images.io import tensor_to_pil
from unimm.sequence.packing import pack_sequences
from unimm.sequence.parts import Part, text_part
from unimm.training.fields import Positive
from unimm.training.tasks.grpo import GRPOTask, GRPOTrainingConfig, Rollout
from unimm.training.tasks.janus import prepare_janus
from unimm.vlms.llama_layout import EXPERT


@dataclass(frozen=True, kw_only=True)
class JanusGRPOTrainingConfig(GRPOTrainingConfig):
    """The recipe's `options`."""

    # of sampling; 1 samples from the model's distribution as it is
    temperature: Positive


@dataclass(frozen=True, kw_only=True)
class JanusRollout(Rollout):
    """The tokens that were sampled, [P, G, n]."""

    tokens: Tensor


class JanusGRPOTask(GRPOTask):
    """Janus on rewards of images from texts."""

    name = "janus_grpo"
    FAMILY = Janus
    OPTIONS = JanusGRPOTrainingConfig
    model: Janus
    options: JanusGRPOTrainingConfig

    def prepare(self) -> None:
        """Freeze what is not trained."""
        prepare_janus(self.model, self.options.frozen, compiled=False)

    @torch.inference_mode()
    def rollout(self, prompts: Sequence[str], rng: random.Random) -> JanusRollout:
        """Images of each prompt, every token drawn from the whole distribution."""
        size = self.options.group_size
        parts = self.prompt_parts(prompts)
        tokens = self.model.generate_image_tokens(
            [one for one in parts for _ in range(size)],
            seeded_generators([rng.getrandbits(62) for _ in range(len(parts) * size)]),
            guidance=[self.options.guidance] * (len(parts) * size),
            image_sampling=ImageTokenSampling(temperature=self.options.temperature),
        )
        images = [tensor_to_pil(self.model.decode_image_tokens(one[None])[0]) for one in tokens]
        return JanusRollout(prompts=tuple(prompts), images=images, tokens=tokens.view(len(parts), size, -1))

    def prompt_parts(self, prompts: Sequence[str]) -> list[list[Part]]:
        """Each prompt as it is generated from, with the id that begins an image."""
        processor = self.model.processor
        return [
            with_image_start(processor.generation_parts(text, []), self.model.special_tokens.boi) for text in prompts
        ]

    def policy(self, model: Janus, rollout: JanusRollout, chosen: Sequence[int]) -> Tensor:
        """The log probabilities [P, G, n, V] that each token of an image is drawn by, after those before it."""
        special = model.special_tokens
        # a copy: the rollout's tokens were made in inference mode
        tokens = rollout.tokens[list(chosen)].clone()
        n_prompts, size, n_tokens = tokens.shape
        prompts = [one for one in self.prompt_parts([rollout.prompts[i] for i in chosen]) for _ in range(size)]
        branches = CFGBranches.plan([self.options.guidance] * len(prompts), model.device)
        inputs = [*prompts, *(padded_unconditional(prompts[i], special.pad) for i in branches.guided)]
        flat = tokens.flatten(0, 1)
        samples = [
            [*without_image_start(prompt), model.image_token_part(flat[i].cpu(), special.boi)]
            for prompt, i in zip(inputs, branches.images.tolist(), strict=True)
        ]
        batch = pack_sequences(samples).to(model.device)
        mask = batch.layout.mask
        hidden = model.backbone(batch, lambda layer, q, k, v: attention(q, k, v, mask))[EXPERT]
        assert batch.gen_images is not None, "every sample has an image"
        logits = model.image_logits(hidden[batch.gen_images.rows - 1]).float()
        logits = branches.combine(logits.view(len(inputs), n_tokens, -1))
        return (logits / self.options.temperature).log_softmax(-1).view(n_prompts, size, n_tokens, -1)

    def log_probs(self, policy: Tensor, rollout: JanusRollout, chosen: Sequence[int]) -> Tensor:
        """The mean over an image's tokens of their log probability."""
        tokens = rollout.tokens[list(chosen)].clone().to(policy.device)
        return policy.gather(-1, tokens[..., None]).squeeze(-1).mean(-1)

    def divergence(self, policy: Tensor, reference: Tensor, rollout: JanusRollout) -> Tensor:
        """The mean over an image's tokens, each over the whole vocabulary."""
        return (policy.exp() * (policy - reference)).sum(-1).mean(-1)


def without_image_start(prompt: Sequence[Part]) -> list[Part]:
    """A prompt that ends with the id that begins an image, without that id."""
    *before, last = prompt
    return [*before, text_part(last.ids[:-1].tolist())]
