"""Flow matching on the straight path x_t = (1 - t) x0 + t eps: noise at t = 1 (R3 2.1; Lipman et al. 2023).

Tensors are (B, N, C) tokens and times (B,) in [0, 1], all fp32.
"""

from __future__ import annotations

import math

from torch import Tensor


def logit_normal(normal: float, mean: float, std: float) -> float:
    """A time in (0, 1) whose logit is `mean + std * normal`; with a standard normal draw, logit-normal (Esser et al. 2024, 3.1)."""
    return 1.0 / (1.0 + math.exp(-(mean + std * normal)))


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t eps."""
    t = t[:, None, None]
    return (1 - t) * x0 + t * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """d x_t / d t = eps - x0."""
    return noise - x0


def flow_loss(velocity: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample: (B,)."""
    return (velocity.float() - target.float()).square().mean(dim=(1, 2))
