"""file:// and s3:// behind one small protocol: create-only writes, ranges, multipart."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from model_core.documents import UserError
from model_core.storage.errors import ConflictError, CorruptError, NotFoundError, StorageError
from model_core.storage.protocol import Stat, Storage, Unfinished
from model_core.storage.settings import S3Settings

__all__ = [
    "ConflictError",
    "CorruptError",
    "NotFoundError",
    "S3Settings",
    "Stat",
    "Storage",
    "StorageError",
    "Unfinished",
    "open_storage",
]

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def open_storage(uri: str, s3: S3Settings = S3Settings()) -> Storage:  # noqa: B008 - frozen, so one shared default is safe
    """The storage at `uri`; nothing is read or written yet. Raises UserError for a uri that is neither file:// nor s3://."""
    scheme, separator, rest = uri.partition("://")
    rest = (unquote(rest) if scheme == "file" else rest).rstrip("/")  # S3 keys are taken as they are written
    parts = rest.lstrip("/").split("/")
    if not separator or scheme not in ("file", "s3"):
        raise UserError(f"storage uri: found {uri!r}; allowed are file:///FOLDER and s3://BUCKET/PREFIX")
    if not rest.isprintable() or any(part in ("", ".", "..") for part in parts[1:]) or parts[0] in (".", ".."):
        raise UserError(f"storage uri: found {uri!r} with empty, '.', '..' or unprintable parts; allowed are plain names between slashes")
    if scheme == "file":
        if not uri.startswith("file:///") or not rest:
            raise UserError(f"storage uri: found {uri!r}; a file:// uri needs an absolute folder, as in file:///data/darkroom")
        from model_core.storage.file import FileStorage

        return FileStorage(Path(rest))
    if not _BUCKET.fullmatch(parts[0]):
        raise UserError(f"storage uri: found bucket {parts[0]!r} in {uri!r}; allowed are 3 to 63 of a-z, 0-9, dot and dash")
    from model_core.storage.s3 import S3Storage

    return S3Storage(parts[0], "/".join(parts[1:]), settings=s3)
