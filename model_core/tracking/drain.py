"""Sends spools to MLflow: `python -m model_core.tracking.drain --spool DIR --uri URI [--follow PID]`.

It remembers how far it has come in `<spool>.run.json`, so a dead server only delays it, and a killed drainer repeats little. All it
does may be repeated: times come from the spool, runs and models are found by their tags. One drainer at a time has a folder.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from model_core.tracking.deliver import DrainReport, Spool, close_pipelines, one_line, send_spool, whole_size
from model_core.tracking.sender import Sender, is_refusal
from model_core.tracking.spool import has_writer, parse_lines, read_state, spool_files

POLL_SECONDS = 3.0
LAST_TRIES_SECONDS = 20.0  # how long a drainer goes on trying after the process it follows is gone
_MAX_PAUSE_SECONDS = 30.0


def drain(spool_dir: Path, tracking_uri: str, *, lock_wait_seconds: float = 60.0) -> DrainReport:
    """Sends what is in the folder's spools and has not been sent. Raises nothing for a server that is away: see `error`."""
    report = DrainReport()
    if not spool_files(spool_dir):
        return report
    with _sole_drainer(spool_dir, lock_wait_seconds) as sole:
        if not sole:
            report.error = f"another drainer has been busy with {spool_dir} for {lock_wait_seconds:.0f} s"
            return report
        spools = _snapshot(spool_dir, tracking_uri)
        sender: Sender | None = None
        for spool in spools:
            if report.error is None and _has_news(spool):
                try:
                    sender = sender or Sender(tracking_uri, artifacts=spool_dir.parent / "mlartifacts")
                    send_spool(sender, spool, tracking_uri, report)
                except Exception as error:  # noqa: BLE001 - whatever is wrong with the server, the spool is kept and sent later
                    if is_refusal(error):  # of this spool: the others may go
                        report.warnings.append(f"{spool.path.name}: {one_line(error)}")
                    else:
                        report.error = one_line(error)
            if spool.state.get("offset") != spool.size:
                report.pending_spools.append(spool.path.name)
            if "run_id" in spool.state:
                report.runs[spool.path.name] = spool.state["run_id"]
        if sender is not None and report.error is None:
            try:
                close_pipelines(sender, spools, report)
            except Exception as error:  # noqa: BLE001 - as above
                report.error = one_line(error)
    return report


def _snapshot(spool_dir: Path, tracking_uri: str) -> list[Spool]:
    """The folder's spools, oldest first, each with the size it has now.

    Sizes are taken from the youngest to the oldest: when a consumer's line is in the snapshot, all that its producer wrote
    before is in it too, so a model is always made by the run that has left it.
    """
    file = Path(tracking_uri.removeprefix("sqlite:///"))
    is_new = tracking_uri.startswith("sqlite:///") and not file.exists()  # somebody has removed the history: all is sent again
    first = {path: next(parse_lines(_head(path)), {"time": sys.maxsize})["time"] for path in spool_files(spool_dir)}
    spools = []
    for path in sorted(first, key=lambda path: (first[path], path.name), reverse=True):
        state = read_state(path)
        state = state if state.get("tracking_uri") == tracking_uri and not is_new else {}
        size = path.stat().st_size
        spools.append(Spool(path, size if size == state.get("offset") else whole_size(path), state))
    return spools[::-1]


def _has_news(spool: Spool) -> bool:
    if spool.size == 0 or spool.settled:
        return False
    return spool.state.get("offset") != spool.size or not has_writer(spool.path)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.readline()


@contextmanager
def _sole_drainer(spool_dir: Path, wait_seconds: float) -> Iterator[bool]:
    """Whether this process has the folder to itself, waiting for another drainer to leave it."""
    deadline = time.monotonic() + wait_seconds
    with (spool_dir / ".drain.lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    yield False
                    return
                time.sleep(0.1)
        yield True


def follow(spool_dir: Path, tracking_uri: str, *, pid: int, stop: threading.Event) -> DrainReport:
    """Drains again and again until the process is gone or `stop` is set, then once more until all is sent or patience ends."""
    pause, deadline = POLL_SECONDS, float("inf")
    said: set[str] = set()
    while True:
        leaving = stop.is_set() or not _alive(pid)
        report = drain(spool_dir, tracking_uri)
        for warning in [warning for warning in report.warnings if warning not in said]:
            print(f"tracking: {warning}", file=sys.stderr, flush=True)
            said.add(warning)
        if leaving:
            deadline = min(deadline, time.monotonic() + LAST_TRIES_SECONDS)
            if report.complete or time.monotonic() > deadline:
                return report
            time.sleep(1.0)
            continue
        pause = POLL_SECONDS if report.error is None else min(2 * pause, _MAX_PAUSE_SECONDS)
        until = time.monotonic() + pause
        while time.monotonic() < until and _alive(pid) and not stop.wait(0.2):
            continue


def _alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not yet waited for does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except ProcessLookupError:
        return False
    except (FileNotFoundError, PermissionError):
        return Path("/proc/self").exists() is False  # no /proc on this system: the signal has found the process


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 all is sent, 1 something is left in the spools."""
    parser = argparse.ArgumentParser(prog="python -m model_core.tracking.drain", description="Sends spooled tracking events to MLflow.")
    parser.add_argument("--spool", type=Path, required=True, help="folder of the spools")
    parser.add_argument("--uri", required=True, help="MLflow: http(s)://host:port, or sqlite:///file")
    parser.add_argument("--follow", type=int, metavar="PID", help="go on until this process is gone, then drain once more")
    options = parser.parse_args(arguments)
    if options.follow is None:
        report = drain(options.spool, options.uri)
        for warning in report.warnings:
            print(f"tracking: {warning}", file=sys.stderr)
    else:
        stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the run; we leave after it
        os.nice(10)  # the training beside us matters more
        report = follow(options.spool, options.uri, pid=options.follow, stop=stop)
    if not report.complete:
        left = f"{len(report.pending_spools)} spools are kept in {options.spool}"
        print(f"tracking: {options.uri}: {report.error}; {left} and sent by the next drain", file=sys.stderr, flush=True)
    return 0 if report.complete else 1


if __name__ == "__main__":
    sys.exit(main())
