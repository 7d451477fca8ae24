"""Exponential moving average of weights: what is published and evaluated."""

from __future__ import annotations

import copy

import torch
from torch import nn


def ema_of(model: nn.Module) -> nn.Module:
    """A frozen copy of `model` to keep the average in."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, *, step: int, decay: float) -> None:
    """After optimizer step `step` (from 0): ema <- d ema + (1 - d) model with d = min(decay, (1 + step) / (10 + step)).

    The early ramp (TensorFlow's ExponentialMovingAverage with num_updates) keeps the initial weights from lingering in
    short runs. Buffers, such as latent statistics, are copied.
    """
    weight = 1.0 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), weight)
    for mine, theirs in zip(ema.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)
