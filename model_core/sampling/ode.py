"""The probability-flow ODE by Euler steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def euler(velocity: Callable[[Tensor, float], Tensor], x: Tensor, times: Tensor) -> Tensor:
    """Carries x from times[0] to times[-1] by x += (t' - t) v(x, t); exact where the velocity is constant along a path."""
    for t, following in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        x = x + (following - t) * velocity(x, t)
    return x


def euler_states(velocity: Callable[[Tensor, float], Tensor], x: Tensor, times: Tensor) -> Tensor:
    """The states (B, S, ...) that `euler` evaluates the velocity at, from times[0] to times[S - 1]."""
    states = [x]
    for t, following in zip(times[:-2].tolist(), times[1:-1].tolist(), strict=True):
        states.append(states[-1] + (following - t) * velocity(states[-1], t))
    return torch.stack(states, dim=1)
