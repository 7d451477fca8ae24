"""Advantages: normalised within a prompt's group, indifferent to what must not matter, and untouched by what is not valid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from model_core.objectives.advantage import combine_advantages, group_advantages

ALL = torch.ones(3, 8, dtype=torch.bool)


def rewards(seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(3.0, 2.0, (3, 8)))


def test_each_group_has_mean_zero_and_deviation_one_by_its_own_number() -> None:
    found = group_advantages(rewards(), ALL, std_floor=1e-9).numpy()
    assert np.allclose(found.mean(axis=1), 0, atol=1e-12)
    assert np.allclose(found.std(axis=1, ddof=0), 1, atol=1e-12)


def test_a_rewards_scale_and_offset_do_not_matter() -> None:
    base = group_advantages(rewards(), ALL, std_floor=1e-9)
    assert torch.allclose(group_advantages(7.0 * rewards() - 40.0, ALL, std_floor=1e-9), base, atol=1e-12)


def test_the_order_within_a_group_does_not_matter() -> None:
    order = torch.tensor([3, 1, 4, 0, 7, 5, 2, 6])
    base = group_advantages(rewards(), ALL, std_floor=1e-9)
    assert torch.allclose(group_advantages(rewards()[:, order], ALL, std_floor=1e-9), base[:, order], atol=1e-12)


@pytest.mark.parametrize("hidden", [0.0, 1e9, float("nan"), float("inf")])
def test_an_invalid_sample_is_as_if_it_were_not_there(hidden: float) -> None:
    values, valid = rewards(), ALL.clone()
    values[1, 5], valid[1, 5] = hidden, False
    found = group_advantages(values, valid, std_floor=1e-9)
    others = [index for index in range(8) if index != 5]
    alone = group_advantages(values[1:2, others], ALL[:1, :7], std_floor=1e-9)
    assert found[1, 5] == 0
    assert torch.allclose(found[1, others], alone[0], atol=1e-12)


def test_a_value_that_is_not_finite_is_never_valid() -> None:
    values = rewards()
    values[0, 0] = float("nan")
    found = group_advantages(values, ALL, std_floor=1e-9)
    assert bool(torch.isfinite(found).all())
    assert found[0, 0] == 0


@pytest.mark.parametrize("count", [0, 1, 8])
def test_a_group_of_equal_values_or_fewer_than_two_has_none(count: int) -> None:
    valid = (torch.arange(8) < count).expand(1, 8)
    assert not group_advantages(torch.full((1, 8), 2.5), valid, std_floor=1e-3).any()


def test_a_spread_below_the_floor_is_not_blown_up() -> None:
    tiny = 1e-6 * rewards()
    assert group_advantages(tiny, ALL, std_floor=1e-3).abs().max() < 0.01


def test_no_reward_rules_by_its_scale_when_they_are_combined() -> None:
    small, large = group_advantages(rewards(0), ALL, std_floor=1e-9), group_advantages(1e6 * rewards(1), ALL, std_floor=1e-9)
    found = combine_advantages({"a": small, "b": large}, {"a": 2.0, "b": 2.0})
    assert torch.allclose(found, (small + large) / 2, atol=1e-12)


def test_a_combined_advantage_stays_within_five() -> None:
    assert combine_advantages({"a": torch.tensor([[9.0, -9.0]])}, {"a": 1.0}).tolist() == [[5.0, -5.0]]


@pytest.mark.parametrize("weights", [{"a": 0.0}, {"a": -1.0, "b": 2.0}])
def test_weights_that_weigh_nothing_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="found weights"):
        combine_advantages({"a": torch.zeros(1, 2), "b": torch.zeros(1, 2)}, weights)
