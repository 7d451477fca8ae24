"""What the user sees of a local run: the steps' lines, numbered, without Kubeflow's own."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable

from components.launch.local import LINE_MARK

KEPT_LINES = 30


class StepLines(io.TextIOBase):
    """A standard output for kfp.local: passes on the steps' lines as `[ 3/14] LINE`, and keeps the last of the others.

    A step's line opens with LINE_MARK and its label; kfp.local indents it.
    """

    def __init__(self, num_steps: int, say: Callable[[str], None]) -> None:
        self.other: deque[str] = deque(maxlen=KEPT_LINES)
        self._num_steps, self._say = num_steps, say
        self._labels: list[str] = []
        self._pending = ""

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, text: str) -> int:
        """Takes any piece of output."""
        *lines, self._pending = (self._pending + text).split("\n")
        for line in lines:
            self._take(line)
        return len(text)

    def _take(self, line: str) -> None:
        _, is_step, said = line.partition(LINE_MARK)
        if not is_step:
            if line.strip():
                self.other.append(line)
            return
        label, _, said = said.partition(LINE_MARK)
        if label not in self._labels:
            self._labels.append(label)
        width = len(str(self._num_steps))
        self._say(f"[{self._labels.index(label) + 1:>{width}}/{self._num_steps}] {said}")
