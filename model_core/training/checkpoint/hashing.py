"""Files that are hashed while they are written, so that nothing is read back to learn its digest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem


class HashedFile:
    """A file open for writing, and the digest of what has been written.

    Hashing goes on in the same thread: one more would be faster on an idle machine alone, and take a core from training.
    """

    def __init__(self, file: Any) -> None:
        self.sha256, self.size = hashlib.sha256(), 0
        self._file = file

    def write(self, data: Any) -> int:
        """Writes all of `data`; returns its size in bytes."""
        view = memoryview(data).cast("B")
        self.sha256.update(view)
        self._file.write(view)
        self.size += view.nbytes
        return view.nbytes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class HashingFileSystem(FileSystem):
    """DCP's file system, which remembers size and sha256 of each file it has written, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[str, tuple[int, str]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """A stream as `open` gives; one for writing is hashed."""
        with super().create_stream(path, mode) as stream:
            if "w" not in mode:
                yield stream
                return
            hashed = HashedFile(stream)
            yield hashed
            self.written[Path(path).name] = (hashed.size, hashed.sha256.hexdigest())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """DCP writes its metadata under another name first."""
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)
