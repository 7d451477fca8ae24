"""Flow matching on the straight path x_t = (1 - t) x0 + t eps: noise at t = 1 (R3 2.1; Lipman et al. 2023).

Tensors are (..., N, C) tokens in fp32, and times in [0, 1], one a token: (..., N).
"""

from __future__ import annotations

import math
from typing import TypeVar

from torch import Tensor

MU_TOKENS = (256, 8192)  # token counts at which a recipe gives mu

Time = TypeVar("Time", float, Tensor)


def logit_normal(normal: float, mean: float, std: float) -> float:
    """A time in (0, 1) whose logit is `mean + std * normal`; with a standard normal draw, logit-normal (Esser et al. 2024, 3.1)."""
    return 1.0 / (1.0 + math.exp(-(mean + std * normal)))


def shift_mu(num_tokens: int, mu: tuple[float, float]) -> float:
    """mu for a picture of `num_tokens` latent tokens: linear through mu[0] at 256 and mu[1] at 8192 tokens (Qwen-Image 1.0's code)."""
    slope = (mu[1] - mu[0]) / (MU_TOKENS[1] - MU_TOKENS[0])
    return mu[0] + slope * (num_tokens - MU_TOKENS[0])


def shift_time(t: Time, *, mu: float) -> Time:
    """e^mu / (e^mu + 1 / t - 1): times moved towards noise for larger pictures (Esser et al. 2024, 5.3.2; Qwen-Image 1.0's code)."""
    return math.exp(mu) / (math.exp(mu) + 1.0 / t - 1.0)


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t eps."""
    t = t[..., None]
    return (1 - t) * x0 + t * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """d x_t / d t = eps - x0."""
    return noise - x0


def flow_loss(velocity: Tensor, target: Tensor, *, num_elements: int) -> Tensor:
    """This part's share of the mean squared error over `num_elements` values, of which others may lie in other passes or ranks.

    Each value counts the same, wherever it is computed: the loss does not depend on how samples are packed or dealt out.
    """
    return (velocity.float() - target.float()).square().sum() / num_elements
