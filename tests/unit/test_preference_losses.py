"""The losses of reward models against closed forms, sums by numpy and draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from model_core.objectives.preference import (
    TIE,
    A,
    B,
    bradley_terry_loss,
    calibration_error,
    expected_score,
    fit_temperature,
    pointwise_loss,
    rao_kupper_log_probs,
    uncertain_preference_loss,
)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_bradley_terry_has_the_slope_of_the_closed_form() -> None:
    rewards = torch.tensor([1.2, 0.5], dtype=torch.float64, requires_grad=True)
    bradley_terry_loss(rewards[0] - rewards[1]).backward()
    assert rewards.grad is not None
    assert rewards.grad[0].item() == pytest.approx(-0.33181, abs=5e-6)  # -sigmoid(-0.7)
    assert rewards.grad[0].item() == pytest.approx(-rewards.grad[1].item())


def test_probabilities_with_ties_sum_to_one_and_match_the_closed_form() -> None:
    deltas = torch.linspace(-8, 8, 41, dtype=torch.float64)
    torch.testing.assert_close(rao_kupper_log_probs(deltas, k=5.0).exp().sum(-1), torch.ones_like(deltas), rtol=0, atol=1e-12)
    found = rao_kupper_log_probs(torch.tensor(1.5, dtype=torch.float64), k=5.0).exp().tolist()
    assert found == pytest.approx([0.4727, 0.0427, 0.4846], abs=5e-5)
    assert rao_kupper_log_probs(torch.tensor(0.0), k=5.0).exp()[TIE].item() == pytest.approx(2 / 3)


def test_without_ties_it_is_bradley_terry_and_exchanging_sides_exchanges_labels() -> None:
    deltas = torch.tensor([-2.0, 0.3, 4.0], dtype=torch.float64)
    torch.testing.assert_close(-rao_kupper_log_probs(deltas, k=1.0)[:, A], bradley_terry_loss(deltas))
    torch.testing.assert_close(rao_kupper_log_probs(deltas, k=3.0)[:, A], rao_kupper_log_probs(-deltas, k=3.0)[:, B])


@pytest.mark.parametrize(("mean", "deviation", "expected"), [(0, 1, 0.80606), (1, 1, 0.40686), (1, 2, 0.64250)])
def test_uncertainty_loss_matches_the_closed_form(mean: float, deviation: float, expected: float) -> None:
    """alignment.md's check 25: 80 points of numpy's; here the default number."""
    found = uncertain_preference_loss(
        torch.tensor([mean], dtype=torch.float64), torch.tensor([deviation**2], dtype=torch.float64), torch.tensor([A]), k=1.0
    )
    assert found.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("label", [A, B, TIE])
def test_uncertainty_loss_with_ties_is_the_mean_over_draws(label: int) -> None:
    mean, deviation, k = 0.8, 1.3, 5.0
    z = mean + deviation * np.random.default_rng(0).standard_normal(400_000)
    better, worse = sigmoid(z - math.log(k)), sigmoid(-z - math.log(k))
    drawn = -np.log([better, worse, (k * k - 1) * better * worse][label])
    found = uncertain_preference_loss(torch.tensor([mean]), torch.tensor([deviation**2]), torch.tensor([label]), k=k).item()
    assert found == pytest.approx(drawn.mean(), abs=5 * drawn.std() / math.sqrt(z.size))


def test_without_uncertainty_it_is_the_plain_loss_with_finite_slopes() -> None:
    delta, variance = torch.tensor([0.7], requires_grad=True), torch.zeros(1, requires_grad=True)
    loss = uncertain_preference_loss(delta, variance, torch.tensor([A]), k=1.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.7)), abs=1e-5)
    assert delta.grad is not None
    assert delta.grad.item() == pytest.approx(-0.33181, abs=1e-5)
    assert variance.grad is not None
    assert torch.isfinite(variance.grad).all()


def test_expected_score_is_the_mean_of_the_softmax() -> None:
    logits = np.array([0.3, -1.0, 2.0, 0.0, 1.0])
    shares = np.exp(logits) / np.exp(logits).sum()
    expected = float((shares * [1, 2, 3, 4, 5]).sum())
    assert expected_score(torch.from_numpy(logits)).item() == pytest.approx(expected)
    assert expected_score(torch.zeros(2, 5)).tolist() == pytest.approx([3.0, 3.0])
    assert pointwise_loss(torch.from_numpy(logits), torch.tensor(4.0)).item() == pytest.approx((expected - 4) ** 2)


def test_temperature_is_that_which_the_answers_were_drawn_with() -> None:
    generator = np.random.default_rng(0)
    deltas = generator.normal(0, 3, 100_000)
    a_is_better = generator.random(deltas.size) < sigmoid(deltas / 2.5)
    temperature = fit_temperature(deltas, a_is_better)
    assert temperature == pytest.approx(2.5, rel=0.03)
    assert calibration_error(deltas, a_is_better, temperature=temperature) < 0.01
    assert calibration_error(deltas, a_is_better) > 0.05


def test_calibration_error_of_certain_and_wrong_answers_is_one() -> None:
    deltas = np.array([40.0, -40.0])
    assert calibration_error(deltas, np.array([False, True])) == pytest.approx(1.0)
    assert calibration_error(deltas, np.array([True, False])) == pytest.approx(0.0)
    assert calibration_error(np.array([]), np.array([], dtype=bool)) == 0.0
    assert fit_temperature(np.zeros(3), np.array([True, False, True])) == 1.0
