"""What a reward model says of pairs, and how that is calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from model_core.data.reward_pairs import Pair
from model_core.data.shards import decode_image
from model_core.models.reward import Calibration, Judgement, RewardModel, request_pictures
from model_core.objectives.preference import TIE, A, expected_score, fit_temperature

JUDGED_AT_ONCE = 32  # pairs


@dataclass(frozen=True)
class PairJudgements:
    """Of N pairs: expected score, Bradley-Terry mean and deviation, each (N, 2) for a and b."""

    expected: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray

    def values(self, calibration: Calibration) -> np.ndarray:
        """Calibrated values (N, 2)."""
        read = self.expected if calibration.reads == "score" else self.mean
        return read * calibration.scale + calibration.shift


def judge(model: RewardModel, pairs: Sequence[Pair]) -> Judgement:
    """What the model says of all a and then all b of these pairs."""
    chats = [model.chat(pair.prompt, num_sources=len(pair.sources)) for pair in pairs]
    pictures = [
        request_pictures([decode_image(source) for source in pair.sources], decode_image(picture), image_px=model.image_px)
        for pair, picture in [(pair, pair.image_a) for pair in pairs] + [(pair, pair.image_b) for pair in pairs]
    ]
    judgement: Judgement = model(chats * 2, torch.cat(pictures).to(model.score_head.weight.device))
    return judgement


@torch.inference_mode()
def judge_pairs(model: RewardModel, pairs: Sequence[Pair]) -> PairJudgements:
    """What the model says of pairs, in batches."""
    found = []
    for begin in range(0, len(pairs), JUDGED_AT_ONCE):
        said = judge(model, pairs[begin : begin + JUDGED_AT_ONCE])
        found.append(torch.stack([expected_score(said.logits), said.mean, said.log_deviation.exp()]).unflatten(1, (2, -1)).cpu())
    expected, mean, deviation = torch.cat(found, dim=2).transpose(1, 2).double().numpy()
    return PairJudgements(expected, mean, deviation)


def fit_calibration(judged: PairJudgements, pairs: Sequence[Pair], *, scored: bool, compared: bool) -> Calibration:
    """The calibration that fits the pairs best: an affine map onto their scores, and the temperature of their order.

    `scored` says whether expected scores were trained, else Bradley-Terry means are read; `compared` whether Bradley-Terry was
    trained. Where no pair has scores, or the map would turn the order around, values stay as they are read.
    """
    calibration = Calibration(reads="score" if scored else "preference")
    read, targets = judged.values(calibration).ravel(), np.array([pair.scores for pair in pairs], dtype=np.float64).ravel()
    slope, shift = _line(read[np.isfinite(targets)], targets[np.isfinite(targets)])
    if slope > 0:
        calibration = replace(calibration, scale=slope, shift=shift)
    if compared:
        slope = calibration.scale if not scored else max(0.0, _line(judged.mean.ravel(), judged.values(calibration).ravel())[0])
        calibration = replace(calibration, uncertainty_scale=slope)
    deltas, a_is_better = ordered(judged.values(calibration), pairs)
    return replace(calibration, temperature=fit_temperature(deltas, a_is_better))


def ordered(values: np.ndarray, pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """Differences of values, and whether a is the better, of the pairs (N, 2) that are no ties."""
    labels = np.array([pair.label for pair in pairs])
    return (values[:, 0] - values[:, 1])[labels != TIE], (labels == A)[labels != TIE]


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of least squares; slope 0 where x does not vary."""
    if x.size < 2 or x.std() < 1e-9:
        return 0.0, 0.0
    slope = float(((x - x.mean()) * (y - y.mean())).mean() / x.var())
    return slope, float(y.mean() - slope * x.mean())
