"""The probability-flow ODE by Euler steps."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def euler(velocity: Callable[[Tensor, float], Tensor], x: Tensor, times: Tensor) -> Tensor:
    """Carries x from times[0] to times[-1] by x += (t' - t) v(x, t); exact where the velocity is constant along a path."""
    for t, following in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        x = x + (following - t) * velocity(x, t)
    return x
