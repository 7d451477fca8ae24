"""Stochastic steps of a flow against closed forms on scalar Gaussian data, where every step is affine and moments propagate exactly."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from model_core.recipe import SDE
from model_core.sampling.sde import transition

MEAN, STD = 1.0, 0.5  # of the data: x0 ~ N(m, s^2)


def optimal_velocity(sigma: float, *, m: float, s: float) -> tuple[float, float]:
    """v(x) = a x + b for x0 ~ N(m, s^2), by the regression of eps - x0 on x."""
    variance = (1 - sigma) ** 2 * s**2 + sigma**2
    a = (sigma - (1 - sigma) * s**2) / variance
    return a, -m - a * (1 - sigma) * m


def step_coefficients(kind: SDE, sigma: float, following: float, *, m: float, s: float, level: float) -> tuple[float, float, float]:
    """(gain, offset, std) of the step under test, read off two states."""
    a, b = optimal_velocity(sigma, m=m, s=s)
    x = torch.tensor([[[0.0]], [[1.0]]], dtype=torch.float64)
    times = {"t": torch.full((2,), sigma, dtype=torch.float64), "following": torch.full((2,), following, dtype=torch.float64)}
    step = transition(kind, x, a * x + b, **times, noise_level=level)
    return (step.mean[1] - step.mean[0]).item(), step.mean[0].item(), step.std[0].item()


def moments(kind: SDE, num: int, level: float, *, m: float = MEAN, s: float = STD, last_ode: bool = True) -> list[tuple[float, float]]:
    """(mean, std) after each step of a uniform grid from N(0, 1) at time 1; the last step without noise where `last_ode`."""
    grid = np.linspace(1.0, 0.0, num + 1)
    mean, variance, found = 0.0, 1.0, []
    for index, (sigma, following) in enumerate(itertools.pairwise(grid)):
        final = index == num - 1 and last_ode
        gain, offset, std = step_coefficients(kind, float(sigma), float(following), m=m, s=s, level=0.0 if final else level)
        mean, variance = gain * mean + offset, gain**2 * variance + std**2
        found.append((mean, math.sqrt(variance)))
    return found


@pytest.mark.parametrize("sigma", [0.05, 0.3, 0.5, 0.9, 1.0])
def test_velocity_clean_state_noise_and_score_of_the_gaussian_are_one_another(sigma: float) -> None:
    a, b = optimal_velocity(sigma, m=MEAN, s=STD)
    x = 0.37
    v = a * x + b
    clean, noise = x - sigma * v, x + (1 - sigma) * v
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    assert math.isclose((1 - sigma) * clean + sigma * noise, x, abs_tol=1e-12)
    assert math.isclose(-noise / sigma, -(x - (1 - sigma) * MEAN) / variance, abs_tol=1e-12)
    # Dance-SDE's mean differs from Euler's by the score alone, so it tells which score the code uses.
    following = sigma / 2
    times = {"t": torch.tensor([sigma], dtype=torch.float64), "following": torch.tensor([following], dtype=torch.float64)}
    state, velocity = (torch.full((1, 1, 1), value, dtype=torch.float64) for value in (x, v))
    step = transition("dance_sde", state, velocity, **times, noise_level=0.3)
    euler = x + v * (following - sigma)
    score = (euler - step.mean.item()) / (0.5 * 0.3**2 * (following - sigma))
    assert math.isclose(score, -(x - (1 - sigma) * MEAN) / variance, rel_tol=1e-9)


@pytest.mark.parametrize(
    ("kind", "level", "expected"),
    [
        ("flow_sde", 0.0, (0.4308, 0.4818, 0.4954, 0.4997)),
        ("flow_sde", 0.7, (0.4796, 0.4974, 0.5009, 0.5007)),
        ("flow_sde", 1.2, (0.5002, 0.4992, 0.4998, 0.5000)),
        ("dance_sde", 0.3, (0.4400, 0.4845, 0.4961, 0.4998)),
    ],
)
def test_marginals_of_the_sdes_become_those_of_the_ode(kind: SDE, level: float, expected: tuple[float, ...]) -> None:
    for num, std in zip((10, 40, 160, 2560), expected, strict=True):
        mean, found = moments(kind, num, level)[-1]
        assert math.isclose(mean, MEAN, abs_tol=1e-9)
        assert math.isclose(found, std, abs_tol=6e-5)


def test_cps_keeps_the_noise_coefficient_and_not_the_marginals() -> None:
    for num in (10, 40):
        grid = np.linspace(1.0, 0.0, num + 1)[1:]
        for sigma, (_, std) in zip(grid, moments("cps", num, 0.8, m=0.0, s=0.0, last_ode=False), strict=True):
            assert math.isclose(std, float(sigma), abs_tol=1e-12)
    found = [moments("cps", num, 0.8)[-1][1] for num in (10, 40, 160, 2560)]
    assert found == pytest.approx([0.3518, 0.3861, 0.3978, 0.4036], abs=6e-5)


@pytest.mark.parametrize(("level", "expected"), [(0.7, (1.065, 1.111, 1.381)), (1.2, (1.348, 1.429, 1.902))])
def test_ten_flow_sde_steps_leave_more_noise_than_the_path_has(level: float, expected: tuple[float, ...]) -> None:
    after = moments("flow_sde", 10, level, m=0.0, s=0.0, last_ode=False)
    ratios = [after[index][1] / sigma for index, sigma in ((0, 0.9), (1, 0.8), (8, 0.1))]
    assert ratios == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps"])
def test_without_noise_every_step_is_eulers(kind: SDE) -> None:
    generator = np.random.default_rng(0)
    x, v = (torch.from_numpy(generator.standard_normal((5, 4, 3))) for _ in range(2))
    t = torch.tensor([1.0, 0.9, 0.5, 0.2, 0.1], dtype=torch.float64)
    following = torch.tensor([0.9, 0.5, 0.2, 0.1, 0.0], dtype=torch.float64)
    step = transition(kind, x, v, t=t, following=following, noise_level=0.0)
    assert torch.allclose(step.mean, x + (following - t)[:, None, None] * v, atol=1e-14, rtol=0)
    assert not step.std.any()


@pytest.mark.parametrize("following", [0.99, 0.9, 0.5])
def test_the_first_flow_sde_steps_noise_is_the_level_on_every_grid(following: float) -> None:
    x = torch.zeros(1, 2, 3, dtype=torch.float64)
    times = {"t": torch.ones(1, dtype=torch.float64), "following": torch.tensor([following], dtype=torch.float64)}
    assert math.isclose(transition("flow_sde", x, x, **times, noise_level=0.83).std.item(), 0.83, rel_tol=1e-12)


def test_bfloat16_velocities_give_means_in_fp32() -> None:
    x, v = torch.zeros(1, 2, 3, dtype=torch.bfloat16), torch.ones(1, 2, 3, dtype=torch.bfloat16)
    step = transition("flow_sde", x, v, t=torch.tensor([0.5]), following=torch.tensor([0.4]), noise_level=0.7)
    assert step.mean.dtype == torch.float32


@pytest.mark.parametrize(("t", "following"), [(0.5, 0.5), (0.4, 0.5), (1.1, 0.5), (0.5, -0.1)])
def test_times_that_do_not_fall_are_refused(t: float, following: float) -> None:
    x = torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match="allowed are"):
        transition("flow_sde", x, x, t=torch.tensor([t]), following=torch.tensor([following]), noise_level=0.7)
