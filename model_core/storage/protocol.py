"""The small protocol that all stores keep, and the paths that are the same in all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class Stat:
    """An object: its path below the storage's uri, its size in bytes, and a validator that changes when it is written anew."""

    path: str
    size: int
    etag: str  # opaque; compare it, never compute with it


@runtime_checkable
class Storage(Protocol):
    """Objects below one uri. Paths are relative, with `/` between their parts.

    A write is all or nothing: readers see the old object or the new one. All methods raise StorageError (or one of its two
    sub-classes, where named) with the whole uri of the object, and ValueError for a path that is not one.
    """

    uri: str  # "file:///root" or "s3://bucket/prefix", without a slash at the end

    def get(self, path: str, *, start: int | None = None, length: int | None = None) -> bytes:
        """The bytes of an object, or `length` of them from `start`; fewer where it ends earlier. Raises NotFoundError."""
        ...

    def put(self, path: str, data: bytes, *, create_only: bool = False, if_match: str | None = None) -> str:
        """Write an object and return its etag. Raises ConflictError when `create_only` finds one, or `if_match` another etag or none."""
        ...

    def upload(self, path: str, source: Path) -> None:
        """Write a local file as an object, in parts when it is large."""
        ...

    def download(self, path: str, target: Path) -> None:
        """Write an object as a local file that appears whole or not at all. Raises NotFoundError."""
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


def check_prefix(prefix: str) -> str:
    """`prefix` itself; ValueError when no object path can start with it."""
    if prefix:
        check_path(prefix.removesuffix("/"))
    return prefix
