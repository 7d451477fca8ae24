"""The loop of a step whose updates are taken whole: each ends before SIGTERM is heeded or a checkpoint is written."""

from __future__ import annotations

import time
from collections.abc import Callable

from model_core.context import StepContext
from model_core.training.stopping import Stopped, noting_sigterm


def take_all(
    context: StepContext,
    *,
    first: int,
    total: int,
    checkpoint_every: int,
    take: Callable[[int], None],
    save: Callable[[int], None],
    noun: str,
) -> float:
    """Calls `take(number)` from `first` up to `total`, and `save(done)` between; returns the seconds it took.

    `noun` is what messages call an update. Raises Stopped after SIGTERM, when the newest update is saved.
    """
    began = time.monotonic()
    with noting_sigterm() as stop:
        for number in range(first, total):
            take(number)
            done = number + 1
            stopped = done < total and stop.agreed(context.ranks)
            if done < total and (stopped or done % checkpoint_every == 0):
                save(done)
            if stopped:
                context.checkpoints.wait()
                raise Stopped(f"told to stop after {noun} {done}, which is saved; the same command goes on from there")
    return time.monotonic() - began
