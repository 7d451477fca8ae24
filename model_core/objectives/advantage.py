"""Advantages from rewards: each reward normalised within its prompt's group, then a weighted sum (R4; MixGRPO's aggregation).

Normalised apart, no reward rules by its scale alone. Deviations are those of the group as it is (divided by its number).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

MAX_ADVANTAGE = 5.0  # Flow-GRPO's code


def group_advantages(values: Tensor, valid: Tensor, *, std_floor: float) -> Tensor:
    """(value - group's mean) / max(group's std, std_floor) for P groups of G samples, (P, G); 0 where a value is not `valid`.

    A sample that is not valid counts in no mean: the others' advantages are as if it were not there. A group of equal values, or of
    one, has none.
    """
    valid = valid & torch.isfinite(values)
    values = torch.where(valid, values, torch.zeros_like(values))
    count = valid.sum(1, keepdim=True).clamp_min(1)
    centred = torch.where(valid, values - values.sum(1, keepdim=True) / count, torch.zeros_like(values))
    std = (centred.square().sum(1, keepdim=True) / count).sqrt()
    return centred / std.clamp_min(std_floor)


def combine_advantages(advantages: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted sum over rewards of (P, G), weights scaled to sum to 1, held within +-5."""
    total = sum(weights.values())
    if not total > 0 or any(weight < 0 for weight in weights.values()):
        raise ValueError(f"found weights {dict(weights)}; allowed are numbers of at least 0, one of them above")
    combined = sum(weight / total * advantages[name] for name, weight in weights.items())
    assert isinstance(combined, Tensor)
    return combined.clamp(-MAX_ADVANTAGE, MAX_ADVANTAGE)
