"""The reward service beside a step: there before the step begins, gone when it has ended."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from components.launch.local import (
    GRACE_SECONDS,
    POLL_SECONDS,
    RUN_FOLDER,
    TAIL_LINES,
    Outcome,
    is_alive,
    line_writer,
    signal_group,
    start_process,
)

URI_VARIABLE = "DARKROOM_REWARDS_URI"  # which model_core.rewards.opening reads
LABEL = "rewards"


class ServiceEnded(RuntimeError):
    """The service ended before it was ready."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(f"the reward service ended with exit code {outcome.code} before it was ready")
        self.outcome = outcome


@contextmanager
def reward_service(given: list[str], *, folder: Path) -> Iterator[Mapping[str, str]]:
    """Starts the service with the arguments `given`, and yields the variables that tell a step where it is, once it is ready.

    Its lines are forwarded; its end while the step runs is told. It never outlives this process. Raises ServiceEnded.
    """
    announced = folder / "rewards-uri"
    argv = [sys.executable, "-m", "model_core.rewards.service", *given, "--port", "0", "--announce", str(announced)]
    process, write = start_process(argv, {}), line_writer(LABEL)
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    stopping = threading.Event()
    reader = threading.Thread(target=_follow, args=(process, write, tail, stopping), daemon=True)
    reader.start()
    try:
        while not announced.exists():
            if process.poll() is not None:
                stopping.set()
                reader.join(GRACE_SECONDS)
                raise ServiceEnded(Outcome(process.returncode, tuple(tail)))
            if RUN_FOLDER in os.environ and not is_alive(Path(os.environ[RUN_FOLDER])):
                raise ServiceEnded(Outcome(-signal.SIGTERM, tuple(tail), abandoned=True))
            time.sleep(POLL_SECONDS / 5)
        yield {URI_VARIABLE: announced.read_text(encoding="utf-8")}
    finally:
        stopping.set()
        _stop(process)
        reader.join(GRACE_SECONDS)


def _follow(process: subprocess.Popen[str], write: Callable[[str], None], tail: deque[str], stopping: threading.Event) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        tail.append(line.rstrip("\n"))
        write(line)
    code = process.wait()
    if not stopping.is_set():
        write(f"the reward service has ended with exit code {code}; the step waits for it as long as the site's rewards.patience_seconds\n")


def _stop(process: subprocess.Popen[str]) -> None:
    """SIGTERM, on which it finishes its batch; SIGKILL when that takes too long."""
    signal_group(process, signal.SIGTERM)
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        signal_group(process, signal.SIGKILL)
        process.wait()
