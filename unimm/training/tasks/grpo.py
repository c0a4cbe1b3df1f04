"""Training on rewards (GRPO): a group of images for each prompt, of which those that are better become likelier.

A step samples the images by the current weights, rewards them, and takes one step along the gradient of the mean of
advantage times log density: Shao et al. 2024, arXiv 2402.03300, with one update a sample, where the clipped ratio of
densities is 1 and its gradient that of the log density. The loss "kl", where the recipe gives it a weight, holds the
policy near that of the release that the recipe names: the mean of their Kullback-Leibler divergence at what was sampled,
computed from both distributions, not estimated from the samples. Without it keep runs short, and look at samples.
"""

from __future__ import annotations

import copy
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from unimm.data.batching import sample_tasks
from unimm.data.shapes import example
from unimm.models.base import UnifiedModel
from unimm.training.config import TrainConfig, from_mapping
from unimm.training.fields import (
    NotNegative,
    OptionalTaskWeights,
    RecipeSection,
    held_out_seed,
    known_tasks,
)
from unimm.training.losses import LossSum
from unimm.training.pretrained import load_released
from unimm.training.rewards import RewardFunction, RewardRequest, compute_rewards, group_advantages, load_reward
from unimm.training.samples import prompt_grid, sample_grid

# tasks of the shapes world that draw from a prompt alone
DRAWING_TASKS = ("draw.one", "draw.count", "draw.relation", "draw.two", "draw.place", "draw.scene")


@dataclass(frozen=True, kw_only=True)
class GRPOTrainingConfig(RecipeSection):
    """The recipe's `options`."""

    # the shapes world's tasks that prompts are of, and their weights (unimm.data.batching.sample_tasks)
    tasks: Annotated[OptionalTaskWeights, known_tasks(DRAWING_TASKS)] = field(default_factory=dict)
    # or a text file, a prompt a line
    prompts: str = ""
    # "exact" for the shapes world's judge, or module:function (unimm.training.rewards.RewardFunction)
    reward: str
    # images of each prompt, which are compared with each other
    group_size: Annotated[int, Field(ge=2)]
    # classifier-free guidance by which images are sampled; it is a part of what is trained
    guidance: NotNegative
    # prefixes of the names of parameters that are not trained; the image tokenizer never is
    frozen: tuple[str, ...]

    def __post_init__(self) -> None:
        if bool(self.tasks) == bool(self.prompts):
            raise ValueError("got tasks and prompts, or neither of them: expected one of both")


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """Prompts, and the seed of what is sampled from them."""

    requests: tuple[RewardRequest, ...]
    seed: int


@dataclass(frozen=True, kw_only=True)
class PromptDataset:
    """Prompts by step: the same for a seed on every machine, and made without the model."""

    tasks: Any
    prompts: tuple[str, ...]
    batch_size: int
    seed: int

    def __call__(self, step: int) -> PromptBatch:
        rng = random.Random(f"{self.seed}/grpo/{step}")
        if self.prompts:
            requests = [RewardRequest(prompt=rng.choice(self.prompts)) for _ in range(self.batch_size)]
        else:
            tasks = sample_tasks(self.tasks, self.batch_size, rng)
            examples = [example(task, step * self.batch_size + i, seed=self.seed) for i, task in enumerate(tasks)]
            requests = [RewardRequest(prompt=one.prompt, example=one) for one in examples]
        return PromptBatch(requests=tuple(requests), seed=rng.getrandbits(62))


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Images of P prompts, G each, in order, and what their densities are computed from, in families' subclasses."""

    prompts: tuple[str, ...]
    images: list[Image.Image]


