"""Files that are hashed while they are written, so that nothing is read back to learn its digest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem

# Below this, handing bytes to another thread costs more than hashing them.
_PARALLEL_BYTES = 1 << 16


class HashedFile:
    """A file open for writing. Hashing and writing of a piece go on at once, in two threads."""

    def __init__(self, file: Any, hasher: ThreadPoolExecutor) -> None:
        self.sha256, self.size = hashlib.sha256(), 0
        self._file, self._hasher = file, hasher

    def write(self, data: Any) -> int:
        """Writes all of `data`, which may change again once this has returned."""
        view = memoryview(data).cast("B")
        if view.nbytes < _PARALLEL_BYTES:
            self.sha256.update(view)
            self._file.write(view)
        else:
            hashed = self._hasher.submit(self.sha256.update, view)
            try:
                self._file.write(view)
            finally:
                hashed.result()
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
            with ThreadPoolExecutor(max_workers=1) as hasher:
                hashed = HashedFile(stream, hasher)
                yield hashed
            self.written[Path(path).name] = (hashed.size, hashed.sha256.hexdigest())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """DCP writes its metadata under another name first."""
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)
