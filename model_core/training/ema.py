"""Exponential moving average of weights: what is published and evaluated."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from model_core.training.distributed import local

Model = TypeVar("Model", bound=nn.Module)


def ema_of(model: Model) -> Model:
    """A frozen copy of `model` to keep the average in."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, *, step: int, decay: float) -> None:
    """After optimizer step `step` (from 0): ema <- d ema + (1 - d) model with d = min(decay, (1 + step) / (10 + step)).

    The early ramp (TensorFlow's ExponentialMovingAverage with num_updates) keeps the initial weights from lingering in
    short runs. Buffers, such as latent statistics, are copied. Both models may be sharded, in the same way.
    """
    weight = 1.0 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_([local(mine) for mine in ema.parameters()], [local(theirs) for theirs in model.parameters()], weight)
    for mine, theirs in zip(ema.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)
