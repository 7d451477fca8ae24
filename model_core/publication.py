"""How an attempt's files become a step's result: first the files, under their final names, then the manifest, create-only.

Readers see nothing before the manifest. An attempt that lost its claim without noticing must change nothing that the new
owner has written: on a disk everything happens under one lock, which the kernel drops when its holder dies; on S3 every
object is written under a condition (docs/reference/workspace.md).
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from model_core.claim import FILE_NAME as CLAIM
from model_core.manifest import FILE_NAME as MANIFEST
from model_core.manifest import FileEntry
from model_core.storage import ConflictError, NotFoundError, Storage
from model_core.storage.file import sync

ATTEMPT_PREFIX = ".attempt-"
CHECKPOINTS = "checkpoints"
LOCK = ".publish.lock"


def is_private(name: str) -> bool:
    """Whether a name at the top of a step's folder is never a result's."""
    return name in (CLAIM, MANIFEST, CHECKPOINTS, LOCK) or name.startswith(ATTEMPT_PREFIX)


def publish(
    storage: Storage, prefix: str, folder: Path, *, files: Sequence[FileEntry], manifest: bytes, confirm: Callable[[], None]
) -> bool:
    """Moves the files from the local `folder` to `prefix` and writes the manifest; False when another manifest is there.

    `confirm` raises when the claim is held no longer; it is called right before anything is written. Raises ConflictError
    when another attempt writes at the same time: neither is then to be trusted, and the step must be done again.
    """
    target = storage.local_path(prefix)
    if target is None:
        return _publish_remotely(storage, prefix, folder, files=files, manifest=manifest, confirm=confirm)
    _make_durable(folder)
    with alone(target):
        confirm()
        if (target / MANIFEST).exists():
            return False
        for name in [entry.name for entry in target.iterdir() if not is_private(entry.name)]:
            remove_tree(target / name)  # of an attempt that died between its files and its manifest
        for entry in sorted(folder.iterdir()):
            entry.rename(target / entry.name)
        sync(target)
        storage.put(f"{prefix}/{MANIFEST}", manifest, create_only=True)
    return True


def is_finished(storage: Storage, prefix: str) -> bool:
    """Whether a step's folder holds a manifest."""
    try:
        storage.stat(f"{prefix}/{MANIFEST}")
    except NotFoundError:
        return False
    return True


def clear_unnamed(storage: Storage, prefix: str, *, named: Sequence[FileEntry]) -> None:
    """Removes what the manifest of a finished step does not name: from then on those are the result's names for ever."""
    names = {entry.path for entry in named}
    for found in list(storage.list(f"{prefix}/")):
        path = found.path.removeprefix(f"{prefix}/")
        if path not in names and not is_private(path.partition("/")[0]):
            storage.delete(found.path)


def remove_tree(path: Path) -> None:
    """Removes a file or a folder, also one that a process which does not know that it is over still writes to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # what such a process adds meanwhile is left to `darkroom gc`
    else:
        path.unlink(missing_ok=True)


def remove_empty(folder: Path) -> None:
    """Removes a folder if nothing is in it."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _publish_remotely(
    storage: Storage, prefix: str, folder: Path, *, files: Sequence[FileEntry], manifest: bytes, confirm: Callable[[], None]
) -> bool:
    for entry in files:
        confirm()
        if is_finished(storage, prefix):
            return False
        _send(storage, f"{prefix}/{entry.path}", folder / entry.path)
    confirm()
    try:
        storage.put(f"{prefix}/{MANIFEST}", manifest, create_only=True)
    except ConflictError:
        return False
    return True


def _send(storage: Storage, path: str, source: Path) -> None:
    """Writes an object where none is, or in the place of the very one that is there now."""
    try:
        etag = storage.stat(path).etag  # of an attempt that died before its manifest
    except NotFoundError:
        etag = None
    storage.upload(path, source, create_only=etag is None, if_match=etag)


@contextmanager
def alone(target: Path, *, wait: bool = True) -> Iterator[bool]:
    """The lock of those who change what lies in a step's folder under final names; yields False when it is taken and `wait` is not."""
    target.mkdir(parents=True, exist_ok=True)
    path = target / LOCK
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            if not is_at(file.fileno(), path):  # its last holder has removed it while we waited: others lock a newer file
                continue
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file or folder is still the one at `path`: a lock on one that was removed meanwhile keeps nobody out."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _make_durable(folder: Path) -> None:
    """Forces files and names to disk: a manifest that outlives a power cut must not name files that did not."""
    for parent, _, names in os.walk(folder):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))
