"""Where a data set lies: what a step reads of it, whether it is an input or a plain folder of this machine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Folder(Protocol):
    """Whole files by name: an input of a step, or a local folder."""

    def path(self, name: str) -> Path: ...

    def read_json(self, name: str) -> Any: ...

    def names(self, prefix: str = "") -> list[str]: ...


class Shards(Protocol):
    """Files that are read by ranges of bytes, unchecked: on this machine's disk, or in a store."""

    def local(self, name: str) -> Path | None: ...

    def read(self, name: str, *, start: int, length: int) -> bytes: ...


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine that is no input: what a step is about to leave."""

    root: Path

    def path(self, name: str) -> Path:
        """The file of that name."""
        return self.root / name

    def local(self, name: str) -> Path | None:
        """The same."""
        return self.path(name)

    def read(self, name: str, *, start: int, length: int) -> bytes:
        """`length` bytes of a file from `start`."""
        with self.path(name).open("rb") as stream:
            stream.seek(start)
            return stream.read(length)

    def read_json(self, name: str) -> Any:
        """The content of a JSON file."""
        return json.loads(self.path(name).read_bytes())

    def names(self, prefix: str = "") -> list[str]:
        """Paths of the files below `prefix`, in order."""
        paths = (path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())
        return sorted(path for path in paths if path.startswith(prefix))
