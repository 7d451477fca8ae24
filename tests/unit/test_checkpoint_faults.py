"""Saves that fail: said, tidied up and survived; two writers of one step, and disks and stores that give way."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from model_core.storage import Storage, StorageError
from model_core.training.checkpoint import CheckpointStore, Restored
from tests.checkpoint_parts import PREFIX, RemoteStorage, files, folder, restored, save, value_of, weights


@pytest.mark.parametrize("fault", [("upload", "__0_0.distcp"), ("stat", ".metadata"), ("put", "COMMIT.json")])
def test_a_failed_save_is_said_and_the_next_one_succeeds(
    remote: RemoteStorage, store_of: Callable[..., CheckpointStore], said: list[str], tmp_path: Path, fault: tuple[str, str]
) -> None:
    store = store_of(remote)
    remote.fails = lambda method, path: method == fault[0] and path.endswith(fault[1])
    store.save(100, weights(100.0), notes={})
    with pytest.raises(StorageError, match="no route to host"):
        store.wait()
    assert len(said) == 1
    assert said[0].startswith(f"checkpoint of step 100 failed: {remote.uri}/{PREFIX}/step-00000100/")
    assert files(tmp_path) == []  # its leftovers are gone
    remote.fails = lambda method, path: False
    save(store, 200)
    assert restored(store_of(remote)) == (200, 200.0)


def test_training_goes_on_after_one_failure_and_stops_after_two_in_a_row(
    remote: RemoteStorage, store_of: Callable[..., CheckpointStore], said: list[str]
) -> None:
    store = store_of(remote)
    failing = {100, 300, 400}
    remote.fails = lambda method, path: method == "upload" and any(f"step-{step:08d}" in path for step in failing)
    for step in (100, 200, 300, 400):
        store.save(step, weights(float(step)), notes={})
    with pytest.raises(StorageError, match=r"step-00000400/.*no route to host"):
        store.save(500, weights(500.0), notes={})
    assert [line.split(":")[0] for line in said] == [f"checkpoint of step {step} failed" for step in (100, 300, 400)]
    assert restored(store_of(remote)) == (200, 200.0)


def test_an_object_shorter_than_what_was_written_is_not_committed(
    remote: RemoteStorage, store_of: Callable[..., CheckpointStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = remote.upload

    def upload_half(path: str, source: Path) -> str:
        digest = upload(path, source)
        if path.endswith(".distcp"):
            remote.inner.put(path, source.read_bytes()[:100])
        return digest

    monkeypatch.setattr(remote, "upload", upload_half)
    store = store_of(remote)
    store.save(100, weights(1.0), notes={})
    with pytest.raises(StorageError, match=r"__0_0.distcp: found 100 bytes where \d+ were written"):
        store.wait()
    assert restored(store_of(remote)) is None


@contextmanager
def full_disk(after_bytes: int) -> Iterator[None]:
    """No file of this process can grow past a size: the same OSError path as a disk without space."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_full_disk_is_said_and_survived(
    storage: Storage, store_of: Callable[..., CheckpointStore], said: list[str], tmp_path: Path
) -> None:
    store = store_of(storage)
    with full_disk(after_bytes=1 << 16):
        store.save(100, weights(1.0, rows=10_000), notes={})
        with pytest.raises(StorageError, match="File too large"):
            store.wait()
    assert said[0].startswith("checkpoint of step 100 failed: ")
    assert files(tmp_path) == []
    assert not list((tmp_path / "scratch").rglob("*.distcp"))
    save(store, 200, rows=10_000)
    assert restored(store_of(storage)) == (200, 200.0)


def test_of_two_writers_of_one_step_the_first_stands_and_both_go_on(
    remote: RemoteStorage, store_of: Callable[..., CheckpointStore], said: list[str], tmp_path: Path
) -> None:
    first, second = store_of(remote.inner), store_of(remote)

    def let_the_first_commit(method: str, path: str) -> bool:
        if method == "put" and path.endswith("step-00000100/COMMIT.json"):
            first.save(100, weights(1.0), notes={"writer": 1})
            first.wait()
        return False

    remote.fails = let_the_first_commit
    second.save(100, weights(2.0), notes={"writer": 2})
    second.wait()
    assert said == ["checkpoint of step 100: another process has committed one meanwhile, which stands"]
    assert len(list(folder(tmp_path, 100).glob("attempt-*/*.distcp"))) == 1
    parts = weights(0.0)
    assert store_of(remote).restore(parts) == Restored(100, {"writer": 1})
    assert value_of(parts) == 1.0
    for store, step in ((first, 200), (second, 300)):
        save(store, step)
    assert restored(store_of(remote)) == (300, 300.0)
