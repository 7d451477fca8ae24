"""What the tests of checkpoints save, and stores that fail when told to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from model_core.storage import Stat, Storage, StorageError, Unfinished
from model_core.training.checkpoint import CheckpointStore

PREFIX = "train_vae/0/checkpoints"


class Part:
    """Holds one state and takes up another."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def weights(value: float, *, rows: int = 3) -> dict[str, Part]:
    """Two parts that tell one save from another."""
    return {"model": Part({"w": torch.full((rows, 4), value), "b": torch.tensor(value)}), "curves": Part({"points": [{"loss": value}]})}


def value_of(parts: dict[str, Part]) -> float:
    """What `weights` was called with, told by all of the state alike."""
    value: float = parts["curves"].state["points"][0]["loss"]
    assert torch.equal(parts["model"].state["w"], torch.full_like(parts["model"].state["w"], value))
    assert parts["model"].state["b"].item() == value
    return value


class RemoteStorage:
    """A store that looks remote. `fails(method, path)` says which calls fail; `calls` tells all of them."""

    def __init__(self, inner: Storage) -> None:
        self.inner, self.uri = inner, inner.uri
        self.fails: Callable[[str, str], bool] = lambda method, path: False
        self.calls: list[tuple[str, str]] = []

    def _call(self, method: str, path: str) -> None:
        self.calls.append((method, path))
        if self.fails(method, path):
            raise StorageError(f"{self.uri}/{path}: no route to host")

    def get(self, path: str, *, start: int | None = None, length: int | None = None, sha256: str | None = None) -> bytes:
        self._call("get", path)
        return self.inner.get(path, start=start, length=length, sha256=sha256)

    def put(self, path: str, data: bytes, *, create_only: bool = False, if_match: str | None = None) -> str:
        self._call("put", path)
        return self.inner.put(path, data, create_only=create_only, if_match=if_match)

    def upload(self, path: str, source: Path) -> str:
        self._call("upload", path)
        return self.inner.upload(path, source)

    def download(self, path: str, target: Path, *, sha256: str | None = None) -> None:
        self._call("download", path)
        self.inner.download(path, target, sha256=sha256)

    def stat(self, path: str) -> Stat:
        self._call("stat", path)
        return self.inner.stat(path)

    def list(self, prefix: str = "") -> Iterator[Stat]:
        self._call("list", prefix)
        return self.inner.list(prefix)

    def delete(self, path: str) -> None:
        self._call("delete", path)
        self.inner.delete(path)

    def unfinished(self) -> Iterator[Unfinished]:
        return self.inner.unfinished()

    def abort(self, unfinished: Unfinished) -> None:
        self.inner.abort(unfinished)

    def local_path(self, path: str) -> Path | None:
        return None


def save(store: CheckpointStore, step: int, **options: Any) -> None:
    store.save(step, weights(float(step), **options), notes={"seen": step})
    store.wait()


def restored(store: CheckpointStore) -> tuple[int, float] | None:
    """(step, what its state says) of the checkpoint that a fresh process would take up."""
    parts = weights(-1.0)
    found = store.restore(parts)
    return None if found is None else (found.step, value_of(parts))


def folder(tmp_path: Path, step: int) -> Path:
    return tmp_path / "store" / PREFIX / f"step-{step:08d}"


def files(tmp_path: Path) -> list[str]:
    """Folders of checkpoints that hold anything."""
    return sorted({path.relative_to(tmp_path / "store" / PREFIX).parts[0] for path in (tmp_path / "store" / PREFIX).rglob("*.*")})
