"""Flow matching, guidance, schedule and sampler against closed forms and diffusers."""

import math

import numpy as np
import pytest
import torch

from model_core.objectives.flow import flow_loss, interpolate, logit_normal, shift_mu, shift_time, velocity_target
from model_core.objectives.guidance import guide
from model_core.sampling.ode import euler
from model_core.sampling.schedule import shifted_times


def test_the_path_runs_from_data_to_noise_with_the_target_as_its_derivative():
    x0, noise = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    assert torch.equal(interpolate(x0, noise, torch.zeros(2, 3)), x0)
    assert torch.equal(interpolate(x0, noise, torch.ones(2, 3)), noise)
    step = (interpolate(x0, noise, torch.full((2, 3), 0.5 + 1e-6)) - interpolate(x0, noise, torch.full((2, 3), 0.5))) / 1e-6
    assert torch.allclose(step, velocity_target(x0, noise), atol=0.1)


def test_logit_normal_times_have_the_median_and_quartiles_of_the_closed_form():
    draws = np.random.default_rng(0).standard_normal(200_000)
    times = np.array([logit_normal(draw, 0.5, 1.5) for draw in draws])
    for quantile, normal in ((0.25, -0.67449), (0.5, 0.0), (0.75, 0.67449)):
        assert np.quantile(times, quantile) == pytest.approx(1 / (1 + math.exp(-(0.5 + 1.5 * normal))), abs=3e-3)


def test_parts_of_the_loss_add_up_to_the_mean_square_of_all_values():
    velocity, target = torch.randn(12, 4), torch.randn(12, 4)
    parts = [flow_loss(velocity[part], target[part], num_elements=48) for part in (slice(0, 5), slice(5, 6), slice(6, 12))]
    assert sum(parts).item() == pytest.approx((velocity - target).square().mean().item(), rel=1e-6)


def test_shifted_times_are_those_of_the_closed_form():
    assert shift_time(0.5, mu=0.0) == pytest.approx(0.5)
    assert shift_time(0.5, mu=math.log(3.0)) == pytest.approx(0.75)  # odds of t times e^mu
    assert shift_mu(256, (0.5, 0.9)) == pytest.approx(0.5)
    assert shift_mu(8192, (0.5, 0.9)) == pytest.approx(0.9)


def test_guidance_is_linear_and_a_scale_of_one_is_the_conditional_velocity():
    conditional, unconditional = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    assert torch.allclose(guide(conditional, unconditional, scale=1.0, rescale_norm=False), conditional, atol=1e-6)
    assert torch.allclose(guide(conditional, unconditional, scale=3.0, rescale_norm=False), 3 * conditional - 2 * unconditional, atol=1e-5)


def test_rescaled_guidance_keeps_each_tokens_norm_and_the_guided_direction():
    conditional, unconditional = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    guided, free = (guide(conditional, unconditional, scale=4.0, rescale_norm=flag) for flag in (True, False))
    assert torch.allclose(guided.norm(dim=-1), conditional.norm(dim=-1), rtol=1e-5)
    assert torch.allclose(torch.cosine_similarity(guided, free, dim=-1), torch.ones(2, 5), atol=1e-5)


def test_euler_is_exact_on_a_straight_path_whatever_the_grid():
    x0, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for steps in (1, 4, 17):
        times = shifted_times(steps, mu=0.6, final_sigma=0.02)
        assert torch.allclose(euler(lambda x, t: velocity_target(x0, noise), noise, times), x0, atol=1e-5)


@pytest.mark.parametrize("steps", [4, 20, 40])
def test_the_time_grid_is_that_of_the_public_scheduler(steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    mu = shift_mu(1024, (0.5, 0.9))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential", shift_terminal=0.02)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
    assert torch.allclose(shifted_times(steps, mu=mu, final_sigma=0.02).float(), scheduler.sigmas, atol=1e-5)


def test_mu_is_linear_in_tokens_between_the_published_points():
    assert shift_mu(256, (0.5, 0.9)) == pytest.approx(0.5)
    assert shift_mu(8192, (0.5, 0.9)) == pytest.approx(0.9)
    assert shift_mu(4096, (0.5, 0.9)) == pytest.approx(0.69, abs=0.005)
