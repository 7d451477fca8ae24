"""Rewards of an update put together: weights by category, scores that are invalid, and what is measured of them."""

from __future__ import annotations

import math

import pytest
import torch

from model_core.rewards.verdict import Invalid, Score, Value
from model_core.training.tally import agreement, make_tally

WEIGHTS = {"default": {"a": 1.0, "b": 3.0}, "edit": {"b": 1.0}}
NAMES = ("a", "b")


def scores(a: list[float | None], b: list[float | None]) -> list[dict[str, Score]]:
    def one(value: float | None) -> Score:
        return Invalid("torn") if value is None else Value(value)

    return [{"a": one(first), "b": one(second)} for first, second in zip(a, b, strict=True)]


GROUPS = [scores([0.0, 1.0, 2.0], [0.0, 0.5, None]), scores([5.0, 5.0, None], [1.0, 2.0, 3.0])]
TALLY = make_tally(GROUPS, names=NAMES, categories=["text", "edit"])


def test_weights_are_the_categorys_and_sum_to_one() -> None:
    assert TALLY.weights(WEIGHTS).tolist() == [[0.25, 0.75], [0.0, 1.0]]


def test_totals_are_means_over_the_valid_rewards() -> None:
    totals, counted = TALLY.totals(WEIGHTS)
    assert bool(counted.all())
    assert torch.allclose(totals, torch.tensor([[0.0, 0.625, 2.0], [1.0, 2.0, 3.0]], dtype=torch.float64))


def test_a_sample_without_any_valid_reward_is_not_counted() -> None:
    totals, counted = make_tally([scores([None, 1.0], [None, 1.0])], names=NAMES, categories=["text"]).totals(WEIGHTS)
    assert counted.tolist() == [[False, True]]
    assert totals[0, 0] == 0


def test_advantages_weigh_normalised_rewards() -> None:
    found = TALLY.advantages(WEIGHTS, std_floor=1e-6)
    first = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) * math.sqrt(1.5)
    second = torch.tensor([-1.0, 1.0, 0.0], dtype=torch.float64)
    assert torch.allclose(found[0], 0.25 * first + 0.75 * second)
    assert torch.allclose(found[1], first)


def test_a_value_that_is_not_finite_is_invalid_and_counted_as_such() -> None:
    tally = make_tally([scores([math.nan, 1.0], [1.0, 1.0])], names=NAMES, categories=["text"])
    assert tally.valid["a"].tolist() == [[False, True]]
    assert tally.reasons(WEIGHTS) == {"a: not finite": 1}
    assert tally.means() == {"a": 1.0, "b": 1.0}


def test_what_a_category_is_not_rewarded_for_is_no_loss() -> None:
    assert TALLY.reasons(WEIGHTS) == {"b: torn": 1}
    assert TALLY.invalid_share("b", expected=torch.tensor([True, False])) == pytest.approx(1 / 3)


def test_flat_groups_are_those_a_reward_cannot_tell_apart() -> None:
    assert TALLY.flat_share("a", std_floor=1e-3) == 0.5
    assert math.isnan(make_tally([scores([None, None], [1.0, 2.0])], names=NAMES, categories=["text"]).flat_share("a", std_floor=1e-3))


def test_the_spread_is_the_totals_mean_deviation_within_a_group() -> None:
    totals, _ = TALLY.totals(WEIGHTS)
    assert TALLY.spread(WEIGHTS) == pytest.approx(totals.std(dim=1, correction=0).mean().item())


@pytest.mark.parametrize(("sign", "expected"), [(1.0, 1.0), (-1.0, -1.0), (0.0, math.nan)])
def test_agreement_is_the_correlation_within_groups(sign: float, expected: float) -> None:
    """Of groups whose means differ the other way: the correlation over all would be of the other sign."""
    proxy = torch.tensor([[0.0, 1.0, 2.0], [10.0, 11.0, 12.0]], dtype=torch.float64)
    gold = sign * (proxy - proxy.mean(1, keepdim=True)) - 5 * sign * proxy.mean(1, keepdim=True)
    found = agreement(proxy, gold, torch.ones(2, 3, dtype=torch.bool))
    assert found == pytest.approx(expected, nan_ok=True)
