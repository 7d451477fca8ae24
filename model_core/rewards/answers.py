"""Answers that have been given, so that who asks again, having heard nothing, gets the same one and nothing is scored twice."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from model_core.rewards.batching import Answer
from model_core.rewards.verdict import ScoreRequest

Submit = Callable[[Sequence[ScoreRequest]], list[Future[Answer]]]


class KeyConflict(Exception):
    """A key that was used for other content."""


@dataclass(frozen=True)
class _Entry:
    digest: str
    future: Future[Answer]


class AnswerBook:
    """Keeps up to `capacity` answers by key; the one that was not asked for the longest goes first.

    A key is the promise of one content: `digest` must be the same whenever it comes. What is still being scored is shared too,
    and what failed is forgotten.
    """

    def __init__(self, submit: Submit, *, capacity: int) -> None:
        self._submit = submit
        self._capacity = capacity
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._lock = threading.RLock()  # a future that is done calls back at once, in the thread that holds it
        self.num_hits = 0

    def ask(self, requests: Sequence[ScoreRequest], digests: Sequence[str]) -> list[Future[Answer]]:
        """A future for each request. Raises KeyConflict, and whatever `submit` raises: then nothing is kept of any of them."""
        with self._lock:
            fresh: dict[str, tuple[str, ScoreRequest]] = {}
            for request, digest in zip(requests, digests, strict=True):
                entry = self._entries.get(request.key)
                known = entry.digest if entry else fresh[request.key][0] if request.key in fresh else None
                if known is not None and known != digest:
                    raise KeyConflict(f"found the key {request.key!r} with other content than before; allowed is one content a key")
                if known is None:
                    fresh[request.key] = (digest, request)
            futures = self._submit([request for _, request in fresh.values()]) if fresh else []
            self.num_hits += len(requests) - len(fresh)
            for (key, (digest, _)), future in zip(fresh.items(), futures, strict=True):
                self._entries[key] = _Entry(digest, future)
            answers = []
            for request in requests:
                self._entries.move_to_end(request.key)
                answers.append(self._entries[request.key].future)
            for (key, _), future in zip(fresh.items(), futures, strict=True):
                future.add_done_callback(lambda done, key=key: self._ended(key, done))  # type: ignore[misc]
            self._evict()
            return answers

    def _ended(self, key: str, future: Future[Answer]) -> None:
        with self._lock:
            if future.exception() is not None:
                self._entries.pop(key, None)
            else:
                self._evict()

    def _evict(self) -> None:
        """What is being scored stays: it is as much as the queue and a batch hold."""
        excess = len(self._entries) - self._capacity
        if excess > 0:
            done = [key for key, entry in self._entries.items() if entry.future.done()]
            for key in done[:excess]:
                del self._entries[key]
