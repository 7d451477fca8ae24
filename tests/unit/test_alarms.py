"""Alarms of reinforcement learning: each is raised by its own fault, and none by a healthy run."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from PIL import Image, ImageFilter

from model_core.data.keys import keyed_generator
from model_core.data.synthetic import Scene, render
from model_core.recipe import Alarms
from model_core.training.alarms import AlarmBell, picture_statistics

SETTINGS = Alarms(window=4)
HEALTHY = {
    "reward": 0.5,
    "gold": 0.5,
    "gold_spread": 0.1,
    "agreement": 0.4,
    "high_frequency": 0.02,
    "saturation": 0.3,
    "diversity": 0.1,
    "at_upper": 0.1,
    "at_lower": 0.1,
    "flat/alignment": 0.1,
    "invalid/alignment": 0.0,
}


def heard(num: int, **changed: float) -> list[str]:
    """What a healthy beginning of one window and then `num` updates with changes raise."""
    bell = AlarmBell(SETTINGS)
    alarms: list[str] = []
    for update in range(SETTINGS.window + num):
        alarms += bell.hear(HEALTHY if update < SETTINGS.window else HEALTHY | changed)
    return alarms


def test_a_healthy_run_raises_none() -> None:
    assert heard(40, reward=0.9, gold=0.7) == []


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"flat/alignment": 1.0}, "alignment gives all pictures of a prompt one value"),
        ({"invalid/alignment": 1.0}, "scores of alignment are invalid"),
        ({"agreement": -0.9}, "agrees with what is trained on by -0.90"),
        ({"reward": 0.9, "gold": 0.2}, "the gold reward has fallen by 0.3"),
        ({"high_frequency": 0.2}, "high frequencies is 10.0 times"),
        ({"saturation": 0.9}, "colour saturation is 3.0 times"),
        ({"diversity": 0.01}, "pictures of one prompt differ by 10%"),
        ({"at_lower": 0.9}, "80% more transitions are held at the lower bound"),
        ({"at_upper": 0.9}, "80% more transitions are held at the upper bound"),
    ],
)
def test_each_fault_raises_its_own_alarm(changed: dict[str, float], told: str) -> None:
    alarms = heard(SETTINGS.window, **changed)
    assert len({re.sub(r"[0-9.%-]+", "", alarm) for alarm in alarms}) == 1
    assert told in alarms[-1]


def test_a_gold_reward_that_falls_with_the_trained_one_is_no_gap() -> None:
    assert heard(SETTINGS.window, reward=0.3, gold=0.2) == []


def test_prompts_that_differ_are_no_fall_of_the_gold_reward() -> None:
    """Forty runs of noise, whose deviation between updates is that within a group, raise none."""
    for run in range(40):
        noise = keyed_generator("alarms", run).normal(0.5, HEALTHY["gold_spread"], size=40)
        bell = AlarmBell(Alarms())
        assert not any(bell.hear(HEALTHY | {"gold": float(value), "reward": 0.5 + index / 100}) for index, value in enumerate(noise))


def test_what_could_not_be_measured_raises_none() -> None:
    bell = AlarmBell(SETTINGS)
    assert not any(bell.hear(dict.fromkeys(HEALTHY, float("nan"))) for _ in range(12))


def test_alarms_go_on_after_a_restart_as_if_there_had_been_none() -> None:
    whole, first = AlarmBell(SETTINGS), AlarmBell(SETTINGS)
    updates = [HEALTHY | {"high_frequency": 0.02 * (1 + index)} for index in range(12)]
    expected = [whole.hear(update) for update in updates]
    found = [first.hear(update) for update in updates[:7]]
    second = AlarmBell(SETTINGS)
    second.load_state_dict(first.state_dict())
    assert found + [second.hear(update) for update in updates[7:]] == expected
    assert any(expected)


def picture(color: str = "red", *, jitter: int = 0) -> Image.Image:
    return render(Scene(color, "circle", "left", "gray", "A7"), 64, "alarms", jitter)


def test_a_grid_raises_high_frequencies_and_blur_lowers_them() -> None:
    plain = picture()
    checkers = 40 * (np.indices((64, 64)).sum(axis=0) % 2)[..., None]
    grid = Image.fromarray((np.asarray(plain).astype(int) + checkers).clip(0, 255).astype(np.uint8))
    energies = [picture_statistics([[each]])["high_frequency"] for each in (plain.filter(ImageFilter.GaussianBlur(2)), plain, grid)]
    assert energies[0] < energies[1] < energies[2]


def test_saturation_is_the_distance_of_channels() -> None:
    flat = Image.new("RGB", (8, 8), (255, 0, 0))
    assert picture_statistics([[flat, flat.convert("L").convert("RGB")]])["saturation"] == pytest.approx(0.5)


def test_diversity_is_the_rms_distance_of_pairs() -> None:
    black, white = Image.new("RGB", (4, 4), (0, 0, 0)), Image.new("RGB", (4, 4), (255, 255, 255))
    assert picture_statistics([[black, black]])["diversity"] == 0
    assert picture_statistics([[black, white]])["diversity"] == pytest.approx(math.sqrt(0.5))  # of ordered pairs, half are equal
