"""Requests that wait are scored together: one worker, batches of what is there, a queue with an end."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from model_core.rewards.verdict import RewardUnavailable, Score, Scorer, ScoreRequest, settled

Answer = dict[str, Score]
Told = Callable[[list[Answer]], None]


class QueueFull(Exception):
    """More requests wait than the queue holds; ask again later."""


class Batcher:
    """Scores requests in batches of up to `batch_size`, in the order they came.

    A batch begins when it is full, or when its first request has waited `linger_seconds` for others. `scored` is called with the
    answers of each batch, in the worker's thread.
    """

    def __init__(self, scorer: Scorer, *, batch_size: int, linger_seconds: float, queue_size: int, scored: Told) -> None:
        self._scorer = scorer
        self._batch_size = batch_size
        self._linger_seconds = linger_seconds
        self._queue_size = queue_size
        self._scored = scored
        self._waiting: deque[tuple[ScoreRequest, Future[Answer]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._worker = threading.Thread(target=self._work, name="rewards", daemon=True)
        self._worker.start()

    @property
    def depth(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def submit(self, requests: Sequence[ScoreRequest]) -> list[Future[Answer]]:
        """A future for each request: all are taken or none. Raises QueueFull, and RewardUnavailable after `close`."""
        futures: list[Future[Answer]] = [Future() for _ in requests]
        for future in futures:
            future.set_running_or_notify_cancel()  # who no longer waits must not cancel it for others
        with self._changed:
            if self._closed:
                raise RewardUnavailable("the service is stopping")
            if len(self._waiting) + len(requests) > self._queue_size:
                raise QueueFull(f"found {len(self._waiting)} requests waiting; allowed are {self._queue_size}")
            self._waiting.extend(zip(requests, futures, strict=True))
            self._changed.notify()
        return futures

    def close(self) -> None:
        """Finishes the batch at hand; those that wait get RewardUnavailable, so that they ask elsewhere or later."""
        with self._changed:
            self._closed = True
            left = [future for _, future in self._waiting]
            self._waiting.clear()
            self._changed.notify()
        for future in left:
            future.set_exception(RewardUnavailable("the service is stopping"))
        self._worker.join()

    def _work(self) -> None:
        while batch := self._next_batch():
            requests = [request for request, _ in batch]
            try:
                answers = settled(
                    self._scorer.score(requests), self._scorer.names, len(requests), who=f"the scorer of {', '.join(self._scorer.names)}"
                )
                self._scored(answers)
            except Exception as error:  # noqa: BLE001 - goes to all who wait for it
                for _, future in batch:
                    future.set_exception(error)
                continue
            for (_, future), answer in zip(batch, answers, strict=True):
                future.set_result(answer)

    def _next_batch(self) -> list[tuple[ScoreRequest, Future[Answer]]]:
        """Waits for requests; empty when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            self._changed.wait_for(lambda: len(self._waiting) >= self._batch_size or self._closed, timeout=self._linger_seconds)
            return [self._waiting.popleft() for _ in range(min(self._batch_size, len(self._waiting)))]
