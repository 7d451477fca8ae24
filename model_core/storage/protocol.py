"""The small protocol that all stores keep, and the paths that are the same in all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from model_core.storage.errors import CorruptError


class Digest(Protocol):
    """What hashlib makes."""

    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


@dataclass(frozen=True)
class Stat:
    """An object: its path below the storage's uri, its size in bytes, and a validator that changes when it is written anew."""

    path: str
    size: int
    etag: str  # opaque; compare it, never compute with it
    modified_at: float = field(default=0.0, compare=False)  # seconds since 1970, by the store's clock


@dataclass(frozen=True)
class Unfinished:
    """A write that was begun and not ended: by a writer that still works on it, or by one that died."""

    path: str  # of the object it was to become; of the staged file itself in a folder
    id: str
    started_at: float  # seconds since 1970, by the store's clock
    size: int | None  # bytes it occupies, where the store says so without being asked for each


@runtime_checkable
class Storage(Protocol):
    """Objects below one uri. Paths are relative, with `/` between their parts.

    A write is all or nothing: readers see the old object or the new one. All methods raise StorageError (or one of its
    sub-classes, where named) with the whole uri of the object, and ValueError for a path that is not one.
    """

    uri: str  # "file:///root" or "s3://bucket/prefix", without a slash at the end

    def get(self, path: str, *, start: int | None = None, length: int | None = None, sha256: str | None = None) -> bytes:
        """The bytes of an object, or `length` of them from `start`; fewer where it ends earlier. Raises NotFoundError.

        With `sha256` (64 hex digits, of the bytes asked for) raises CorruptError when they are others.
        """
        ...

    def put(self, path: str, data: bytes, *, create_only: bool = False, if_match: str | None = None) -> str:
        """Write an object and return its etag. Raises ConflictError when `create_only` finds one, or `if_match` another etag or none."""
        ...

    def upload(self, path: str, source: Path, *, create_only: bool = False, if_match: str | None = None) -> str:
        """Write a local file as an object and return the sha256 (hex) of what was sent. The conditions are those of `put`.

        On S3 a large file goes in parts, and a call that follows an interrupted one sends only the parts that are not there.
        Raises StorageError when the file changes meanwhile, CorruptError when the store got other bytes than were sent.
        """
        ...

    def download(self, path: str, target: Path, *, sha256: str | None = None) -> None:
        """Write an object as a local file that appears whole or not at all. Raises NotFoundError.

        With `sha256` (64 hex digits) raises CorruptError when the object is another one; `target` is then as it was.
        """
        ...

    def stat(self, path: str) -> Stat:
        """Size and etag of an object. Raises NotFoundError."""
        ...

    def list(self, prefix: str = "") -> Iterator[Stat]:
        """All objects whose path starts with `prefix` (a string, not a folder), by the byte order of their paths."""
        ...

    def delete(self, path: str) -> None:
        """Remove an object; none there is no error."""
        ...

    def unfinished(self) -> Iterator[Unfinished]:
        """The writes below this uri that were begun and not ended. They take space, and no reader sees them."""
        ...

    def abort(self, unfinished: Unfinished) -> None:
        """Remove what an unfinished write left; one that is gone is no error. A writer still at work on it fails or begins anew."""
        ...

    def local_path(self, path: str) -> Path | None:
        """Where the object lies (or would lie) on this machine's disk; None for a remote store."""
        ...


def check_path(path: str) -> str:
    """`path` itself; ValueError when it is absolute, empty, or has empty, `.`, `..` or unprintable parts."""
    parts = path.split("/")
    if not path.isprintable() or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{path!r} is no object path; allowed are relative paths such as train_vae/0a1b/manifest.json")
    return path


def check_range(start: int | None, length: int | None) -> tuple[int, int | None]:
    """(start, length) with the defaults filled in; ValueError when one is negative."""
    if (start or 0) < 0 or (length or 0) < 0:
        raise ValueError(f"a range cannot have start {start} and length {length}; both are counted in bytes from 0")
    return start or 0, length


def check_sha256(name: str, data: Digest, *, size: int, expected: str | None) -> None:
    """Raises CorruptError about `name` when a digest was expected and `data`, of `size` bytes, has another one."""
    if expected is not None and data.hexdigest() != expected:
        found = f"{size} bytes with sha256 {data.hexdigest()[:12]}"
        raise CorruptError(f"{name}: its bytes are not the promised ones: found {found}, expected sha256 {expected[:12]}")


def check_digest(sha256: str | None) -> None:
    """ValueError when `sha256` could never be met."""
    if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"{sha256!r} is no sha256; allowed are 64 hex digits in lower case")


def check_prefix(prefix: str) -> str:
    """`prefix` itself; ValueError when no object path can start with it."""
    if prefix:
        check_path(prefix.removesuffix("/"))
    return prefix
