"""A step as one process of this machine, or of the step's own pod: its lines forwarded, its end bound to its parent's."""

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

RUN_FOLDER = "DARKROOM_RUN_FOLDER"  # set by `darkroom run`: the folder it shares with the steps that it starts
RUN_FOLDER_PREFIX = "darkroom-run-"  # that folder's name, among the machine's temporary files
ALIVE_FILE = "alive.lock"  # in the run's folder: `darkroom run` holds a lock on it for as long as it lives
LINE_MARK = "\x1f"  # before and after the label that opens each line of a step, for `darkroom run` to tell it from Kubeflow's own
TAIL_LINES = 15
POLL_SECONDS = 0.5
GRACE_SECONDS = 5.0
INFRASTRUCTURE = 20  # exit code: run it again
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Outcome:
    """How a process ended: its exit code (negative: the signal), its last lines, and whether its run had died before."""

    code: int
    tail: tuple[str, ...]
    abandoned: bool = False


def start_process(argv: list[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """`argv` in a session of its own, with `environment` beside this process's own, its two outputs as one pipe of lines.

    The kernel kills it when this process dies (Linux).
    """
    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        bufsize=1,
        env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,  # a Ctrl-C of the terminal reaches this process alone, which then asks the step to stop
        preexec_fn=_die_with(os.getpid()),
    )


def run_process(argv: list[str], label: str, environment: Mapping[str, str]) -> Outcome:
    """Runs `argv` to its end, forwarding each line at once, and SIGTERM and SIGINT as SIGTERM.

    The process never outlives its starter: `start_process` sees to that, and it is stopped when the `darkroom run` that it
    belongs to is gone.
    """
    folder = os.environ.get(RUN_FOLDER)
    process = start_process(argv, environment)

    def forward(_signal: int, _frame: FrameType | None) -> None:
        signal_group(process, signal.SIGTERM)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    ended, abandoned = threading.Event(), threading.Event()
    if folder:
        threading.Thread(target=_watch, args=(Path(folder), process, ended, abandoned), daemon=True).start()
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    try:
        assert process.stdout is not None
        write = line_writer(label)
        for line in process.stdout:
            tail.append(line.rstrip("\n"))
            write(line)
        code = process.wait()
    finally:
        ended.set()
        signal_group(process, signal.SIGKILL)  # what it may have started and left
        for number, handler in previous.items():
            signal.signal(number, handler)
    return Outcome(code, tuple(tail), abandoned.is_set())


def is_alive(folder: Path) -> bool:
    """Whether the `darkroom run` that owns the folder still lives: nobody else can share its lock then."""
    try:
        with (folder / ALIVE_FILE).open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _watch(folder: Path, process: subprocess.Popen[str], ended: threading.Event, abandoned: threading.Event) -> None:
    while not ended.wait(POLL_SECONDS):
        if not is_alive(folder):
            abandoned.set()
            signal_group(process, signal.SIGTERM)
            if not ended.wait(GRACE_SECONDS):
                signal_group(process, signal.SIGKILL)
            return


def line_writer(label: str) -> Callable[[str], None]:
    """Writes lines, marked for `darkroom run`, to standard output until nobody reads them any more; the step need not notice that."""
    mark = f"{LINE_MARK}{label}{LINE_MARK}" if os.environ.get(RUN_FOLDER) else ""
    is_open = True

    def write(line: str) -> None:
        nonlocal is_open
        if not is_open:
            return
        try:
            sys.stdout.write(mark + line)
            sys.stdout.flush()
        except BrokenPipeError:
            is_open = False
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return write


def signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Sends a signal to the process and all that it started, as far as they are there."""
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):  # nobody of it is left (macOS reports the second)
        return


def _die_with(parent: int) -> Callable[[], None] | None:
    """To be called in the child: asks the kernel for SIGKILL when the parent dies."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def bind() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(INFRASTRUCTURE)  # it died before the kernel was asked

    return bind
