"""Losses of reward models: which of two pictures is better, with ties and uncertainty, and scores from 1 to 5. Pure maths.

A picture's reward is r; of a pair, delta = r_a - r_b. Sources: Bradley and Terry 1952; Rao and Kupper 1967 for ties, as HPSv3 and
EditReward use it; HPSv3 (arXiv 2508.03789) for rewards that are normal variables, whose expectation is a quadrature here and not a
draw; the Qwen-Image-2.0-RL report (arXiv 2606.27608) for expected scores.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

A, B, TIE = 0, 1, 2  # labels as numbers
QUADRATURE_POINTS = 32
SCORES = (1.0, 2.0, 3.0, 4.0, 5.0)


def bradley_terry_loss(delta: Tensor) -> Tensor:
    """-log P(a is better) = -log sigmoid(delta), elementwise."""
    return F.softplus(-delta)


def rao_kupper_log_probs(delta: Tensor, *, k: float) -> Tensor:
    """log P of (a better, b better, tie), (..., 3), for deltas (...).

    P(a) = sigmoid(delta - ln k), P(b) = sigmoid(-delta - ln k), P(tie) = (k^2 - 1) P(a) P(b): they sum to 1. Of equals
    P(tie) = (k - 1) / (k + 1); k = 1 is Bradley and Terry's, without ties.
    """
    better, worse = F.logsigmoid(delta - math.log(k)), F.logsigmoid(-delta - math.log(k))
    log_ratio = math.log(k * k - 1) if k > 1 else -math.inf
    return torch.stack([better, worse, better + worse + log_ratio], dim=-1)


def uncertain_preference_loss(delta_mean: Tensor, variance: Tensor, labels: Tensor, *, k: float, points: int = QUADRATURE_POINTS) -> Tensor:
    """-E log P(label | z) for z ~ N(delta_mean, variance), elementwise over (N,); `labels` are A, B or TIE.

    `variance` is s_a^2 + s_b^2. The expectation is Gauss and Hermite's quadrature with so many points: deterministic, and exact to
    the sixth digit for deviations up to 2. With variance 0 it is the loss of `delta_mean` itself.
    """
    nodes, weights = (value.to(delta_mean) for value in _hermite(points))
    # The root has no finite slope at 0, which a variance that underflows would meet.
    z = delta_mean[:, None] + variance.clamp_min(1e-12).sqrt()[:, None] * nodes
    log_probs = rao_kupper_log_probs(z, k=k)
    chosen = log_probs.gather(2, labels[:, None, None].expand(-1, points, 1))[:, :, 0]
    return -(chosen @ weights)


def expected_score(logits: Tensor) -> Tensor:
    """The mean of scores 1 to 5 under the softmax of five logits (..., 5)."""
    return logits.softmax(-1) @ logits.new_tensor(SCORES)


def pointwise_loss(logits: Tensor, scores: Tensor) -> Tensor:
    """(expected score - score)^2, elementwise."""
    return (expected_score(logits) - scores).square()


def fit_temperature(deltas: np.ndarray, a_is_better: np.ndarray) -> float:
    """The T > 0 that makes sigmoid(delta / T) most likely, (N,) deltas and truths; between 1/1000 and 1000 of their spread.

    The loss is convex in 1/T: a search by thirds ends at its minimum. Where all deltas are 0 there is nothing to fit, and T is 1.
    """
    signed = np.where(a_is_better, deltas, -deltas).astype(np.float64)
    spread = float(np.abs(signed).mean()) if signed.size else 0.0
    if spread == 0.0:
        return 1.0

    def loss(inverse: float) -> float:
        return float(np.logaddexp(0.0, -signed * inverse).mean())

    low, high = 1e-3 / spread, 1e3 / spread
    for _ in range(200):
        third = (high - low) / 3
        if loss(low + third) < loss(high - third):
            high -= third
        else:
            low += third
    return 2.0 / (low + high)


def calibration_error(deltas: np.ndarray, a_is_better: np.ndarray, *, temperature: float = 1.0, bins: int = 10) -> float:
    """Expected calibration error of sigmoid(delta / T): mean over bins of confidence |accuracy - confidence|, weighted by count.

    Confidence is that of the predicted side, in [0.5, 1], cut into equal bins (Guo et al. 2017). 0 for no pairs.
    """
    if not deltas.size:
        return 0.0
    confidence = 1.0 / (1.0 + np.exp(-np.abs(deltas.astype(np.float64)) / temperature))
    right = (deltas > 0) == a_is_better
    places = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    error = 0.0
    for place in range(bins):
        inside = places == place
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return float(error)


@lru_cache(maxsize=8)
def _hermite(points: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights for the standard normal distribution, float64."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
