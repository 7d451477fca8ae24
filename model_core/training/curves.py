"""Means over some steps of what a training loop measures, kept as tensors until a point is closed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Curves:
    """Points `{"step": ..., NAME: mean since the last point, ...}` for fixed names; the first name is the loss.

    `count` steps lie after the last point; without one, no point can be closed.
    """

    def __init__(self, *names: str) -> None:
        self.points: list[dict[str, float]] = []
        self._names = names
        self._sums, self.count = torch.zeros(len(names)), 0

    @property
    def last(self) -> float:
        """The loss of the newest point; NaN before the first."""
        return self.points[-1][self._names[0]] if self.points else float("nan")

    def add(self, *values: Tensor) -> None:
        """Counts one step; no value leaves its device."""
        self._sums = self._sums + torch.stack(values)
        self.count += 1

    def close(self, step: int) -> dict[str, float]:
        """Ends the point at optimizer step `step` and returns it."""
        means = (self._sums / self.count).tolist()
        self.points.append({"step": step, **dict(zip(self._names, means, strict=True))})
        self._sums, self.count = torch.zeros(len(self._names)), 0
        return self.points[-1]

    def state_dict(self) -> dict[str, Any]:
        """All there is to go on from."""
        return {"points": self.points, "sums": self._sums, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        self.points, self._sums, self.count = state["points"], state["sums"], state["count"]
