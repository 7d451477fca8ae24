"""What the reward service counts, in Prometheus' text format 0.0.4."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from itertools import accumulate

LATENCY_BOUNDS_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
MAX_REASONS = 100  # label sets of invalid scores; a reason that names a picture must not grow the page without end
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters since the start. `queue_depth` and `cache_hits` are asked for when they are read."""

    def __init__(self, *, queue_depth: Callable[[], int], cache_hits: Callable[[], int]) -> None:
        self._queue_depth = queue_depth
        self._cache_hits = cache_hits
        self._lock = threading.Lock()
        self._requests: Counter[int] = Counter()
        self._invalid: Counter[tuple[str, str]] = Counter()
        self._latencies: Counter[int] = Counter()
        self._latency_sum = 0.0
        self._batches = self._pictures = 0

    def answered(self, status: int, seconds: float) -> None:
        """Counts one POST that got an answer after `seconds`."""
        bucket = next((index for index, bound in enumerate(LATENCY_BOUNDS_SECONDS) if seconds <= bound), len(LATENCY_BOUNDS_SECONDS))
        with self._lock:
            self._requests[status] += 1
            self._latencies[bucket] += 1
            self._latency_sum += seconds

    def scored(self, num: int, invalid: list[tuple[str, str]]) -> None:
        """Counts one batch of `num` pictures, and its invalid scores as (reward, reason)."""
        with self._lock:
            self._batches += 1
            self._pictures += num
            for reward, reason in invalid:
                known = (reward, reason) in self._invalid or len(self._invalid) < MAX_REASONS
                self._invalid[reward, reason if known else "other"] += 1

    def text(self) -> str:
        """The page that /metrics shows."""
        with self._lock:
            bounds = [*map(str, LATENCY_BOUNDS_SECONDS), "+Inf"]
            counts = list(accumulate(self._latencies[index] for index in range(len(bounds))))
            families = [
                (
                    "requests_total",
                    "counter",
                    "POSTs answered, by HTTP status.",
                    [(f'{{status="{s}"}}', n) for s, n in self._requests.items()],
                ),
                ("batches_total", "counter", "Batches scored.", [("", self._batches)]),
                ("pictures_total", "counter", "Pictures scored.", [("", self._pictures)]),
                ("queue_depth", "gauge", "Pictures that wait.", [("", self._queue_depth())]),
                ("cache_hits_total", "counter", "Pictures answered from an earlier answer.", [("", self._cache_hits())]),
                (
                    "invalid_total",
                    "counter",
                    "Invalid scores, by reward and reason.",
                    [(f'{{reward="{_escaped(reward)}",reason="{_escaped(why)}"}}', n) for (reward, why), n in self._invalid.items()],
                ),
            ]
            lines = []
            for name, kind, meaning, samples in families:
                lines += _head(name, kind, meaning)
                lines += [f"darkroom_rewards_{name}{labels} {number}" for labels, number in samples]
            lines += _head("latency_seconds", "histogram", "From a POST's last byte to its answer.")
            name = "darkroom_rewards_latency_seconds"
            lines += [f'{name}_bucket{{le="{bound}"}} {count}' for bound, count in zip(bounds, counts, strict=True)]
            lines += [f"{name}_sum {self._latency_sum}", f"{name}_count {counts[-1]}"]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, meaning: str) -> list[str]:
    return [f"# HELP darkroom_rewards_{name} {meaning}", f"# TYPE darkroom_rewards_{name} {kind}"]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
