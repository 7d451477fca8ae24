"""Alarms of reinforcement learning: signs that a reward is broken, or that the policy serves the reward and no longer the prompt.

Each is a mean over the newest `window` updates, held against a bound or against the first `window` updates of the policy.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from model_core.recipe import Alarms

NOISE = 5.0  # standard errors that a fall must exceed
HIGH_FREQUENCY = 0.5  # of the Nyquist frequency, from which on energy counts as high


class AlarmBell:
    """What the alarms have heard so far: one mapping of measured numbers an update.

    Understood names: reward, gold, gold_spread, agreement, high_frequency, saturation, diversity, at_upper, at_lower, and
    flat/REWARD, invalid/REWARD for each. NaN stands for what could not be measured in an update.
    """

    def __init__(self, settings: Alarms) -> None:
        self._settings = settings
        self._heard: list[dict[str, float | None]] = []

    def hear(self, measured: Mapping[str, float]) -> list[str]:
        """Takes in an update's numbers; returns the alarms that they raise, one sentence each."""
        self._heard.append({name: value if math.isfinite(value) else None for name, value in measured.items()})
        window = self._settings.window
        if len(self._heard) < window:
            return []
        alarms = self._broken_rewards()
        if not math.isnan(now := self._newest("agreement")) and now < self._settings.min_agreement:
            alarms.append(
                f"within a prompt's group the gold reward agrees with what is trained on by {now:.2f} (correlation); "
                f"allowed is {self._settings.min_agreement} or more"
            )
        if len(self._heard) >= 2 * window:
            alarms += self._drifts()
        return alarms

    def state_dict(self) -> dict[str, Any]:
        """All there is to go on from, as JSON values."""
        return {"heard": self._heard}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        self._heard = list(state["heard"])

    def _broken_rewards(self) -> list[str]:
        settings, alarms = self._settings, []
        for name in self._heard[-1]:
            kind, _, reward = name.partition("/")
            now = self._newest(name)
            if kind == "flat" and now > settings.max_flat_groups:
                alarms.append(f"{reward} gives all pictures of a prompt one value in {now:.0%} of the groups; it may be constant")
            if kind == "invalid" and now > settings.max_invalid_share:
                alarms.append(f"{now:.0%} of the scores of {reward} are invalid; allowed are {settings.max_invalid_share:.0%}")
        return alarms

    def _drifts(self) -> list[str]:
        settings, alarms = self._settings, []
        spread, fall = self._first("gold_spread"), self._first("gold") - self._newest("gold")
        if self._newest("reward") > self._first("reward") and fall > max(settings.max_gold_drop * spread, self._noise("gold")):
            alarms.append(
                f"the gold reward has fallen by {fall:.4g}, {fall / spread:.2f} of its deviation in a group, while the reward rose"
            )
        for name, bound, what in (
            ("high_frequency", settings.max_high_frequency, "energy in high frequencies"),
            ("saturation", settings.max_saturation, "colour saturation"),
        ):
            if self._newest(name) > bound * self._first(name):
                alarms.append(f"{what} is {self._newest(name) / self._first(name):.1f} times the beginning's; allowed are {bound}")
        if self._newest("diversity") < settings.min_diversity * self._first("diversity"):
            share = self._newest("diversity") / self._first("diversity")
            allowed = f"allowed are {settings.min_diversity:.0%}"
            alarms.append(f"pictures of one prompt differ by {share:.0%} of what they did at the beginning; {allowed}")
        asymmetry = self._newest("at_lower") - self._newest("at_upper")
        if abs(asymmetry) > settings.max_clip_asymmetry:
            side = "lower" if asymmetry > 0 else "upper"
            alarms.append(f"{abs(asymmetry):.0%} more transitions are held at the {side} bound of the ratio than at the other")
        return alarms

    def _noise(self, name: str) -> float:
        """What the means of two windows may differ by through their prompts alone: NOISE standard errors of the difference.

        The deviation between updates is told by neighbours, which a slow drift leaves alone (von Neumann 1941).
        """
        values = [value for update in self._heard if (value := update.get(name)) is not None]
        steps = [(after - before) ** 2 / 2 for before, after in pairwise(values)]
        return NOISE * math.sqrt(2 * statistics.fmean(steps) / self._settings.window) if steps else 0.0

    def _first(self, name: str) -> float:
        return self._mean(name, self._heard[: self._settings.window])

    def _newest(self, name: str) -> float:
        return self._mean(name, self._heard[-self._settings.window :])

    @staticmethod
    def _mean(name: str, updates: Sequence[Mapping[str, float | None]]) -> float:
        """Mean of what was measured; NaN, which raises no alarm, where nothing was."""
        known = [value for update in updates if (value := update.get(name)) is not None]
        return sum(known) / len(known) if known else float("nan")


def picture_statistics(groups: Sequence[Sequence[Image.Image]]) -> dict[str, float]:
    """Means over groups of pictures of one size: high_frequency, share of the luma's energy above half the Nyquist frequency;
    saturation, distance of the largest and the least channel; diversity, RMS distance of pictures of a group (0 to 1 each).
    """
    energies, saturations, distances = [], [], []
    for group in groups:
        pixels = np.stack([np.asarray(picture.convert("RGB"), dtype=np.float32) for picture in group]) / 255
        energies.append(_high_frequency(pixels.mean(axis=3)))
        saturations.append(float((pixels.max(axis=3) - pixels.min(axis=3)).mean()))
        distances.append(math.sqrt(2 * float(pixels.var(axis=0).mean())))
    return {
        "high_frequency": float(np.mean(energies)),
        "saturation": float(np.mean(saturations)),
        "diversity": float(np.mean(distances)),
    }


def _high_frequency(luma: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft2(luma - luma.mean(axis=(1, 2), keepdims=True))) ** 2
    rows, columns = np.fft.fftfreq(luma.shape[1]), np.fft.rfftfreq(luma.shape[2])
    high = np.hypot(rows[:, None], columns[None]) > HIGH_FREQUENCY / 2  # in cycles a pixel the Nyquist frequency is 1/2
    return float((spectrum[:, high].sum(axis=1) / np.maximum(spectrum.sum(axis=(1, 2)), 1e-12)).mean())
