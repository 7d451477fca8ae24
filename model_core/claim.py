"""One writer a key: a claim object that is created create-only, kept alive by a heartbeat, and taken over when stale."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from model_core.storage import ConflictError, NotFoundError, Storage, StorageError

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Owner:
    """Who holds a claim: host (with its boot, so that a pid means something), process, when it last said so."""

    host: str
    pid: int
    process_started: str
    heartbeat: float  # seconds since 1970


def current_owner() -> Owner:
    """This process, now."""
    return Owner(host=_host(), pid=os.getpid(), process_started=_process_started(os.getpid()) or "", heartbeat=time.time())


def is_stale(owner: Owner, *, now: float) -> bool:
    """Whether nobody holds the claim any more: its process is gone from this host, or its heartbeat has stopped."""
    if owner.host == _host():
        return _process_started(owner.pid) != owner.process_started
    return now - owner.heartbeat > STALE_SECONDS


class Claim:
    """A claim that this process holds, as a context manager; leaving it gives the claim back."""

    def __init__(self, storage: Storage, path: str, etag: str, on_lost: Callable[[], None]) -> None:
        self._storage, self._path, self._etag, self._on_lost = storage, path, etag, on_lost
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="claim-heartbeat", daemon=True)

    def __enter__(self) -> Claim:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._storage.delete(self._path)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                self._etag = self._storage.put(self._path, _encode(current_owner()), if_match=self._etag)
            except ConflictError:
                self._on_lost()
                return
            except StorageError as error:  # a store that is away for a moment: the next beat tries again
                print(f"claim: heartbeat of {self._path} failed: {error}", file=sys.stderr, flush=True)


def acquire(
    storage: Storage, path: str, *, finished: Callable[[], bool], on_lost: Callable[[], None], say: Callable[[str], None]
) -> Claim | None:
    """Claims `path`, waiting while somebody else holds it; None when `finished()` turns true meanwhile.

    `on_lost` is called, from another thread, when another process has taken the claim over.
    """
    said = False
    while not finished():
        try:
            return Claim(storage, path, storage.put(path, _encode(current_owner()), create_only=True), on_lost)
        except ConflictError:
            pass  # somebody holds it, or died holding it: see below who
        try:
            etag = storage.stat(path).etag
            owner = Owner(**json.loads(storage.get(path)))
        except NotFoundError:
            continue
        if is_stale(owner, now=time.time()):
            try:
                return Claim(storage, path, storage.put(path, _encode(current_owner()), if_match=etag), on_lost)
            except (ConflictError, NotFoundError):
                continue
        if not said:
            say(f"waiting for process {owner.pid} on {owner.host.partition('/')[0]}, which is doing this step")
            said = True
        time.sleep(POLL_SECONDS)
    return None


def _encode(owner: Owner) -> bytes:
    return json.dumps(asdict(owner), sort_keys=True).encode()


def _host() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}/{boot.read_text().strip() if boot.exists() else ''}"


def _process_started(pid: int) -> str | None:
    """The kernel's start time of a process, which tells a pid from its later reuse; None when there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, started = fields[0], fields[19]
    return None if state in ("Z", "X") else started
