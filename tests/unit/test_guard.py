"""The guard: what it does about losses that are not finite, that spike, and that do not come back."""

from __future__ import annotations

import json
import math

import pytest

from model_core.recipe import Guard
from model_core.training.guard import StepGuard, TrainingDiverged

SETTINGS = Guard(window=8, spike_deviations=5.0, spike_floor=0.5, patience=3, max_rollbacks=1)
NOISE = (1.0, 0.9, 1.1, 1.05, 0.95, 1.0, 0.97, 1.02)


def after(*losses: float) -> StepGuard:
    guard = StepGuard(SETTINGS)
    for step, loss in enumerate(losses, start=1):
        assert guard.judge(step, loss=loss, grad_norm=1.0) == "good"
    return guard


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)])
def test_a_step_that_is_not_finite_is_skipped_from_the_first_one_on(loss: float, norm: float) -> None:
    guard = StepGuard(SETTINGS)
    assert guard.judge(1, loss=loss, grad_norm=norm) == "skip"
    assert not guard.calm
    assert "step 1" in guard.newest
    assert "not finite; skip" in guard.newest


def test_a_spike_is_skipped_and_does_not_move_the_threshold() -> None:
    guard = after(*NOISE)
    threshold = guard.threshold
    assert 1.4 < threshold < 2.0
    assert guard.judge(9, loss=threshold * 1.01, grad_norm=1.0) == "skip"
    assert guard.threshold == threshold
    assert guard.judge(10, loss=1.0, grad_norm=1.0) == "good"
    assert guard.calm


def test_noise_and_a_falling_loss_are_no_spikes() -> None:
    losses = [3.0 * 0.95**step * (1 + 0.2 * math.sin(7 * step)) for step in range(100)]
    assert not after(*losses).events


def test_nothing_is_a_spike_before_half_a_window_is_known() -> None:
    assert after(1.0, 1.0, 1.0, 50.0).events == []


def test_bad_steps_in_a_row_lead_back_to_a_checkpoint_and_then_to_an_end_with_a_report() -> None:
    guard = after(*NOISE)
    verdicts = [guard.judge(step, loss=9.0, grad_norm=1.0) for step in range(9, 14)]
    assert verdicts == ["skip", "skip", "roll back", "skip", "skip"]
    with pytest.raises(
        TrainingDiverged, match=r"after 1 returns to a checkpoint and 6 skipped steps; a lower learning rate.*step 14: loss 9.0"
    ):
        guard.judge(14, loss=9.0, grad_norm=1.0)


def test_a_guard_goes_on_from_its_state() -> None:
    guard = after(*NOISE)
    guard.judge(9, loss=9.0, grad_norm=1.0)
    again = StepGuard(SETTINGS)
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    for step, loss in enumerate((9.0, 1.0, 9.0, math.nan, 9.0), start=10):
        assert again.judge(step, loss=loss, grad_norm=1.0) == guard.judge(step, loss=loss, grad_norm=1.0)
    assert again.state_dict() == guard.state_dict() or math.isnan(float(again.events[-1]["loss"]))
    assert again.warnings == guard.warnings == ["5 steps were skipped, and the weights went back to a checkpoint 1 times"]
