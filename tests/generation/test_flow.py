"""Flow: timesteps, samplers, guidance and the step cache, each against its formula."""

import math

import pytest
import torch

from unimm.generation.flow import (
    DPMSolverPP,
    add_noise,
    dpm_solver_pp,
    dpm_timesteps,
    dynamic_shift,
    euler,
    euler_step,
    floor_timesteps,
    flow_timesteps,
    integer_timesteps,
    reshifted_timesteps,
    shift_timesteps,
    timestep_pairs,
)
from unimm.generation.guidance import Guidance, cfg_velocity, deduplicate_branches, guidance_branches


def test_flow_timesteps():
    times = flow_timesteps(6, 3.0)
    assert times[0] == 1 and times[-1] == 0 and len(times) == 7
    expected = [3 * t / (1 + 2 * t) for t in (1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0)]
    assert times.tolist() == pytest.approx(expected, abs=1e-6)
    assert flow_timesteps(4, 1.0).tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert shift_timesteps(torch.tensor(0.0), 4.0) == 0


@pytest.mark.parametrize(("steps", "shift"), [(0, 1.0), (-3, 1.0), (4, 0.0), (4, -1.0)])
def test_schedules_refuse(steps, shift):
    with pytest.raises(ValueError, match="expected"):
        flow_timesteps(steps, shift)


def test_the_sampler_is_exact_on_a_straight_path():
    data, noise = torch.randn(2, 5, 3)
    for steps in (1, 7):
        found = euler(lambda x, t: noise - data, noise, flow_timesteps(steps, 3.0))
        torch.testing.assert_close(found, data, rtol=1e-5, atol=1e-5)
    middle = add_noise(data, noise, torch.full((5,), 0.25))
    torch.testing.assert_close(middle, 0.75 * data + 0.25 * noise)


def test_guidance_follows_the_formulas():
    v, text, image = torch.randn(3, 4, 6, dtype=torch.float64)

    def length(x, dims=-1):
        return x.norm(dim=dims, keepdim=True) if dims == -1 else x.norm()

    u = text + 4 * (v - text)
    w = image + 2 * (u - image)
    expected = {
        "global": w * (length(v, None) / length(w, None)).clamp(0, 1),
        "channel": w * (length(v) / length(w)).clamp(0, 1),
    }
    shrunk = u * (length(v) / length(u)).clamp(0, 1)
    expected["text_channel"] = image + 2 * (shrunk - image)
    for renorm, truth in expected.items():
        found = Guidance(text_scale=4, image_scale=2, renorm=renorm).combine(v, text, image)
        torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(Guidance(text_scale=4, image_scale=2, renorm_min=1.0).combine(v, text, image), w)
    # renormalisation only ever shrinks
    small = Guidance(text_scale=1.5).combine(v, v * 3)
    torch.testing.assert_close(small, v * 3 + 1.5 * (v - v * 3))


def test_guidance_interval_is_open_below():
    guidance = Guidance(interval=(0.4, 0.9), image_scale=1.0)
    assert guidance.branches(0.4) == ("full",) and guidance.branches(0.9) == ("full", "no_text")
    assert guidance.branches(0.91) == ("full",)
    assert Guidance(interval=(0.0, 1.0)).branches(1.0) == ("full", "no_text", "no_image")
    assert Guidance(text_scale=1.0, image_scale=2.0).branches(0.7) == ("full",)


@pytest.mark.parametrize("options", [dict(renorm="local"), dict(renorm_min=1.5), dict(renorm_min=-0.1)])
def test_guidance_refuses(options):
    with pytest.raises(ValueError, match=r"expected"):
        Guidance(**options)


def test_a_batch_is_guided_image_by_image():
    """The original takes one norm over the batch; here each image has its own."""
    table = {(i, name): torch.randn(3 + i, 2) * (10**i) for i in range(2) for name in ("full", "no_text", "no_image")}

    guidance = [
        Guidance(text_scale=3.0, image_scale=1.0, interval=(0.0, 1.0)),
        Guidance(text_scale=2.0, image_scale=2.0, interval=(0.0, 1.0)),
    ]
    timesteps = torch.tensor([0.5, 0.25], dtype=torch.float64)
    both = cfg_velocity(table, guidance, timesteps)
    for i, g in enumerate(guidance):
        alone = g.combine(*(table[i, name] for name in g.branches(timesteps[i].item())))
        torch.testing.assert_close(both[3 * i : 3 + 4 * i], alone, rtol=0, atol=0)


def test_each_image_is_guided_at_its_own_timestep():
    guidance = [Guidance(interval=(0.4, 1.0), image_scale=1.0)] * 2 + [Guidance(text_scale=1.0)]
    timesteps = torch.tensor([0.5, 0.3, 0.9], dtype=torch.float64)
    assert guidance_branches(guidance, timesteps) == [(0, "full"), (0, "no_text"), (1, "full"), (2, "full")]