class GRPOTask(ABC):
    """The half of every family's task: prompts to rewards to the loss."""

    name: ClassVar[str]
    # the loss, the mean reward, which the recipe weighs with 0: it is logged alone; and the divergence from the release
    # that training began from, which is computed where its weight is more than 0
    loss_names = ("policy", "reward", "kl")
    model: UnifiedModel
    options: GRPOTrainingConfig
    reward: RewardFunction
    batch: PromptDataset

    # the family that the recipe names a release of, and the class of the recipe's `options`
    FAMILY: ClassVar[type[UnifiedModel]]
    OPTIONS: ClassVar[type[GRPOTrainingConfig]]

    def __init__(
        self,
        model: UnifiedModel,
        options: GRPOTrainingConfig,
        batch: PromptDataset,
        reward: RewardFunction,
        *,
        has_reference: bool = False,
    ) -> None:
        """has_reference: whether the divergence from the model as it is now is one of the losses."""
        self.model = model
        self.options = options
        self.batch = batch
        self.reward = reward
        self.prepare()
        self.reference = copy_as_reference(model) if has_reference else None

    @classmethod
    def from_recipe(cls, recipe: TrainConfig) -> Self:
        """Load the release that the recipe names."""
        options = from_mapping(cls.OPTIONS, recipe.options, where="options")
        batch = prompt_dataset(options, batch_size=recipe.batch_size, seed=recipe.seed)
        reward = load_reward(options.reward)
        has_reference = recipe.loss_weights.get("kl", 0) > 0
        return cls(load_released(cls.FAMILY, recipe.model), options, batch, reward, has_reference=has_reference)

    @abstractmethod
    def prepare(self) -> None:
        """Freeze what is not trained. Raises an error for a model that generates no images."""

    @abstractmethod
    def rollout(self, prompts: Sequence[str], rng: random.Random) -> Any:
        """`group_size` images of each prompt by the current weights; called without gradients, in eval mode."""

    @abstractmethod
    def policy(self, model: Any, rollout: Any, chosen: Sequence[int]) -> Any:
        """What a model, the trained one or the reference, draws the images of the chosen P prompts from: distributions,
        of the trained one with gradients."""

    @abstractmethod
    def log_probs(self, policy: Any, rollout: Any, chosen: Sequence[int]) -> Tensor:
        """The mean log density [P, G] of what was drawn for the images of the chosen P prompts, under their policy."""

    @abstractmethod
    def divergence(self, policy: Any, reference: Any, rollout: Any) -> Tensor:
        """The mean Kullback-Leibler divergence [P, G] of a policy from another, at what was drawn."""

    def losses(self, batch: PromptBatch) -> dict[str, LossSum]:
        """Minus the mean of advantage times log density, the mean reward, and the mean divergence from the reference."""
        n_groups = len(batch.requests)
        size = self.options.group_size
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            rollout = self.rollout([one.prompt for one in batch.requests], random.Random(batch.seed))
        self.model.train(was_training)
        requests = [one for one in batch.requests for _ in range(size)]
        rewards = compute_rewards(self.reward, rollout.images, requests).view(n_groups, size)
        advantages = group_advantages(rewards)
        # groups of equal rewards teach nothing but to stay near; one of them keeps the loss connected to the weights
        teaches = [self.reference is not None or bool((one != 0).any()) for one in advantages]
        chosen = [i for i in range(n_groups) if teaches[i]] or [0]
        policy = self.policy(self.model, rollout, chosen)
        log_probs = self.log_probs(policy, rollout, chosen)
        total = -(advantages[chosen].to(log_probs.device) * log_probs).sum()
        n = n_groups * size
        losses = {"policy": LossSum(total, n), "reward": LossSum(rewards.sum().to(log_probs.device), n)}
        if self.reference is not None:
            with torch.no_grad():
                reference = self.policy(self.reference.to(self.model.device), rollout, chosen)
            losses["kl"] = LossSum(self.divergence(policy, reference, rollout).sum(), n)
        return losses

    def loss_counts(self, batch: PromptBatch) -> dict[str, int]:
        """Images of the batch."""
        names = self.loss_names if self.reference is not None else self.loss_names[:2]
        return dict.fromkeys(names, len(batch.requests) * self.options.group_size)

    @property
    def held_out_batch(self) -> PromptDataset:
        """Prompts that no run trains on, where they are the shapes world's."""
        return replace(self.batch, seed=held_out_seed(self.batch.seed))

    def sample_image(self) -> Image.Image | None:
        """Images of test prompts, or of the first of one's own."""
        return prompt_grid(self.model, self.batch.prompts[:8]) if self.batch.prompts else sample_grid(self.model)

    def save(self, folder: Path) -> None:
        """Write the released layout, in bfloat16."""
        self.model.save_pretrained(folder, dtype="bfloat16")


def copy_as_reference(model: UnifiedModel) -> UnifiedModel:
    """The model as it is now, which is not trained: a copy, but for what is frozen, which both have in common."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False).eval()


def prompt_dataset(options: GRPOTrainingConfig, *, batch_size: int, seed: int) -> PromptDataset:
    """The prompts of a recipe. Raises ValueError for a file that cannot be read, or holds none."""
    prompts = read_prompts(Path(options.prompts)) if options.prompts else ()
    return PromptDataset(tasks=dict(options.tasks), prompts=prompts, batch_size=batch_size, seed=seed)


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a text file, a line each; blank lines are left out.

    Raises ValueError for a file that cannot be read, or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"got prompts {path}, expected a text file in UTF-8, a prompt a line: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ValueError(f"got prompts {path}, which holds none: expected a prompt a line")
    return prompts
