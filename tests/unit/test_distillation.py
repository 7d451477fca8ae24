"""Distribution-matching distillation on Gaussians, where every score is known: alignment.md's closed forms 16 to 20."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from model_core.objectives.distillation import distillation_loss, matching_gradient, split_real
from model_core.objectives.flow import flow_loss, interpolate, velocity_target
from model_core.objectives.guidance import guide
from model_core.sampling.few_step import clean_prediction

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(40)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def gaussian_velocity(x: Tensor, t: float, mean: float, variance: float) -> Tensor:
    """E[eps - x0 | x_t] where x0 is N(mean, variance): by the regression line of each on x_t, written from their covariances."""
    total = (1 - t) ** 2 * variance + t**2
    centred = x - (1 - t) * mean
    return (t / total) * centred - (mean + (1 - t) * variance / total * centred)


def gaussian_score(x: Tensor, t: float, mean: float, variance: float) -> Tensor:
    return -(x - (1 - t) * mean) / ((1 - t) ** 2 * variance + t**2)


def expectations(t: float, *, student: tuple[float, float], teacher: tuple[float, float]) -> tuple[float, float]:
    """E[g] and E[g eps] of g = (1 - t)((1 - t) / t^2)(x0_fake - x0_real) at x = mean + f eps, by quadrature over eps and noise."""
    (mean, variance), first, second = student, 0.0, 0.0
    for eps, weight in zip(NODES, WEIGHTS, strict=True):
        clean = torch.full((len(NODES), 1, 1), mean + math.sqrt(variance) * eps, dtype=torch.float64)
        noised = (1 - t) * clean + t * torch.from_numpy(NODES)[:, None, None]
        fake, real = (clean_prediction(noised, gaussian_velocity(noised, t, *one), t) for one in (student, teacher))
        gradient, _ = matching_gradient(clean, fake, real)
        gradient = gradient * (clean - real).abs().mean(dim=(1, 2), keepdim=True) * (1 - t) ** 2 / t**2
        value = float((torch.from_numpy(WEIGHTS) * gradient[:, 0, 0]).sum())
        first, second = first + weight * value, second + weight * value * eps
    return first, second


def test_the_gradient_of_a_gaussian_student_is_that_of_the_kl() -> None:
    mean_gradient, scale_gradient = expectations(0.5, student=(0.2, 0.6), teacher=(1.0, 0.25))
    v_real, v_fake = 0.25 * 0.25 + 0.25, 0.25 * 0.6 + 0.25
    assert mean_gradient == pytest.approx(0.25 * (0.2 - 1.0) / v_real, abs=1e-9)
    assert mean_gradient == pytest.approx(-0.640, abs=5e-4)
    assert scale_gradient == pytest.approx(0.25 * math.sqrt(0.6) * (1 / v_real - 1 / v_fake), abs=1e-9)
    assert scale_gradient == pytest.approx(0.1356, abs=5e-5)


@pytest.mark.parametrize("t", [0.05, 0.5, 0.95])
def test_clean_predictions_differ_as_scores_do_and_agree_where_the_distributions_do(t: float) -> None:
    x = torch.linspace(-3, 3, 25, dtype=torch.float64)[None, :, None]
    fake, real = (clean_prediction(x, gaussian_velocity(x, t, *one), t) for one in ((0.2, 0.6), (1.0, 0.25)))
    scores = gaussian_score(x, t, 0.2, 0.6) - gaussian_score(x, t, 1.0, 0.25)
    assert ((1 - t) / t**2 * (fake - real) - scores).abs().max() < 1e-12 / t**2
    same = clean_prediction(x, gaussian_velocity(x, t, 1.0, 0.25), t)
    assert torch.equal(same, real)


def test_the_loss_has_the_gradient_over_the_number_of_values() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, gradient = (torch.randn(3, 4, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    clean.requires_grad_(True)
    distillation_loss(clean, gradient, num_elements=24).backward()
    assert clean.grad is not None
    torch.testing.assert_close(clean.grad, gradient / 24)


def test_a_samples_gradient_depends_neither_on_the_batch_nor_on_the_scale_of_latents() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, fake, real = (torch.randn(3, 4, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    together, _ = matching_gradient(clean, fake, real)
    alone, _ = matching_gradient(clean[1:2], fake[1:2], real[1:2])
    torch.testing.assert_close(together[1:2], alone)
    torch.testing.assert_close(matching_gradient(7 * clean, 7 * fake, 7 * real)[0], together)


def test_a_sample_that_is_where_the_teacher_has_it_gets_no_gradient_and_is_counted() -> None:
    clean = torch.ones(2, 4, 2)
    real = torch.stack([clean[0], clean[1] - 1])
    gradient, empty = matching_gradient(clean, clean + 1, real)
    assert empty == 1
    assert torch.equal(gradient[0], torch.zeros(4, 2))
    assert torch.equal(gradient[1], torch.full((4, 2), 2.0))


def test_with_guidance_the_student_ends_where_guidance_pushes_it_and_not_at_the_teachers_samples() -> None:
    conditional, unconditional, scale, variance, t = 1.0, 0.0, 4.0, 0.25, 0.5
    mean, eps, weights = torch.zeros((), dtype=torch.float64), torch.from_numpy(NODES)[:, None, None], torch.from_numpy(WEIGHTS)
    for _ in range(100):
        clean = mean + math.sqrt(variance) * eps
        x = (1 - t) * clean
        fake = clean_prediction(x, gaussian_velocity(x, t, float(mean), variance), t)
        c, u = (gaussian_velocity(x, t, one, variance) for one in (conditional, unconditional))
        real = clean_prediction(x, guide(c, u, scale=scale, rescale_norm=False), t)
        mean = mean - (weights * (fake - real)[:, 0, 0]).sum()
    assert float(mean) == pytest.approx(conditional + (scale - 1) * (conditional - unconditional), abs=1e-6)
    assert float(mean) == pytest.approx(4.0, abs=1e-6)


def test_guidance_taken_apart_is_guidance_where_both_times_are_one() -> None:
    x = torch.linspace(-3, 3, 25, dtype=torch.float64)[None, :, None]
    t = 0.5
    c, u = (gaussian_velocity(x, t, one, 0.25) for one in (1.0, 0.0))
    conditional, guided = (clean_prediction(x, one, t) for one in (c, guide(c, u, scale=4.0, rescale_norm=False)))
    torch.testing.assert_close(split_real(conditional, guided, conditional), guided)
    added = split_real(conditional, guided, conditional) - conditional
    torch.testing.assert_close(added, 3.0 * (conditional - clean_prediction(x, u, t)))


def critic_after(steps: int, *, student: tuple[float, float], t: float, start: tuple[float, float]) -> tuple[float, float]:
    """Slope and intercept of an affine critic v = a x + b, trained by flow matching on the student's samples with SGD."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in start)
    optimizer = torch.optim.SGD([a, b], lr=0.1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + 0.02 * step)
        drawn = torch.randn(2, 512, 1, 1, generator=generator, dtype=torch.float64)
        clean, noise = student[0] + math.sqrt(student[1]) * drawn[0], drawn[1]
        noised = interpolate(clean, noise, torch.full((512, 1), t, dtype=torch.float64))
        optimizer.zero_grad()
        error = a * noised + b - velocity_target(clean, noise)
        (error.square().sum() / error.numel()).backward()
        optimizer.step()
    return a.item(), b.item()


