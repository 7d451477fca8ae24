"""Whether a local file is still the one that an upload began to read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import BinaryIO

from model_core.storage.errors import StorageError


@dataclass(frozen=True)
class Version:
    """Size and time of change of an open file. A file renamed over its path is another one: the open one stays as it is."""

    size: int
    changed_at_ns: int

    @staticmethod
    def of(file: BinaryIO) -> Version:
        """The version now."""
        status = os.fstat(file.fileno())
        return Version(status.st_size, status.st_mtime_ns)

    def check(self, file: BinaryIO, name: str) -> None:
        """Raises StorageError about the object `name` when the file was written to since."""
        if Version.of(file) != self:
            raise StorageError(f"{name}: not written, because its source {file.name} changed while it was read")
