"""The sampler's time grid: equal steps, moved towards noise for larger pictures (Qwen-Image's FlowMatchEuler settings)."""

from __future__ import annotations

import torch
from torch import Tensor

from model_core.objectives.flow import shift_time


def shifted_times(num_steps: int, *, mu: float, final_sigma: float) -> Tensor:
    """Times from 1 down to 0: (num_steps + 1,) float64.

    linspace(1, 1/N, N), then t' = e^mu / (e^mu + 1/t - 1), then 1 - t' stretched so that the last t' is `final_sigma`, then 0.
    """
    t = torch.linspace(1.0, 1.0 / num_steps, num_steps, dtype=torch.float64)
    shifted = shift_time(t, mu=mu)
    if num_steps > 1:
        shifted = 1.0 - (1.0 - shifted) * (1.0 - final_sigma) / (1.0 - shifted[-1])
    return torch.cat((shifted, torch.zeros(1, dtype=torch.float64)))
