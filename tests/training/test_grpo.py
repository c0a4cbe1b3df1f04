"""Training on rewards: steps that draw noise, densities of what was sampled, advantages, and that rewards rise."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from PIL import Image

from unimm.data.shapes import example
from unimm.generation.flow import euler_step
from unimm.generation.flow_sde import flow_sde_mean, gaussian_log_prob
from unimm.generation.noise import seeded_generators
from unimm.training.config import read_recipe, recipe_path
from unimm.training.rewards import RewardRequest, compute_rewards, exact_reward, group_advantages, load_reward
from unimm.training.tasks.bagel_grpo import BagelGRPOTask
from unimm.training.tasks.base import build_task
from unimm.training.tasks.janus_grpo import JanusGRPOTask
from unimm.training.trainer import Trainer

FAMILIES = ("bagel", "janus")


def grpo_recipe(family, *settings):
    return read_recipe(recipe_path(f"{family}-nano-grpo"), settings=["batch_size=2", "options.group_size=3", *settings])


@pytest.fixture(scope="module", params=FAMILIES)
def task(request):
    return build_task(grpo_recipe(request.param))


@pytest.fixture(scope="module")
def rollout(task):
    prompts = [one.prompt for one in task.batch(0).requests]
    with torch.no_grad():
        return task.rollout(prompts, random.Random(0))


def log_probs(task, rollout, chosen):
    return task.log_probs(task.policy(task.model, rollout, chosen), rollout, chosen)


def redness(images, requests):
    """A reward that has nothing to do with prompts: how much more red an image is than green and blue."""
    assert len(images) == len(requests)
    pixels = [np.asarray(image.convert("RGB"), np.float32) / 255 for image in images]
    return [float(one[..., 0].mean() - one[..., 1:].mean()) for one in pixels]


# ---- steps that draw noise


def test_a_noise_level_of_0_is_eulers_step():
    x, velocity = torch.randn(2, 5, 3)
    mean, std = flow_sde_mean(x, velocity, 0.8, 0.6, noise_level=0.0)
    ends = (torch.full((5,), t, dtype=torch.float64) for t in (0.8, 0.6))
    assert std == 0
    torch.testing.assert_close(mean, euler_step(x, velocity, *ends))


@pytest.mark.parametrize("t", [1.0, 0.7])
@pytest.mark.parametrize("noise_level", [0.3, 1.0])
def test_the_path_keeps_its_coefficients(t, noise_level):
    # of the exact velocity, x at t' has (1 - t') of the data, and noise of deviation t'
    generator = torch.Generator().manual_seed(0)
    data = torch.full((200_000, 1), 3.0)
    noise, drawn = torch.randn(2, 200_000, 1, generator=generator)
    mean, std = flow_sde_mean((1 - t) * data + t * noise, noise - data, t, 0.5, noise_level=noise_level)
    x = mean + std * drawn
    assert x.mean().item() == pytest.approx(0.5 * 3.0, abs=0.01)
    assert x.std().item() == pytest.approx(0.5, abs=0.01)
    # and a noise level of 1 forgets the noise it had
    left = torch.corrcoef(torch.stack((x, noise)).squeeze(-1))[0, 1].item()
    assert left == pytest.approx(np.cos(noise_level * np.pi / 2), abs=0.01)


def test_log_densities_are_those_of_a_normal_distribution():
    x, mean = torch.randn(2, 7, 2)
    expected = torch.distributions.Normal(mean, 0.3).log_prob(x)
    torch.testing.assert_close(gaussian_log_prob(x, mean, 0.3), expected)


# ---- rewards


def test_advantages_compare_within_groups():
    found = group_advantages(torch.tensor([[0.0, 1.0, 1.0, 0.0], [5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 4.0]]))
    root = 3**0.5
    expected = torch.tensor([[-1.0, 1, 1, -1], [0, 0, 0, 0], [-1 / root, -1 / root, -1 / root, root]])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_the_exact_reward_knows_right_images():
    examples = [example("draw.count", i, seed=5) for i in range(4)]
    requests = [RewardRequest(prompt=one.prompt, example=one) for one in examples]
    right = [Image.fromarray(one.target) for one in examples]
    assert exact_reward(right, requests) == [1, 1, 1, 1]
    others = [*right[1:], right[0]]
    assert sum(exact_reward(others, requests)) < 4
    with pytest.raises(ValueError, match=r"got the prompt 'a cat'.*expected one of the shapes world"):
        exact_reward(right[:1], [RewardRequest(prompt="a cat")])


@pytest.mark.parametrize("returned", [[1.0], [1.0, float("nan")], [1.0, 2.0, 3.0]])
def test_rewards_that_are_no_rewards(returned):
    with pytest.raises(ValueError, match="expected a finite number for each of 2 images"):
        compute_rewards(lambda images, requests: returned, [None, None], [None, None])


@pytest.mark.parametrize("name", ["exakt", "nowhere.at.all:f", "math:nothing", "math:pi"])
def test_rewards_that_cannot_be_found(name):
    with pytest.raises(ValueError, match=f"got reward '{name}'"):
        load_reward(name)


# ---- densities of what was sampled


@pytest.mark.parametrize("task", ["bagel"], indirect=True)
def test_densities_of_bagel_are_those_of_the_sampler(task, rollout):
    states = [one.clone() for one in rollout.states]
    with torch.no_grad():
        velocities = task.velocities(task.model, rollout.prompts, states[:-1], rollout.timesteps[:-1])
    model = task.model
    contexts = model.append_text(model.start_contexts(2, None), model.text_parts(rollout.prompts))
    copies = [one for one in contexts for _ in range(3)]
    denoiser = model.latent_denoiser(copies, [(64, 64)] * 6, guidance=[task.guidance] * 6)
    for i, velocity in enumerate(velocities):
        with torch.no_grad():
            sampled = task.velocity(denoiser, states[i].flatten(0, 2), rollout.timesteps[i])
        torch.testing.assert_close(velocity.flatten(0, 2), sampled, atol=1e-3, rtol=1e-3)
        # so what was drawn is standard normal noise
        t, next_t = rollout.timesteps[i : i + 2]
        mean, std = flow_sde_mean(states[i], velocity, t, next_t, noise_level=task.options.noise_level)
        drawn = (states[i + 1] - mean) / std
        assert abs(drawn.mean().item()) < 0.05 and abs(drawn.std().item() - 1) < 0.05


@pytest.mark.parametrize("task", ["janus"], indirect=True)
def test_densities_of_janus_are_those_of_the_sampler(task, rollout):
    model, tokens = task.model, rollout.tokens.clone()
    found = log_probs(task, rollout, [0, 1])
    # the tokens once more, one at a time, as they were sampled
    prompts = [one for one in task.prompt_parts(rollout.prompts) for _ in range(3)]
    seen = []
    with pytest.MonkeyPatch.context() as patch:

        def forced(logits, sampling, generators):
            step = tokens.flatten(0, 1)[:, len(seen)]
            seen.append(logits.log_softmax(-1).gather(-1, step[:, None]).squeeze(-1))
            return step

        patch.setattr("unimm.models.janus.model.sample_image_tokens", forced)
        model.generate_image_tokens(
            prompts, seeded_generators(range(6)), guidance=[3.0] * 6, image_sampling=model.config.image_sampling
        )
    expected = torch.stack(seen, 1).clone().mean(-1).view(2, 3)
    torch.testing.assert_close(found.detach(), expected, atol=1e-3, rtol=1e-3)


def test_densities_have_gradients_for_all_that_is_trained(task, rollout):
    # of one prompt of both: equal to its own in the whole
    both = log_probs(task, rollout, [0, 1])
    torch.testing.assert_close(log_probs(task, rollout, [1])[0], both[1], atol=1e-4, rtol=1e-4)
    task.model.zero_grad()
    both.sum().backward()
    trained = {name for name, p in task.model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    frozen = {name for name, p in task.model.named_parameters() if not p.requires_grad}
    assert any("decoder.blocks.0" in name for name in trained)
    assert not trained & frozen


# ---- the divergence from the weights that training began from


def test_the_divergence_of_normal_distributions():
    mean, other = torch.randn(2, 1, 2, 5, 3)
    pair = [torch.distributions.Normal(one, 0.3) for one in (mean, other)]
    expected = torch.distributions.kl_divergence(*pair).mean((-2, -1))
    torch.testing.assert_close(BagelGRPOTask.divergence(None, [(mean, 0.3)], [(other, 0.3)], None), expected)


def test_the_divergence_of_tokens():
    one, other = torch.randn(2, 1, 2, 5, 7).log_softmax(-1)
    pair = [torch.distributions.Categorical(logits=x) for x in (one, other)]
    expected = torch.distributions.kl_divergence(*pair).mean(-1)
    torch.testing.assert_close(JanusGRPOTask.divergence(None, one, other, None), expected)


@pytest.mark.parametrize("family", ["bagel", pytest.param("janus", marks=pytest.mark.nightly)])
def test_a_penalty_holds_the_weights_back(family):
    """It is 0 at first, and stays smaller where it counts more; what is frozen is in memory once."""
    found = {}
    for weight in (1e-6, 30.0):
        settings = ["options.group_size=2", "lr=1e-3", "warmup_steps=0", f"loss_weights.kl={weight}"]
        recipe = grpo_recipe(family, *settings)
        options = {**recipe.options, "reward": f"{__name__}:redness"}
        options |= {"steps": 4, "first_noisy_steps": 1} if family == "bagel" else {}
        task = build_task(dataclasses.replace(recipe, options=options))
        pairs = zip(task.model.parameters(), task.reference.parameters(), strict=True)
        assert all((p is other) is not p.requires_grad for p, other in pairs)
        trainer = Trainer(task, recipe, torch.device("cpu"))
        kept = {name: p.clone() for name, p in task.reference.named_parameters()}
        batch = task.batch(0)
        found[weight] = []
        for _ in range(3):
            trainer.update(batch)
            found[weight].append(trainer.report()["losses"]["kl"])
        assert all(torch.equal(p, kept[name]) for name, p in task.reference.named_parameters())
    assert found[1e-6][0] == pytest.approx(0, abs=1e-6) == found[30.0][0]
    assert found[1e-6][2] > 1.5 * found[30.0][2] > 0, found


def test_without_a_penalty_there_is_no_reference():
    task = build_task(grpo_recipe("janus"))
    assert task.reference is None
    assert set(task.loss_counts(task.batch(0))) == {"policy", "reward"}


# ---- training


@pytest.mark.parametrize("family", ["bagel", pytest.param("janus", marks=pytest.mark.nightly)])
def test_rewards_rise(family):
    recipe = grpo_recipe(family, "options.group_size=6", "lr=1e-3", "warmup_steps=0")
    options = {**recipe.options, "reward": f"{__name__}:redness"}
    options |= {"steps": 6, "first_noisy_steps": 2} if family == "bagel" else {}
    task = build_task(dataclasses.replace(recipe, options=options))
    trainer = Trainer(task, recipe, torch.device("cpu"))
    # the same prompts and noise at every step: what changes is the weights alone
    batch = task.batch(0)
    rewards = [0.0]
    for _ in range(4):
        trainer.update(batch)
        rewards.append(trainer.sums["reward"][0] - sum(rewards))
    assert rewards[4] > rewards[1] + 0.02, rewards


def test_prompts_of_ones_own(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\na blue star\n", encoding="utf-8")
    options = {**grpo_recipe("janus").options, "tasks": {}, "prompts": str(path)}
    batch = build_task(dataclasses.replace(grpo_recipe("janus"), options=options)).batch(3)
    assert {one.prompt for one in batch.requests} <= {"a red circle", "a blue star"}
    assert all(one.example is None for one in batch.requests)


def test_wrong_options(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    recipe = grpo_recipe("bagel")
    for changed, message in (
        ({"prompts": "p.txt"}, "got tasks and prompts"),
        ({"tasks": {}}, "or neither of them"),
        ({"tasks": {}, "prompts": str(tmp_path / "nowhere.txt")}, r"got prompts .*nowhere\.txt, expected a text file"),
        ({"tasks": {}, "prompts": str(tmp_path / "empty.txt")}, "which holds none"),
        ({"tasks": {"edit.add": 1}}, r"edit\.add"),
        ({"noisy_steps": 5}, "expected at most 8 together"),
        ({"group_size": 1}, "group_size"),
        ({"noise_level": 0.0}, "noise_level"),
        ({"reward": "exakt"}, "got reward 'exakt'"),
    ):
        with pytest.raises(ValueError, match=message):
            build_task(dataclasses.replace(recipe, options={**recipe.options, **changed}))