def test_flow_matching_on_the_students_samples_leads_to_its_own_score() -> None:
    slope, intercept = critic_after(2000, student=(0.2, 0.6), t=0.5, start=(0.0, 0.0))
    x = torch.tensor([[[0.0]], [[1.0]]], dtype=torch.float64)
    exact = gaussian_velocity(x, 0.5, 0.2, 0.6).flatten()
    assert intercept == pytest.approx(float(exact[0]), abs=0.02)
    assert slope == pytest.approx(float(exact[1] - exact[0]), abs=0.02)


def test_a_fake_score_that_lags_behind_biases_the_gradient_towards_where_the_student_was() -> None:
    t, teacher, now, before = 0.5, (1.0, 0.25), (0.9, 0.25), (0.2, 0.25)
    x = (1 - t) * now[0] + t * torch.from_numpy(NODES)[:, None, None]
    real = clean_prediction(x, gaussian_velocity(x, t, *teacher), t)
    fresh, stale = (clean_prediction(x, gaussian_velocity(x, t, *one), t) - real for one in (now, before))
    bias = float(((stale - fresh)[:, 0, 0] * torch.from_numpy(WEIGHTS)).sum())
    slope = (1 - t) * 0.25 / ((1 - t) ** 2 * 0.25 + t**2)
    assert bias == pytest.approx((before[0] - now[0]) * (1 - slope * (1 - t)), abs=1e-9)
    assert bias < 0  # descent on it raises the mean beyond the teacher's: the student overshoots while its fake score lags


def test_an_error_of_a_part_adds_up_to_the_mean_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    found, target = (torch.randn(6, 4, 2, generator=generator) for _ in range(2))
    parts = sum(flow_loss(found[rows], target[rows], num_elements=48) for rows in (slice(0, 2), slice(2, 6)))
    torch.testing.assert_close(parts, (found - target).square().mean())
