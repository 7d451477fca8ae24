"""Ratios, clips, divergences and the policy gradient against closed forms and torch.distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from model_core.objectives.grpo import Replay, dppo_loss, gaussian_kl, guarded_log_ratio, log_prob, log_ratio, ppo_loss
from model_core.recipe import GuidanceMode
from model_core.sampling.rollout import Trajectories
from model_core.sampling.sde import Transition

FULL, HYBRID = GuidanceMode.FULL, GuidanceMode.CONDITIONAL


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def stds(num: int, value: float = 0.3) -> Tensor:
    return torch.full((num, 1, 1), value, dtype=torch.float64)


def test_log_probabilities_are_means_of_torchs_normal() -> None:
    mean, action, std = normal(4, 6, 5), normal(4, 6, 5, seed=1), torch.tensor([0.1, 0.3, 1.0, 2.0], dtype=torch.float64)[:, None, None]
    expected = torch.distributions.Normal(mean, std).log_prob(action).mean((1, 2))
    assert torch.allclose(log_prob(action, Replay(mean, std, FULL), sde="flow_sde"), expected, atol=1e-12, rtol=0)


def test_cps_log_probabilities_lack_the_variance_and_the_constants() -> None:
    mean, action, std = normal(4, 6, 5), normal(4, 6, 5, seed=1), stds(4)
    full = torch.distributions.Normal(mean, std).log_prob(action).mean((1, 2))
    constant = -std[0, 0, 0].log() - 0.5 * math.log(2 * math.pi)
    found = log_prob(action, Replay(mean, std, FULL), sde="cps")
    assert torch.allclose(found, (full - constant) * 2 * std[:, 0, 0] ** 2, atol=1e-12, rtol=0)


def test_log_ratios_of_a_drift_have_the_moments_of_the_closed_form() -> None:
    num, dims, delta = 4000, 64, 0.2
    old, std = torch.zeros(num, 1, dims, dtype=torch.float64), stds(num)
    action = old + std * normal(num, 1, dims)
    drift = delta * std * torch.ones_like(old)  # RMS of drift / std is delta
    found = log_ratio(action, Replay(old + drift, std, FULL), Replay(old, std, FULL), sde="flow_sde")
    assert math.isclose(found.mean().item(), -(delta**2) / 2, abs_tol=4 * delta / math.sqrt(dims * num))
    assert math.isclose(found.std().item(), delta / math.sqrt(dims), rel_tol=0.05)


def test_the_guarded_exponent_is_the_mean_of_noise_times_drift() -> None:
    old, noise, drift, std = normal(3, 8, 4), normal(3, 8, 4, seed=1), 1e-2 * normal(3, 8, 4, seed=2), stds(3, 0.37)
    action, new, before = old + std * noise, Replay(old + drift, std, FULL), Replay(old, std, FULL)
    assert torch.allclose(guarded_log_ratio(action, new, before), (noise * drift).mean((1, 2)), atol=1e-15, rtol=0)
    bias = (drift.square() / (2 * std.square())).mean((1, 2))
    written_out = (log_ratio(action, new, before, sde="flow_sde") + bias) * std[:, 0, 0]
    assert torch.allclose(guarded_log_ratio(action, new, before), written_out, atol=1e-14, rtol=0)


def test_the_divergence_is_that_of_two_normals_and_has_a_gradient() -> None:
    mean, std = normal(3, 4, 2).requires_grad_(), stds(3, 0.4)
    other = normal(3, 4, 2, seed=1)
    found = gaussian_kl(Replay(mean, std, FULL), Replay(other, std, FULL))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, std.expand_as(mean)), torch.distributions.Normal(other, std.expand_as(other))
    ).mean((1, 2))
    assert torch.allclose(found, expected, atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(found.sum(), mean)
    assert torch.allclose(gradient, (mean - other) / std**2 / 8, atol=1e-12, rtol=0)


def test_the_divergence_over_the_diffusion_coefficient_would_be_short_of_the_step() -> None:
    diffusion, dt = 0.7, 0.05
    new, old = Replay(normal(2, 3, 4), stds(2, diffusion * math.sqrt(dt)), FULL), Replay(normal(2, 3, 4, seed=1), stds(2), FULL)
    without_dt = ((new.mean - old.mean).square() / (2 * diffusion**2)).mean((1, 2))
    assert torch.allclose(gaussian_kl(new, old) * dt, without_dt, atol=1e-12, rtol=0)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize(("log_r", "side"), [(0.5, "above"), (0.05, "inside"), (-0.05, "inside"), (-0.5, "below")])
def test_clipping_stops_the_gradient_only_where_the_ratio_has_gone_the_advantages_way(advantage: float, log_r: float, side: str) -> None:
    value = torch.tensor([log_r], dtype=torch.float64, requires_grad=True)
    held = (advantage > 0 and side == "above") or (advantage < 0 and side == "below")
    found = ppo_loss(value, torch.tensor([advantage], dtype=torch.float64), clip=0.2)
    (gradient,) = torch.autograd.grad(found.loss.sum(), value)
    assert (gradient.item() == 0) == held
    assert bool(found.at_upper) == (held and side == "above")
    assert bool(found.at_lower) == (held and side == "below")
    bounded = min(max(math.exp(log_r), 0.8), 1.2)
    assert math.isclose(found.loss.item(), max(-advantage * math.exp(log_r), -advantage * bounded), rel_tol=1e-12)


@pytest.mark.parametrize("far", [True, False])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("log_r", [0.01, -0.01])
def test_dppo_drops_a_transition_only_if_far_and_moving_on(far: bool, advantage: float, log_r: float) -> None:
    value = torch.tensor([log_r], dtype=torch.float64, requires_grad=True)
    divergence = torch.tensor([2e-5 if far else 0.5e-5], dtype=torch.float64)
    found = dppo_loss(value, torch.tensor([advantage], dtype=torch.float64), divergence, max_kl=1e-5)
    (gradient,) = torch.autograd.grad(found.loss.sum(), value)
    dropped = far and advantage * log_r > 0
    assert (gradient.item() == 0) == dropped
    assert math.isclose(found.loss.item(), 0.0 if dropped else -advantage * math.exp(log_r), rel_tol=1e-12)


@pytest.mark.parametrize("ratio", ["ppo", "guard"])
def test_at_the_old_policy_the_ratio_is_one_and_the_gradient_that_of_the_log_probability(ratio: str) -> None:
    mean, std, advantages = normal(6, 4, 3).requires_grad_(), stds(6), normal(6, seed=2)
    action = (mean + std * normal(6, 4, 3, seed=1)).detach()
    new = Replay(mean, std, HYBRID)
    ratios = log_ratio(action, new, new.detach(), sde="flow_sde") if ratio == "ppo" else guarded_log_ratio(action, new, new.detach())
    found = ppo_loss(ratios, advantages, clip=1e-9)
    assert found.ratio.tolist() == [1.0] * 6
    assert math.isclose(found.loss.mean().item(), -advantages.mean().item(), rel_tol=1e-12)
    (gradient,) = torch.autograd.grad(found.loss.mean(), mean)
    density = torch.distributions.Normal(mean, std).log_prob(action).mean((1, 2))
    (expected,) = torch.autograd.grad(-(advantages * density).mean(), mean)
    scale = std if ratio == "guard" else 1.0  # the guard's exponent is the log ratio's times std
    assert torch.allclose(gradient, scale * expected, atol=1e-14, rtol=0)


def test_the_policy_gradient_of_a_gaussian_is_the_analytic_one_and_ignores_a_constant() -> None:
    """r = -(x - c)^2 under N(theta, s^2): d E[r] / d theta = -2 (theta - c)."""
    num, theta, target, s = 200_000, 0.3, 1.0, 0.5
    noise = normal(num, 1, 1)
    mean = torch.full((num, 1, 1), theta, dtype=torch.float64, requires_grad=True)
    action, std = (mean + s * noise).detach(), stds(num, s)
    rewards = -((action - target) ** 2)[:, 0, 0]
    gradients = []
    for offset in (0.0, 100.0):
        advantages = rewards + offset - (rewards + offset).mean()
        policy = Replay(mean, std, FULL)
        loss = ppo_loss(log_ratio(action, policy, policy.detach(), sde="flow_sde"), advantages, clip=0.5).loss.mean()
        (gradient,) = torch.autograd.grad(-loss, mean)
        gradients.append(gradient.sum().item())
    assert math.isclose(gradients[0], -2 * (theta - target), rel_tol=0.02)
    assert math.isclose(*gradients, rel_tol=1e-9)


def test_policy_gradient_steps_reach_the_rewards_optimum() -> None:
    theta, target, s, rng = torch.zeros((), dtype=torch.float64, requires_grad=True), 0.8, 0.3, np.random.default_rng(0)
    for _ in range(300):
        mean = theta.expand(256, 1, 1)
        action = (mean + s * torch.from_numpy(rng.standard_normal((256, 1, 1)))).detach()
        rewards = -((action - target) ** 2)[:, 0, 0]
        policy = Replay(mean, stds(256, s), FULL)
        loss = ppo_loss(log_ratio(action, policy, policy.detach(), sde="flow_sde"), rewards - rewards.mean(), clip=0.5).loss.mean()
        (gradient,) = torch.autograd.grad(loss, theta)
        with torch.no_grad():
            theta -= 0.05 * gradient
    assert math.isclose(theta.item(), target, abs_tol=0.03)


def test_actions_kept_in_bfloat16_would_shift_every_ratio() -> None:
    """The rounding's mean square error e^2 of N(0, 1) values makes a log ratio of -e^2 / (2 std^2) out of nothing."""
    drawn, noise = normal(64, 32, 64), normal(64, 32, 64, seed=1)
    kept = drawn.bfloat16().double()
    assert math.isclose((kept - drawn).square().mean().sqrt().item(), 1.66e-3, rel_tol=0.02)
    for std, expected in ((0.3, -1.5e-5), (0.1, -1.4e-4)):
        # Of each noise its negative too, so that the term linear in the error cancels and the bias is seen with few samples.
        policies = [Replay(drawn - sign * std * noise, stds(64, std), FULL) for sign in (1, -1)]
        shifts = [(log_prob(kept, policy, sde="flow_sde") - log_prob(drawn, policy, sde="flow_sde")).mean() for policy in policies]
        assert math.isclose(torch.stack(shifts).mean().item(), expected, rel_tol=0.05)


def test_means_under_different_guidance_have_no_ratio() -> None:
    new, old = (Replay(normal(1, 2, 3), stds(1), mode) for mode in (HYBRID, FULL))
    with pytest.raises(TypeError, match="conditional and full"):
        log_ratio(new.mean, new, old, sde="flow_sde")
    with pytest.raises(TypeError, match="conditional and full"):
        guarded_log_ratio(new.mean, new, old)
    with pytest.raises(TypeError, match="conditional and full"):
        gaussian_kl(new, old)


def test_what_a_rollout_drew_around_is_no_old_policy() -> None:
    """The type checker refuses both calls, and complains of these comments where it does not; run time does too."""
    new, drawn = Replay(normal(1, 2, 3), stds(1), HYBRID), Transition(normal(1, 2, 3), stds(1))
    kept = Trajectories(normal(1, 1, 2, 3), normal(1, 1, 2, 3), torch.ones(1, 1), torch.zeros(1, 1), normal(1, 2, 3))
    with pytest.raises(AttributeError):
        log_ratio(new.mean, new, drawn, sde="flow_sde")  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        log_ratio(new.mean, new, kept, sde="flow_sde")  # type: ignore[arg-type]
