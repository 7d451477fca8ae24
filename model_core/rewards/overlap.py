"""Scoring while the rollout goes on: pictures are handed over, and their scores fetched when they are needed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType

from model_core.rewards.verdict import Score, Scorer, ScoreRequest

Scores = list[dict[str, Score]]


class OverlappedScoring:
    """Scores in `num_threads` threads, or with none of them at once in the caller's, for a scorer that works on the same cores.

    At most `max_waiting` batches are handed over and not begun: more make `submit` wait. The threads are daemons: one that waits
    for a service does not keep a process alive that is to end.
    """

    def __init__(self, scorer: Scorer, *, num_threads: int, max_waiting: int) -> None:
        self._scorer = scorer
        self._jobs: queue.Queue[tuple[Sequence[ScoreRequest], Future[Scores]] | None] = queue.Queue(max_waiting)
        self._failure: Exception | None = None
        self._pending: list[Future[Scores]] = []
        self._threads = [threading.Thread(target=self._work, name=f"scoring-{index}", daemon=True) for index in range(num_threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, requests: Sequence[ScoreRequest]) -> Future[Scores]:
        """Hands a batch over. Raises what an earlier batch failed with, so that no further pictures are drawn in vain."""
        if self._failure is not None:
            raise self._failure
        future: Future[Scores] = Future()
        self._pending.append(future)
        if self._threads:
            self._jobs.put((requests, future))
        else:
            self._score(requests, future)
        return future

    def collect(self, *, timeout_seconds: float | None = None) -> list[Scores]:
        """The scores of all batches since the last `collect`, in the order they were handed over.

        Raises what the first that failed raised, and TimeoutError when one is not there after `timeout_seconds`: then nothing is
        lost, and who calls again waits on.
        """
        results = [future.result(timeout_seconds) for future in self._pending]
        self._pending = []
        return results

    def close(self) -> None:
        """Lets the threads end after what was handed over."""
        for _ in self._threads:
            self._jobs.put(None)

    def __enter__(self) -> OverlappedScoring:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._score(*job)

    def _score(self, requests: Sequence[ScoreRequest], future: Future[Scores]) -> None:
        try:
            future.set_result(self._scorer.score(requests))
        except Exception as error:  # noqa: BLE001 - raised where the scores are wanted
            self._failure = error
            future.set_exception(error)
