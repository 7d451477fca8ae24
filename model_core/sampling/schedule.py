"""The sampler's time grid: equal steps, moved towards noise for larger pictures (Qwen-Image's FlowMatchEuler settings)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MU_TOKENS = (256, 8192)  # token counts at which the recipe gives mu


def shift_mu(num_tokens: int, mu: tuple[float, float]) -> float:
    """mu for a picture of `num_tokens` latent tokens: linear through mu[0] at 256 and mu[1] at 8192 tokens."""
    slope = (mu[1] - mu[0]) / (MU_TOKENS[1] - MU_TOKENS[0])
    return mu[0] + slope * (num_tokens - MU_TOKENS[0])


def shifted_times(num_steps: int, *, mu: float, final_sigma: float) -> Tensor:
    """Times from 1 down to 0: (num_steps + 1,) float64.

    linspace(1, 1/N, N), then t' = e^mu / (e^mu + 1/t - 1), then 1 - t' stretched so that the last t' is `final_sigma`, then 0.
    """
    t = torch.linspace(1.0, 1.0 / num_steps, num_steps, dtype=torch.float64)
    shifted = math.exp(mu) / (math.exp(mu) + 1.0 / t - 1.0)
    if num_steps > 1:
        shifted = 1.0 - (1.0 - shifted) * (1.0 - final_sigma) / (1.0 - shifted[-1])
    return torch.cat((shifted, torch.zeros(1, dtype=torch.float64)))
