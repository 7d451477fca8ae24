"""One stochastic step of a flow: the Gaussian that a sampler draws the next state from, so that it is a policy with a density.

Times fall from 1 (noise) to 0; a step goes from t to t' < t. With v = eps - x0, the state tells x0 = x - t v and
eps = x + (1 - t) v. Flow-SDE and Dance-SDE keep the marginals of the probability-flow ODE as steps become small; CPS keeps the
total coefficient of noise instead. Means are fp32 whatever the model computes in: in bfloat16 their rounding is as large as what
an update changes (flow_grpo's code).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model_core.recipe import SDE


@dataclass(frozen=True)
class Transition:
    """N(mean, std^2 I) for states of shape (B, N, C); `std` (B, 1, 1), 0 where the step is that of the ODE."""

    mean: Tensor
    std: Tensor


def transition(kind: SDE, x: Tensor, velocity: Tensor, *, t: Tensor, following: Tensor, noise_level: float) -> Transition:
    """The step from times t to `following`, (B,) each with 0 <= following < t <= 1, of states and velocities (B, N, C).

    With a `noise_level` of 0 it is Euler's step of the ODE, without noise, for every kind. Raises ValueError for times that do not fall.
    """
    if not bool(((following < t) & (following >= 0) & (t <= 1)).all()):
        raise ValueError(f"found steps from {t.tolist()} to {following.tolist()}; allowed are 0 <= t' < t <= 1")
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, velocity = x.to(dtype), velocity.to(dtype)
    t, following = (time.to(dtype)[:, None, None] for time in (t, following))
    return {"flow_sde": _flow_sde, "dance_sde": _dance_sde, "cps": _cps}[kind](x, velocity, t, following, noise_level)


def _flow_sde(x: Tensor, v: Tensor, t: Tensor, following: Tensor, level: float) -> Transition:
    """g = a sqrt(t / (1 - t)) (Flow-GRPO, arXiv 2505.05470, eq. 9); at t = 1 the grid's next 1 - t stands in, as in its code.

    So the first step's noise is exactly a, whatever the grid.
    """
    dt = following - t
    clean = (1 - t).where(t < 1, 1 - following)
    diffusion = level * (t / clean).sqrt()
    drift = diffusion.square() / (2 * t)
    mean = x * (1 + drift * dt) + v * (1 + drift * (1 - t)) * dt
    return Transition(mean, diffusion * (-dt).sqrt())


def _dance_sde(x: Tensor, v: Tensor, t: Tensor, following: Tensor, level: float) -> Transition:
    """Constant diffusion eta (DanceGRPO, arXiv 2505.07818): mean x + v dt - eta^2 s dt / 2, with the score s = -eps / t."""
    dt = following - t
    score = -(x + (1 - t) * v) / t
    return Transition(x + v * dt - 0.5 * level**2 * score * dt, level * (-dt).sqrt())


def _cps(x: Tensor, v: Tensor, t: Tensor, following: Tensor, level: float) -> Transition:
    """Coefficients-preserving sampling (Flow-CPS, arXiv 2509.05952): (1 - t') x0 + sqrt(t'^2 - s^2) eps, s = t' sin(eta pi / 2)."""
    std = following * math.sin(level * math.pi / 2)
    mean = (1 - following) * (x - t * v) + (following.square() - std.square()).clamp_min(0).sqrt() * (x + (1 - t) * v)
    return Transition(mean, std)
