"""The rewards of an update: values and validity by reward, prompt and sample; totals, advantages and which groups are learned from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_core.objectives.advantage import combine_advantages, group_advantages
from model_core.rewards.verdict import Invalid, Score, finite

DEFAULT = "default"
Weights = Mapping[str, Mapping[str, float]]  # by prompt category, then reward


@dataclass(frozen=True)
class Tally:
    """Rewards of P groups of G pictures: `values` and `valid` (P, G) by reward; `invalid` counts (reward, category, reason)."""

    values: dict[str, Tensor]
    valid: dict[str, Tensor]
    invalid: Counter[tuple[str, str, str]]
    categories: tuple[str, ...]

    def weights(self, weights: Weights) -> Tensor:
        """(P, R) weights of the rewards, in their order, for each group's category; a row sums to 1."""
        rows = [weights.get(category, weights[DEFAULT]) for category in self.categories]
        table = torch.tensor([[row.get(name, 0.0) for name in self.values] for row in rows], dtype=torch.float64)
        return table / table.sum(1, keepdim=True)

    def totals(self, weights: Weights) -> tuple[Tensor, Tensor]:
        """(P, G) weighted means of the valid rewards that count, and whether a sample has any; 0 where it has none."""
        table = self.weights(weights)
        values, valid = torch.stack([*self.values.values()], dim=-1), torch.stack([*self.valid.values()], dim=-1)
        counted = table[:, None] * valid
        weight = counted.sum(-1)
        return (counted * values.nan_to_num()).sum(-1) / weight.clamp_min(1e-12), weight > 0

    def advantages(self, weights: Weights, *, std_floor: float) -> Tensor:
        """(P, G) advantages: each reward normalised in its group, then weighted as its category says."""
        normalised = {name: group_advantages(self.values[name], self.valid[name], std_floor=std_floor) for name in self.values}
        rows = []
        for group, row in enumerate(self.weights(weights).tolist()):
            named = dict(zip(self.values, row, strict=True))
            rows.append(combine_advantages({name: value[group] for name, value in normalised.items()}, named))
        return torch.stack(rows)

    def reasons(self, weights: Weights) -> Counter[str]:
        """Why scores of rewards that are weighed are invalid; what a category is not rewarded for is no loss."""
        found: Counter[str] = Counter()
        for (name, category, reason), count in self.invalid.items():
            if weights.get(category, weights[DEFAULT]).get(name):
                found[f"{name}: {reason}"] += count
        return found

    def means(self) -> dict[str, float]:
        """Mean of each reward's valid values; a reward without any is left out."""
        return {name: value[self.valid[name]].mean().item() for name, value in self.values.items() if bool(self.valid[name].any())}

    def spread(self, weights: Weights) -> float:
        """Mean over groups of the total's standard deviation within one."""
        totals, counts = self.totals(weights)
        return _group_std(totals, counts).mean().item()

    def flat_share(self, name: str, *, std_floor: float) -> float:
        """Share of the groups with at least two valid values of a reward in which it tells no picture from another; NaN without any."""
        groups = self.valid[name].sum(1) >= 2
        if not bool(groups.any()):
            return float("nan")
        return (_group_std(self.values[name], self.valid[name])[groups] < std_floor).double().mean().item()

    def invalid_share(self, name: str, *, expected: Tensor) -> float:
        """Share of invalid scores of a reward among the samples of groups (P,) where one is expected; NaN without any."""
        asked = self.valid[name][expected]
        return float("nan") if not len(asked) else 1.0 - asked.double().mean().item()


def make_tally(scores: Sequence[Sequence[Mapping[str, Score]]], *, names: Sequence[str], categories: Sequence[str]) -> Tally:
    """The tally of P groups' scores, G each."""
    values, valid = {}, {}
    invalid: Counter[tuple[str, str, str]] = Counter()
    for name in names:
        found = [[finite(scored[name]) for scored in group] for group in scores]
        valid[name] = torch.tensor([[not isinstance(score, Invalid) for score in group] for group in found])
        numbers = [[float("nan") if isinstance(score, Invalid) else score.value for score in group] for group in found]
        values[name] = torch.tensor(numbers, dtype=torch.float64)
        for category, group in zip(categories, found, strict=True):
            invalid.update((name, category, score.reason) for score in group if isinstance(score, Invalid))
    return Tally(values, valid, invalid, tuple(categories))


def agreement(proxy: Tensor, gold: Tensor, valid: Tensor) -> float:
    """Mean over groups of the correlation of two rewards (P, G) within one; NaN when no group has both with a spread."""
    found = []
    for ours, theirs, both in zip(proxy, gold, valid, strict=True):
        pair = torch.stack((ours[both], theirs[both]))
        if both.sum() >= 3 and bool((pair.std(1) > 0).all()):
            found.append(torch.corrcoef(pair)[0, 1].item())
    return sum(found) / len(found) if found else float("nan")


def _group_std(values: Tensor, valid: Tensor) -> Tensor:
    count = valid.sum(1).clamp_min(1)
    known = torch.where(valid, values, torch.zeros_like(values))
    centred = torch.where(valid, known - known.sum(1, keepdim=True) / count[:, None], torch.zeros_like(values))
    return (centred.square().sum(1) / count).sqrt()
