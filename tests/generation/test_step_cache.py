"""Step caches: their formulas, that every branch has a state of its own, and what they spare in every family."""

import math
from unittest.mock import patch

import numpy as np
import pytest
import torch

import unimm
from unimm.generation.flow import euler, flow_timesteps
from unimm.generation.step_cache import RowStepCache, TaylorSeer, TeaCache, parse_step_cache
from unimm.models.janusflow.latent_denoiser import JanusFlowLatentDenoiser

NANOS = ("bagel-nano", "janusflow-nano", "metaquery-nano", "uniworld-nano")
# what a cache spares in each family: the method that runs the blocks, and how many branches a call of it ran
BLOCKS = {
    "bagel-nano": (lambda model: model, "_decode_tokens", lambda args: len(args[2])),
    "janusflow-nano": (lambda model: JanusFlowLatentDenoiser, "plan", lambda args: len(args[1])),
    "metaquery-nano": (lambda model: model.denoiser, "run_blocks", lambda args: len(args[0])),
    "uniworld-nano": (lambda model: model.denoiser.mmdit, "run_blocks", lambda args: len(args[0])),
}


@pytest.fixture(scope="module", params=NANOS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return unimm.load(name)


def step(cache, branches, compute):
    """One step of a cache: `compute` gives a branch's output where it is due. Returns the outputs of all."""
    inputs = {branch: torch.zeros(1) for branch in branches}
    due = cache.due(branches, inputs)
    return cache.update(branches, inputs, {branch: compute(branch) for branch in due}), due


def test_taylorseer_is_exact_on_a_line_and_counts_each_branch():
    computed = {}
    cache = TaylorSeer().start()
    for n in range(14):
        branches = [(0, "full")] + ([(0, "no_text")] if n < 8 else [])
        outputs, due = step(cache, branches, lambda branch, n=n: torch.full((2, 3), float(n)))
        if due:
            computed[n] = due
        # what is linear in the step's number is met exactly as soon as two orders are known
        assert outputs.keys() == set(branches)
        torch.testing.assert_close(outputs[0, "full"], torch.full((2, 3), float(n)), rtol=1e-6, atol=1e-6)
    assert list(computed) == [0, 1, 2, 3, 4, 7, 10, 13]
    assert computed[7] == [(0, "full"), (0, "no_text")] and computed[10] == [(0, "full")]


def test_taylorseer_is_the_series_of_the_formula():
    values = [math.exp(0.3 * n) for n in range(9)]
    cache = TaylorSeer().start()
    branch = (0, "full")
    found = []
    for n in range(9):
        outputs, _ = step(cache, [branch], lambda _, n=n: torch.tensor([values[n]], dtype=torch.float64))
        found.append(outputs[branch].item())
    assert found[:5] == pytest.approx(values[:5])
    # at call 4 the orders are F1 = v4 - v3 (the series before it, at call 3, held F0 alone), so F2 does not exist yet
    assert found[5] == pytest.approx(values[4] + (values[4] - values[3]))
    assert found[6] == pytest.approx(values[4] + 2 * (values[4] - values[3]))
    first = (values[7] - values[4]) / 3
    second = (first - (values[4] - values[3])) / 3
    assert found[8] == pytest.approx(values[7] + first + second / 2)


def test_teacache_runs_where_the_input_has_moved_far():
    """By a tenth a step, against a threshold of 0.25: at every third step, and what was added is added again."""
    cache = TeaCache(threshold=0.25).start()
    branch = (0, "full")
    ran = []
    for n in range(9):
        inputs = {branch: torch.full((4,), 1.1**n, dtype=torch.float64)}
        due = cache.due([branch], inputs)
        outputs = cache.update([branch], inputs, {one: inputs[one] + n for one in due})
        ran += [n] if due else []
        torch.testing.assert_close(outputs[branch], inputs[branch] + ran[-1])
    assert ran == [0, 3, 6]


def test_teacache_keeps_branches_apart():
    """One whose input stands still is spared; the other, and one that comes later, run."""
    cache = TeaCache(threshold=0.5).start()
    still, moving, late = (0, "full"), (1, "full"), (1, "no_text")
    ran = []
    for n in range(3):
        branches = [still, moving] + ([late] if n == 2 else [])
        inputs = {still: torch.ones(2), moving: torch.ones(2) * 2**n, late: torch.ones(2)}
        due = cache.due(branches, inputs)
        cache.update(branches, inputs, {one: inputs[one] for one in due})
        ran.append(due)
    assert ran == [[still, moving], [moving], [moving, late]]


def test_rows_that_are_due_are_computed_and_others_reused():
    cache = RowStepCache(TeaCache(threshold=0.5), [(0, "full"), (1, "full")])
    asked = []

    def compute(x):
        def run(rows):
            asked.append(rows)
            return x[rows] + 10

        return run

    first = torch.ones(2, 3)
    assert torch.equal(cache.run(first, compute(first)), first + 10)
    second = torch.stack((torch.ones(3), torch.full((3,), 4.0)))
    assert torch.equal(cache.run(second, compute(second)), second + 10)
    third = torch.stack((torch.full((3,), 1.1), torch.full((3,), 4.0)))
    assert torch.equal(cache.run(third, compute(third)), third + 10)
    assert asked == [[0, 1], [1]]


@pytest.mark.parametrize("options", [{"warmup": 0}, {"interval": 0}, {"order": -1}, {"order": 1.5}])
def test_options_of_taylorseer(options):
    with pytest.raises(ValueError, match=f"got {next(iter(options))}"):
        TaylorSeer(**options)


def test_options():
    assert parse_step_cache(True) == TaylorSeer() and parse_step_cache(False) is None and parse_step_cache(None) is None
    assert parse_step_cache(TeaCache(threshold=1)) == TeaCache(threshold=1.0)
    for wrong in (-1, math.nan, "0.1"):
        with pytest.raises(ValueError, match="got threshold"):
            TeaCache(threshold=wrong)
    with pytest.raises(ValueError, match="got step_cache 'TeaCache': expected True or False, or a TaylorSeer or"):
        parse_step_cache("TeaCache")


def draw(model, name, **options):
    """Two images under guidance, and how many branches' blocks ran in 9 steps."""
    place, method, count = BLOCKS[name]
    plain = getattr(place(model), method)
    ran = []

    def counted(*args, **named):
        ran.append(count(args))
        return plain(*args, **named)

    with patch.object(place(model), method, counted):
        made = model.generate(["a red circle", "two blue squares"], seed=3, steps=9, **guided(name), **options)
    return np.stack([np.asarray(image, int) for image in made.images]), sum(ran)


def guided(name):
    return {"true_cfg_scale": 2.0} if name == "uniworld-nano" else {"guidance": 2.0}


@pytest.fixture(scope="module")
def plain(model, name):
    return draw(model, name)


@pytest.mark.parametrize("cache", [TaylorSeer(interval=1), TeaCache(threshold=0)], ids=["TaylorSeer", "TeaCache"])
def test_a_cache_that_always_runs_changes_nothing(model, name, plain, cache):
    images, n = draw(model, name, step_cache=cache)
    assert np.abs(images - plain[0]).max() <= 1 and n == plain[1]


def test_taylorseer_spares_the_same_steps_in_every_family(model, name, plain):
    """Of 9 steps it runs 0 to 4 and 7; its state belongs to one call."""
    images, n = draw(model, name, step_cache=True)
    assert not np.array_equal(plain[0], images)
    # BAGEL is guided, which takes a second branch, only down to a timestep; there its branches have other counts
    assert n < 0.8 * plain[1] if name == "bagel-nano" else n == plain[1] * 6 / 9
    if name == "bagel-nano":
        assert np.array_equal(draw(model, name, step_cache=True)[0], images)


def test_images_of_a_batch_have_caches_of_their_own(model, name, plain):
    """Each as if it were alone, though TeaCache runs the blocks at other steps for one than for the other."""
    cache = TeaCache(threshold=0.3)
    images, n = draw(model, name, step_cache=cache)
    for i, prompt in enumerate(("a red circle", "two blue squares")):
        alone = model.generate(prompt, seed=3 + i, steps=9, step_cache=cache, **guided(name)).image
        assert np.abs(np.asarray(alone, int) - images[i]).max() <= 1
    assert n < plain[1]


def test_the_series_follows_a_smooth_velocity():
    """On a field whose solution is known, TaylorSeer at half the steps is nearer than Euler's method with as few."""
    x = torch.full((1, 1), 2.0, dtype=torch.float64)
    timesteps = flow_timesteps(24, 1.0).double()

    def field(x, timestep):
        return torch.cos(3 * timestep)[:, None] * x

    whole = euler(field, x, timesteps)
    cache = RowStepCache(TaylorSeer(warmup=4, interval=3, order=2), [(0, "full")])
    ran = []

    def cached(x, timestep):
        def compute(rows):
            ran.append(rows)
            return field(x, timestep)

        return cache.run(x, compute)

    spared = euler(cached, x, timesteps)
    few = euler(field, x, flow_timesteps(len(ran), 1.0).double())
    assert len(ran) == 10
    assert (spared - whole).abs() < 0.3 * (few - whole).abs()