def test_equal_branches_are_computed_once():
    branches = [(0, "full"), (0, "no_image"), (1, "no_image")]
    unique = deduplicate_branches(branches, lambda branch: (branch[0], "full"))
    assert unique == [(0, "full"), (1, "full")]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with a newer numpy
@pytest.mark.parametrize(
    ("steps", "shift"), [(1, 3.0), (4, 3.0), (11, 1.0), (13, 1.0), (14, 1.0), (30, 3.0), (51, 2.0)]
)
def test_solver_equals_diffusers(steps, shift):
    from diffusers import DPMSolverMultistepScheduler

    theirs = DPMSolverMultistepScheduler(flow_shift=shift, prediction_type="flow_prediction", use_flow_sigmas=True)
    theirs.set_timesteps(steps)
    times, x = dpm_timesteps(steps, shift=shift), torch.randn(2, 3)
    assert torch.allclose(times.float(), theirs.sigmas.float(), atol=1e-6)
    rounded, noise = [], x

    def velocity(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        time = timesteps[0].item()
        rounded.append(round(1000 * time))
        return (x + 0.3) * (1 + time) ** -0.5 - x.sin()

    ours = dpm_solver_pp(lambda x, t: velocity(x, floor_timesteps(t)), noise, times)
    for t in theirs.timesteps:
        x = theirs.step(velocity(x, t[None].double() / 1000), t, x).prev_sample
    assert rounded[:steps] == theirs.timesteps.tolist() == rounded[steps:]
    # their logarithms are in float32, near 1 - t = 3e-4
    assert torch.allclose(ours, x, atol=1e-3)


@pytest.mark.parametrize("name", ["euler", "dpm"])
def test_images_of_different_progress_step_as_each_alone(name):
    """To the bit: a step's coefficients are each image's own."""
    schedules = [dpm_timesteps(5, shift=2.0), dpm_timesteps(9)]
    noise = torch.randn(2, 3, 4)

    def velocity(x, timesteps):
        return (x * (1 + timesteps.view(-1, 1, 1))).float().sin()

    alone = []
    for x, times in zip(noise, schedules, strict=True):
        solver, x, path = DPMSolverPP(), x[None], []
        for t, next_t in timestep_pairs(times[:5], 1):
            v = velocity(x, t)
            x = solver.step(x, v, t, next_t) if name == "dpm" else euler_step(x, v, t, next_t)
            path.append(x)
        alone.append(path)
    solver, x = DPMSolverPP(), noise
    for n in range(4):
        t, next_t = (torch.stack([times[n + i] for times in schedules]) for i in range(2))
        v = velocity(x, t)
        x = solver.step(x, v, t, next_t) if name == "dpm" else euler_step(x, v, t, next_t)
        assert torch.equal(x, torch.cat([path[n] for path in alone]))


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_euler_times_equal_diffusers(steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(steps)
    assert torch.allclose(reshifted_timesteps(steps, 3.0).float(), theirs.sigmas, atol=1e-6)
    even = torch.linspace(1, 1 / steps, steps).tolist()
    theirs.set_timesteps(sigmas=even)
    assert torch.allclose(flow_timesteps(steps, 3.0), theirs.sigmas, atol=1e-6)
    flux = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    flux.set_timesteps(sigmas=even, mu=math.log(dynamic_shift(4096)))
    assert math.log(dynamic_shift(4096)) == pytest.approx(1.15)
    assert torch.allclose(flow_timesteps(steps, dynamic_shift(4096)), flux.sigmas, atol=1e-6)


def test_the_solver_is_exact_where_data_is_constant():
    data, noise = torch.randn(5), torch.randn(5)
    # at time 1 itself, too, where nothing is known of the data
    for times in (flow_timesteps(6, 2.0), dpm_timesteps(6)):
        found = dpm_solver_pp(lambda x, t: (x - data) / t, noise, times)
        assert torch.allclose(found, data, atol=1e-5)
    # of second order: the error falls by four where the steps double
    truth = euler(lambda x, t: x.cos(), noise.double(), flow_timesteps(20000, 1.0))
    off = [
        (dpm_solver_pp(lambda x, t: x.cos(), noise.double(), flow_timesteps(n, 1.0)) - truth).abs().max()
        for n in (40, 80)
    ]
    assert off[1] < 0.4 * off[0]


def test_integer_timesteps():
    assert integer_timesteps(torch.tensor([0.0, 0.0009, 0.001, 0.5, 0.9999])).tolist() == pytest.approx(
        [1, 1, 0.999, 0.5, 0.001]
    )
    for make in (lambda n, s: dpm_timesteps(n, shift=s), reshifted_timesteps):
        with pytest.raises(ValueError, match="got steps 0"):
            make(0, 3.0)
        with pytest.raises(ValueError, match="got shift 0"):
            make(4, 0.0)
