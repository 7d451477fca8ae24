"""SIGTERM while a training loop runs: noted between two steps, by all ranks alike, so that the state can be saved first.

Kubernetes sends SIGTERM to every process of a pod and kills it after `terminationGracePeriodSeconds`, 30 s unless the
site says otherwise: one optimizer step and one checkpoint must fit in there.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from model_core.training.distributed import Ranks


class Stopped(Exception):
    """SIGTERM: the platform wants the machine back."""


class Stopping:
    """Whether this process has been told to stop."""

    def __init__(self) -> None:
        self.told = False

    def agreed(self, ranks: Ranks) -> bool:
        """Whether any rank has been told to stop: the same answer on all of them. All must call it, after the same step."""
        if ranks.size == 1:
            return self.told
        import torch
        import torch.distributed as dist

        told = torch.tensor(int(self.told))
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=ranks.group)
        return bool(told.item())


@contextmanager
def noting_sigterm() -> Iterator[Stopping]:
    """Notes SIGTERM in place of the handler that was set before, which gets it when the loop ends without having heeded it.

    Only for the main thread, as all signal handlers. The loop asks `agreed` after each step; when that is true it saves, waits
    for the save and raises Stopped.
    """
    stopping = Stopping()

    def note(_signal: int, _frame: FrameType | None) -> None:
        stopping.told = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGTERM, before)
    if stopping.told:
        os.kill(os.getpid(), signal.SIGTERM)
