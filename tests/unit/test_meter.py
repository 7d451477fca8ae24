"""The meter: speeds of a stretch, and goodput over all attempts."""

from __future__ import annotations

import pytest

from model_core.training.meter import Meter


def test_speeds_are_of_the_steps_since_the_last_point() -> None:
    meter = Meter(num_gpus=2, peak_flops=50e12, began_at=0.0, clock=lambda: 100.0)
    meter.add(9.0, tokens=1, flops=1.0, good=True)
    meter.close()
    for _ in range(4):
        meter.add(0.5, tokens=300, flops=20e12, good=True)
    numbers = meter.close()
    assert numbers["train/step_seconds"] == pytest.approx(0.5)
    assert numbers["train/tokens_per_second"] == pytest.approx(600)
    assert numbers["train/teraflops"] == pytest.approx(40)
    assert numbers["train/mfu"] == pytest.approx(40 / 100)


def test_without_a_known_peak_there_is_no_mfu() -> None:
    meter = Meter(num_gpus=1, peak_flops=None, began_at=0.0, clock=lambda: 10.0)
    meter.add(1.0, tokens=1, flops=1.0, good=True)
    assert "train/mfu" not in meter.close()


def test_goodput_counts_steps_that_were_kept_over_the_wall_time_of_all_attempts() -> None:
    first = Meter(num_gpus=1, peak_flops=None, began_at=1000.0, clock=lambda: 1010.0)
    for number in range(4):
        first.add(2.0, tokens=1, flops=1.0, good=number != 3)
    assert first.close()["train/goodput"] == pytest.approx(3 * 2.0 / 10.0)
    again = Meter(num_gpus=1, peak_flops=None, began_at=1030.0, clock=lambda: 1040.0)
    again.load_state_dict(first.state_dict())
    again.add(2.0, tokens=1, flops=1.0, good=True)
    assert again.close()["train/goodput"] == pytest.approx(4 * 2.0 / 40.0)
