"""Masked decoding: schedules and temperatures at real sizes as stored, draws, and what is never drawn again."""

import json
from itertools import pairwise

import pytest
import torch
from helpers.paths import GOLDEN

from unimm.generation.masked import (
    MaskedNoise,
    MaskedSampling,
    draw_masked_noise,
    masked_step,
    n_masked_after,
    noise_temperature,
)
from unimm.generation.noise import seeded_generators

TABLES = json.loads((GOLDEN / "show_o" / "dev" / "tables.json").read_text())
SCHEDULES = {name: runs for name, runs in TABLES["masked_after_step"].items() if name != "note"}
MASK = 16


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_are_the_stored_ones(schedule):
    for run, expected in SCHEDULES[schedule].items():
        n, steps = map(int, run.split("/"))
        assert [n_masked_after(schedule, step, steps, n) for step in range(steps)] == expected, run


def test_temperatures_are_the_stored_ones():
    for steps, expected in TABLES["temperature_factors"].items():
        found = [noise_temperature(1.0, step, int(steps)) for step in range(int(steps))]
        assert found == pytest.approx(expected, abs=1e-9)


def run(tokens, sampling, *, steps=6, seed=0):
    """All steps over random logits: the states after each."""
    generator = torch.Generator().manual_seed(7)
    generators = seeded_generators([seed + i for i in range(len(tokens))])
    states = []
    for step in range(steps):
        logits = torch.randn(*tokens.shape, MASK, generator=generator)
        noise = draw_masked_noise(generators, tokens.shape[1], MASK, sampling)
        after = masked_step(logits, tokens, mask_token=MASK, step=step, steps=steps, sampling=sampling, noise=noise)
        states.append(after)
        tokens = after.tokens
    return states


@pytest.mark.parametrize("sampling", [MaskedSampling(), MaskedSampling(schedule="pow2.5", token_temperature=0.0)])
def test_known_places_stay_and_the_rest_is_drawn(sampling):
    tokens = torch.randint(0, MASK, (3, 40), generator=torch.Generator().manual_seed(1))
    masked = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(2)) < torch.tensor([[0.9], [0.3], [1.0]])
    states = run(tokens.masked_fill(masked, MASK), sampling)
    for before, after in pairwise(states):
        kept = before.tokens != MASK
        assert torch.equal(after.drawn[kept], before.tokens[kept])
        assert ((after.tokens == MASK).sum(1) <= (before.tokens == MASK).sum(1)).all()
    last = states[-1]
    assert torch.equal(last.drawn[~masked], tokens[~masked]) and int(last.drawn.max()) < MASK
    assert ((last.tokens == MASK).sum(1) == 1).all(), "as released, one place stays masked beside what was drawn"


def test_an_image_of_one_place_is_drawn_once():
    states = run(torch.full((2, 1), MASK), MaskedSampling())
    assert all(torch.equal(state.drawn, states[0].drawn) and int(state.drawn.max()) < MASK for state in states)


def test_a_batch_equals_single_runs():
    tokens = torch.full((2, 12), MASK)
    sampling = MaskedSampling(temperature=2.0)
    noise = draw_masked_noise(seeded_generators([5, 6]), 12, MASK, sampling)
    alone = draw_masked_noise(seeded_generators([6]), 12, MASK, sampling)
    assert torch.equal(noise.exponential[1:], alone.exponential) and torch.equal(noise.uniform[1:], alone.uniform)
    logits = torch.randn(2, 12, MASK, generator=torch.Generator().manual_seed(0))
    options = dict(mask_token=MASK, step=1, steps=5, sampling=sampling)
    both = masked_step(logits, tokens, noise=noise, **options)
    one = masked_step(logits[1:], tokens[1:], noise=alone, **options)
    assert all(torch.equal(a[1:], b) for a, b in zip(both, one, strict=True))


def test_tokens_are_drawn_by_their_probabilities():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    n = 20_000
    sampling = MaskedSampling(temperature=0.0)
    noise = draw_masked_noise(seeded_generators([0]), n, 4, sampling)
    drawn = masked_step(
        p.log().expand(1, n, 4),
        torch.full((1, n), 4),
        mask_token=4,
        step=0,
        steps=1,
        sampling=sampling,
        noise=noise,
    ).drawn
    shares = torch.bincount(drawn[0], minlength=4) / n
    # three standard deviations of a share of 20,000 draws are 0.011 at most
    assert (shares - p).abs().max() < 0.011
    cold = masked_step(
        p.log().expand(1, n, 4),
        torch.full((1, n), 4),
        mask_token=4,
        step=0,
        steps=1,
        sampling=MaskedSampling(token_temperature=0.0),
        noise=MaskedNoise(None, None),
    )
    assert (cold.drawn == 0).all()
