"""Ours and diffusers' module in turn, so that a machine whose speed drifts does so for both.

Figures are medians over rounds; who goes first changes with each round, and a ratio above one says that ours is faster.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

from torch import Tensor

ROUNDS = 7


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def alternated(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float, float]:
    """Median seconds of both, and the median of theirs / ours a round; who goes first changes with each round."""
    pairs = []
    for number in range(ROUNDS + 1):
        first, second = (ours, theirs) if number % 2 else (theirs, ours)
        one, other = seconds(first), seconds(second)
        pairs.append((one, other) if number % 2 else (other, one))
    pairs = pairs[1:]  # the first round warms up
    return statistics.median(o for o, _ in pairs), statistics.median(t for _, t in pairs), statistics.median(t / o for o, t in pairs)


def say_against_diffusers(
    what: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    results: tuple[Callable[[], Tensor], Callable[[], Tensor]],
    **facts: object,
) -> None:
    """Prints how fast both do their work, and how far the two `results` lie apart, as one JSON line with the `facts`."""
    own, other, ratio = alternated(ours, theirs)
    figures = {
        "milliseconds": round(own * 1e3, 1),
        "diffusers_milliseconds": round(other * 1e3, 1),
        "ratio": round(ratio, 3),
        "goal": 1.0,
        "largest_difference": (results[0]() - results[1]()).abs().max().item(),
    }
    print(json.dumps({"measurement": f"{what} against diffusers", **facts, **figures}), flush=True)
