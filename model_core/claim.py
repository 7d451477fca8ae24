"""One writer a key: a claim object that is created create-only, kept alive by a heartbeat, and taken over when it falls silent.

No clock is compared with another machine's: a claim is silent when whoever wants it has seen it unchanged for STALE_SECONDS
of its own monotonic clock. So a holder may lose its claim without noticing (a stopped process, a store that was away):
before it writes where others read, it must `confirm()`.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from model_core.storage import ConflictError, NotFoundError, Storage, StorageError

FILE_NAME = "claim.json"
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
POLL_SECONDS = 1.0


class ClaimLostError(StorageError):
    """Another process has taken the claim over, or somebody removed it."""


@dataclass(frozen=True)
class Owner:
    """Who holds a claim, and for which attempt. `host` holds boot and pid namespace too, so that a pid means something."""

    host: str
    pid: int
    process_started: str  # the kernel's start time, which tells a pid from its later reuse; "" where that cannot be known
    attempt: str
    heartbeat: float  # seconds since 1970 by the holder's clock: for people, nothing is decided by it
    num_heartbeats: int = 0  # makes each heartbeat another object, whatever the clock says

    @property
    def machine(self) -> str:
        """The host's name alone."""
        return self.host.partition("/")[0]


def current_owner(attempt: str) -> Owner:
    """This process, now."""
    return Owner(host=_host(), pid=os.getpid(), process_started=_process_started(os.getpid()) or "", attempt=attempt, heartbeat=time.time())


def is_gone(owner: Owner) -> bool:
    """Whether the owner's process is known to have ended: it ran on this host, and does not any more."""
    return bool(owner.process_started) and owner.host == _host() and _process_started(owner.pid) != owner.process_started


def read_claim(storage: Storage, path: str) -> tuple[str, Owner | None] | None:
    """Etag and owner of the claim at `path`; None when there is none. The owner is None when another version wrote it."""
    try:
        etag = storage.stat(path).etag  # before the content: a claim that changes in between is then not taken over by mistake
        return etag, Owner(**json.loads(storage.get(path)))
    except NotFoundError:
        return None
    except (ValueError, TypeError):
        return etag, None


def watch(storage: Storage, etags: Mapping[str, str]) -> set[str]:
    """Those of the claims (path and etag) that stay unchanged while they are watched for STALE_SECONDS: nobody holds them."""
    silent = set(etags)
    until = time.monotonic() + STALE_SECONDS
    while silent and time.monotonic() < until:
        time.sleep(POLL_SECONDS)
        for path in list(silent):
            found = read_claim(storage, path)
            if found is None or found[0] != etags[path]:
                silent.remove(path)
    return silent


class Claim:
    """A claim that this process holds, as a context manager; leaving it gives the claim back."""

    def __init__(self, storage: Storage, path: str, owner: Owner, *, etag: str, on_lost: Callable[[], None]) -> None:
        self._storage, self._path, self._owner, self._etag, self._on_lost = storage, path, owner, etag, on_lost
        self._beating = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="claim-heartbeat", daemon=True)

    @property
    def attempt(self) -> str:
        """A name that no other attempt at any step has."""
        return self._owner.attempt

    def confirm(self) -> None:
        """A heartbeat now. Raises ClaimLostError when the claim is another's, StorageError when the store cannot say."""
        with self._beating:
            self._owner = replace(self._owner, heartbeat=time.time(), num_heartbeats=self._owner.num_heartbeats + 1)
            data = _encode(self._owner)
            try:
                self._etag = self._storage.put(self._path, data, if_match=self._etag)
            except ConflictError:
                # A heartbeat that seemed to fail may have arrived after all: then the claim has changed, and still is ours.
                found = read_claim(self._storage, self._path)
                if found is None or found[1] is None or found[1].attempt != self.attempt:
                    raise self._lost() from None
                try:
                    self._etag = self._storage.put(self._path, data, if_match=found[0])
                except ConflictError as error:
                    raise self._lost() from error

    def __enter__(self) -> Claim:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.release()

    def release(self) -> None:
        """Gives the claim back, unless it is another's by now."""
        try:
            self.confirm()
            self._storage.delete(self._path)
        except ClaimLostError:
            return  # it is not ours to remove
        except StorageError as error:  # what the step has done or why it failed matters more; others wait until it is silent
            print(f"claim: {error}; the claim stays behind", file=sys.stderr, flush=True)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                self.confirm()
            except ClaimLostError:
                self._on_lost()
                return
            except StorageError as error:  # a store that is away for a moment: the next beat tries again
                print(f"claim: heartbeat failed: {error}", file=sys.stderr, flush=True)

    def _lost(self) -> ClaimLostError:
        return ClaimLostError(f"{self._storage.uri}/{self._path}: another process has taken this claim over")


def take(storage: Storage, path: str, *, etag: str | None, on_lost: Callable[[], None]) -> Claim | None:
    """Claims `path`, where there is no claim (`etag` None) or a dead one with this etag; None when somebody else was quicker."""
    owner = current_owner(secrets.token_hex(8))
    try:
        mine = storage.put(path, _encode(owner), create_only=etag is None, if_match=etag)
    except ConflictError:
        return None
    return Claim(storage, path, owner, etag=mine, on_lost=on_lost)


def acquire(
    storage: Storage, path: str, *, finished: Callable[[], bool], on_lost: Callable[[], None], say: Callable[[str], None]
) -> Claim | None:
    """Claims `path`, waiting while somebody else holds it; None when `finished()` turns true meanwhile.

    `on_lost` is called, from another thread, when another process has taken the claim over.
    """
    claim = _wait_for(storage, path, finished=finished, on_lost=on_lost, say=say)
    if claim is not None and finished():  # by whoever gave the claim back right before we took it
        claim.release()
        return None
    return claim


def _wait_for(
    storage: Storage, path: str, *, finished: Callable[[], bool], on_lost: Callable[[], None], say: Callable[[str], None]
) -> Claim | None:
    seen: str | None = None
    since = time.monotonic()
    said = False
    while not finished():
        if (claim := take(storage, path, etag=None, on_lost=on_lost)) is not None:
            return claim
        if (found := read_claim(storage, path)) is None:
            continue
        etag, owner = found
        if etag != seen:
            seen, since = etag, time.monotonic()
        if (owner is not None and is_gone(owner)) or time.monotonic() - since > STALE_SECONDS:
            if (claim := take(storage, path, etag=etag, on_lost=on_lost)) is not None:
                return claim
            continue
        if not said:
            holder = "another version of this program" if owner is None else f"process {owner.pid} on {owner.machine}"
            say(f"waiting for {holder}, which is doing this step")
            said = True
        time.sleep(POLL_SECONDS)
    return None


def _encode(owner: Owner) -> bytes:
    return json.dumps(asdict(owner), sort_keys=True).encode()


def _host() -> str:
    """Name, boot and pid namespace: containers that share a host's name still number their processes each for itself."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return "/".join(
        (socket.gethostname(), boot.read_text().strip() if boot.exists() else "", os.readlink(namespace) if namespace.is_symlink() else "")
    )


def _process_started(pid: int) -> str | None:
    """The kernel's start time of a process; None when there is no such process, or no /proc to look at."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, started = fields[0], fields[19]
    return None if state in ("Z", "X") else started
