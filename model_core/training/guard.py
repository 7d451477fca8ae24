"""What a training loop does about steps that would harm the weights: skip, roll back, stop with a report.

A step is bad when its loss or gradient norm is not finite, or its loss is a spike: far above the median of the last good ones.
Its update is skipped: weights, moments and averages stay. After `patience` bad steps in a row the weights go back to the newest
checkpoint, which is never one of a bad stretch, while the data go on: the same batches would lead to the same place. After
`max_rollbacks` of these the training stops and tells why. All ranks see the same numbers, so they decide alike.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any, Literal

from model_core.recipe import Guard

DEVIATION = 1.4826  # standard deviations of a normal variable in a median absolute deviation

Verdict = Literal["good", "skip", "roll back"]


class TrainingDiverged(Exception):
    """The loss does not come back: the report of what was tried."""


class StepGuard:
    """Judges steps by their loss and gradient norm, and remembers what it did."""

    def __init__(self, settings: Guard) -> None:
        self._settings = settings
        self._losses: deque[float] = deque(maxlen=settings.window)
        self._bad_in_a_row = 0
        self.events: list[dict[str, Any]] = []
        self.num_rollbacks = 0

    @property
    def calm(self) -> bool:
        """Whether the newest step was good: only then is a checkpoint one to go back to."""
        return self._bad_in_a_row == 0

    @property
    def threshold(self) -> float:
        """The loss above which a step is a spike; infinite until half a window of losses is known.

        median + `spike_deviations` robust standard deviations, at least `spike_floor` of the median above it.
        """
        if len(self._losses) < max(2, self._settings.window // 2):
            return math.inf
        median = statistics.median(self._losses)
        deviation = DEVIATION * statistics.median(abs(loss - median) for loss in self._losses)
        return median + max(self._settings.spike_deviations * deviation, self._settings.spike_floor * median)

    @property
    def newest(self) -> str:
        """The newest event in one line."""
        return _told(self.events[-1])

    @property
    def warnings(self) -> list[str]:
        """What a reader of the report must know."""
        if not self.events:
            return []
        return [f"{len(self.events)} steps were skipped, and the weights went back to a checkpoint {self.num_rollbacks} times"]

    def judge(self, step: int, *, loss: float, grad_norm: float) -> Verdict:
        """What to do with optimizer step `step` (from 1). Raises TrainingDiverged when there is nothing left to try."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            reason = "not finite"
        elif loss > (threshold := self.threshold):
            reason = f"spike above {threshold:.4g}"
        else:
            self._losses.append(loss)
            self._bad_in_a_row = 0
            return "good"
        self._bad_in_a_row += 1
        self.events.append({"step": step, "loss": repr(loss), "grad_norm": repr(grad_norm), "reason": reason, "action": "skip"})
        if self._bad_in_a_row < self._settings.patience:
            return "skip"
        if self.num_rollbacks == self._settings.max_rollbacks:
            raise TrainingDiverged(self.report())
        self.num_rollbacks += 1
        self._bad_in_a_row = 0
        self.events[-1]["action"] = "roll back"
        return "roll back"

    def report(self) -> str:
        """What happened, in lines a reader can act on."""
        return (
            f"the loss does not come back after {self.num_rollbacks} returns to a checkpoint and {len(self.events)} skipped steps; "
            f"a lower learning rate, a longer warm-up or cleaner data may help. The newest: " + "; ".join(map(_told, self.events[-5:]))
        )

    def state_dict(self) -> dict[str, Any]:
        """All there is to go on from, as JSON values."""
        return {
            "losses": list(self._losses),
            "bad_in_a_row": self._bad_in_a_row,
            "events": self.events,
            "num_rollbacks": self.num_rollbacks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave."""
        self._losses = deque(state["losses"], maxlen=self._settings.window)
        self._bad_in_a_row, self.events, self.num_rollbacks = state["bad_in_a_row"], list(state["events"]), state["num_rollbacks"]


def _told(event: dict[str, Any]) -> str:
    return f"step {event['step']}: loss {event['loss']}, gradient norm {event['grad_norm']}: {event['reason']}; {event['action']}"
