"""Progress of long work as plain lines, which read the same on a terminal, in a pod's log and in a file."""

from __future__ import annotations

import time

INTERVAL_SECONDS = 2.0


class Progress:
    """Prints `LABEL 300/1200 25% MESSAGE 12.3/s eta 73 s` at most every two seconds, and at the end."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._began: float | None = None
        self._first = 0
        self._last = 0.0

    def update(self, done: int, total: int, message: str = "") -> None:
        """Says that `done` of `total` are finished; the first call tells where this attempt began."""
        now = time.monotonic()
        if self._began is None:
            self._began, self._first = now, done
        if done < total and now - self._last < INTERVAL_SECONDS:
            return
        self._last = now
        rate = (done - self._first) / max(now - self._began, 1e-9)
        pace = f" {rate:.1f}/s eta {(total - done) / rate:.0f} s" if done > self._first and done < total else ""
        self.say(f"{done}/{total} {100 * done // max(total, 1)}%{' ' + message if message else ''}{pace}")

    def say(self, message: str) -> None:
        """Prints one line."""
        print(f"{self._label:<16} {message}", flush=True)
