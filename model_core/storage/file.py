"""Objects as files below a folder of this machine (or of a POSIX file system shared by several)."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from model_core.storage.errors import ConflictError, NotFoundError, StorageError
from model_core.storage.protocol import Digest, Stat, Unfinished, check_digest, check_path, check_prefix, check_range, check_sha256
from model_core.storage.version import Version

# Unfinished writes and the lock lie here, not beside the objects: whoever lists a step's folder sees finished files only.
STAGING = ".staging"
_LOCK = "lock"
_HASHED_BYTES = 1 << 20  # documents are told apart by content; hashing a shard on each stat would read it whole

_COPIED_BYTES = 1 << 20  # at a time


class FileStorage:
    """Storage below `root`; folders are made as needed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = root.as_uri()

    def get(self, path: str, *, start: int | None = None, length: int | None = None, sha256: str | None = None) -> bytes:
        offset, count = check_range(start, length)
        check_digest(sha256)
        with self._errors(path), self._file(path).open("rb") as file:
            file.seek(offset)
            data = file.read(-1 if count is None else count)
        if sha256 is not None:
            check_sha256(f"{self.uri}/{path}", hashlib.sha256(data), size=len(data), expected=sha256)
        return data

    def put(self, path: str, data: bytes, *, create_only: bool = False, if_match: str | None = None) -> str:
        target = self._file(path)
        with self._errors(path), self._staged() as staged:
            _write_synced(staged, data)
            with self._lock():
                self._check_unchanged(target, if_match)
                self._publish(staged, target, create_only=create_only)
                return _etag(target)

    def upload(self, path: str, source: Path, *, create_only: bool = False, if_match: str | None = None) -> str:
        target = self._file(path)
        with source.open("rb") as file:  # a missing source is the caller's mistake, not the store's
            if source.resolve() == target.resolve():
                return hashlib.file_digest(file, "sha256").hexdigest()
            with self._errors(path), self._staged() as staged:
                before = Version.of(file)
                sha256, _ = _copy(file, staged)
                before.check(file, f"{self.uri}/{path}")
                with self._lock():
                    self._check_unchanged(target, if_match)
                    self._publish(staged, target, create_only=create_only)
        return sha256.hexdigest()

    def download(self, path: str, target: Path, *, sha256: str | None = None) -> None:
        check_digest(sha256)
        source = self._file(path)
        name = f"{self.uri}/{path}"
        with self._errors(path), source.open("rb") as file:
            if source.resolve() == target.resolve():
                if sha256 is not None:
                    check_sha256(name, hashlib.file_digest(file, "sha256"), size=file.tell(), expected=sha256)
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
            try:
                found, size = _copy(file, partial)
                check_sha256(name, found, size=size, expected=sha256)
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)

    def stat(self, path: str) -> Stat:
        file = self._file(path)
        with self._errors(path):
            status = file.stat()
            return Stat(path, status.st_size, _etag(file), status.st_mtime)

    def list(self, prefix: str = "") -> Iterator[Stat]:
        folder = self.root / check_prefix(prefix).rpartition("/")[0]
        found = []
        for parent, folders, names in os.walk(folder):
            if Path(parent) == self.root and STAGING in folders:
                folders.remove(STAGING)
            found += [(Path(parent) / name).relative_to(self.root).as_posix() for name in names]
        for path in sorted((path for path in found if path.startswith(prefix)), key=os.fsencode):
            try:
                yield self.stat(path)
            except NotFoundError:  # deleted since the walk
                continue

    def delete(self, path: str) -> None:
        with self._errors(path), self._lock():
            file = self._file(path)
            file.unlink(missing_ok=True)
            for folder in file.parents:  # as in a bucket, where there are none; under the lock, since a write makes them anew
                if folder == self.root:
                    break
                try:
                    folder.rmdir()
                except OSError:  # something is in it
                    break

    def unfinished(self) -> Iterator[Unfinished]:
        """Staged files: a writer removes its own, also when it fails, so an old one is what a killed writer left."""
        for file in sorted((self.root / STAGING).glob("*")):
            if file.name == _LOCK:
                continue
            try:
                status = file.stat()
            except FileNotFoundError:  # published since the walk
                continue
            yield Unfinished(path=f"{STAGING}/{file.name}", id=file.name, started_at=status.st_ctime, size=status.st_size)

    def abort(self, unfinished: Unfinished) -> None:
        if unfinished.id == _LOCK or "/" in check_path(unfinished.id):
            raise ValueError(f"{unfinished.id!r} is no staged file of {self.uri}")
        with self._errors(unfinished.path):
            (self.root / STAGING / unfinished.id).unlink(missing_ok=True)

    def local_path(self, path: str) -> Path | None:
        return self._file(path)

    def _file(self, path: str) -> Path:
        if check_path(path).split("/")[0] == STAGING:
            raise ValueError(f"{path!r} is no object path; {STAGING} is the store's own folder")
        return self.root / path

    def _check_unchanged(self, target: Path, if_match: str | None) -> None:
        if if_match is not None and (not target.is_file() or _etag(target) != if_match):
            raise ConflictError(f"{self.uri}/{target.relative_to(self.root).as_posix()}: was changed by another writer")

    def _publish(self, staged: Path, target: Path, *, create_only: bool) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        if create_only:
            try:
                os.link(staged, target)  # fails on an existing name, which rename would replace
            except FileExistsError as error:
                raise ConflictError(f"{self.uri}/{target.relative_to(self.root).as_posix()}: exists already") from error
        else:
            staged.replace(target)
        sync(target.parent)

    @contextmanager
    def _staged(self) -> Iterator[Path]:
        """A free name for a write that is not finished; what is left under it is removed."""
        staged = self.root / STAGING / secrets.token_hex(8)
        staged.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield staged
        finally:
            staged.unlink(missing_ok=True)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One writer at a time, over all processes: makes compare-and-swap and delete safe against each other."""
        path = self.root / STAGING / _LOCK
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise NotFoundError(f"{self.uri}/{path}: not found") from error
        except OSError as error:
            raise StorageError(f"{self.uri}/{path}: {error.strerror or error}") from error


def _etag(file: Path) -> str:
    status = file.stat()
    if status.st_size > _HASHED_BYTES:
        return f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _copy(source: BinaryIO, target: Path) -> tuple[Digest, int]:
    """Copy to a new file, on disk when this returns: the sha256 and the number of the bytes copied, from one reading."""
    sha256 = hashlib.sha256()
    with target.open("xb") as stream:
        while piece := source.read(_COPIED_BYTES):
            sha256.update(piece)
            stream.write(piece)
        stream.flush()
        os.fsync(stream.fileno())
        return sha256, stream.tell()


def _write_synced(file: Path, data: bytes) -> None:
    with file.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
