"""Which checkpoints and leftovers stay: the newest, every k-th, what a person has put aside; the commit goes before its data."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from model_core.storage import Storage, Unfinished
from model_core.training.checkpoint import CheckpointStore
from tests.checkpoint_parts import PREFIX, RemoteStorage, files, folder, restored, save, weights


def test_the_newest_and_every_kth_are_kept(storage: Storage, store_of: Callable[..., CheckpointStore], tmp_path: Path) -> None:
    store = store_of(storage, keep_last=2, keep_every_steps=300)
    for step in range(100, 900, 100):
        save(store, step)
    assert files(tmp_path) == [f"step-{step:08d}" for step in (300, 600, 700, 800)]


def test_attempts_that_were_never_committed_go_once_they_are_older_than_the_newest_commit(
    storage: Storage, store_of: Callable[..., CheckpointStore], tmp_path: Path
) -> None:
    save(store_of(storage), 100)
    for leftover in ("step-00000050", "step-00000100", "step-00000300"):
        path = tmp_path / "store" / PREFIX / leftover / "attempt-deadbeef" / "__0_0.distcp"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"half")
    save(store_of(storage), 200)
    left = {path.parent.parent.name for path in (tmp_path / "store").rglob("attempt-deadbeef/*")}
    assert left == {"step-00000300"}  # which may be in the writing
    save(store_of(storage), 400)
    assert not list((tmp_path / "store").rglob("attempt-deadbeef/*"))
    assert restored(store_of(storage)) == (400, 400.0)


def test_uploads_that_a_killed_writer_has_begun_are_given_up_once_older_than_the_newest_commit(
    remote: RemoteStorage, store_of: Callable[..., CheckpointStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = {
        step: Unfinished(f"{PREFIX}/step-{step:08d}/attempt-deadbeef/__0_0.distcp", id=str(step), started_at=0.0, size=None)
        for step in (100, 300)
    }
    elsewhere = Unfinished("train_vae/1/vae/model.safetensors", id="x", started_at=0.0, size=None)
    aborted: list[Unfinished] = []
    monkeypatch.setattr(remote, "unfinished", lambda: iter([*begun.values(), elsewhere]))
    monkeypatch.setattr(remote, "abort", aborted.append)
    save(store_of(remote), 200)
    assert aborted == [begun[100]]


def test_a_folder_that_a_person_has_put_aside_is_left_alone(
    storage: Storage, store_of: Callable[..., CheckpointStore], tmp_path: Path
) -> None:
    save(store_of(storage), 100)
    shutil.copytree(folder(tmp_path, 100), folder(tmp_path, 100).with_name("step-00000100.kept"))
    store = store_of(storage, keep_last=1)
    assert restored(store) == (100, 100.0)
    save(store, 200)
    assert files(tmp_path) == ["step-00000100.kept", "step-00000200"]


def test_a_commit_damaged_since_does_not_stop_training(
    storage: Storage, store_of: Callable[..., CheckpointStore], said: list[str], tmp_path: Path
) -> None:
    store = store_of(storage)
    save(store, 100)
    (folder(tmp_path, 100) / "COMMIT.json").write_bytes(b"")
    (folder(tmp_path, 100) / "attempt-deadbeef").mkdir()
    (folder(tmp_path, 100) / "attempt-deadbeef" / ".metadata").write_bytes(b"")
    save(store, 200)
    assert said == [f"old checkpoints cannot be removed: {storage.uri}/{PREFIX}/step-00000100/COMMIT.json: not a commit (not JSON)"]
    assert restored(store_of(storage)) == (200, 200.0)


def test_clearing_leaves_nothing(storage: Storage, store_of: Callable[..., CheckpointStore], tmp_path: Path) -> None:
    store = store_of(storage)
    store.save(100, weights(1.0), notes={})
    store.clear()
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file() and path.name != "lock"] == []
    assert restored(store_of(storage)) is None


def test_nothing_stays_in_scratch(remote: RemoteStorage, store_of: Callable[..., CheckpointStore], tmp_path: Path) -> None:
    killed = tmp_path / "scratch" / "checkpoints" / "attempt-00000000" / "__0_0.distcp"
    killed.parent.mkdir(parents=True)
    killed.write_bytes(b"what a killed process has left")
    save(store_of(remote), 100)
    restored(store_of(remote))
    assert [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()] == []


def test_retention_that_fails_is_said_and_loses_no_checkpoint(
    remote: RemoteStorage, store_of: Callable[..., CheckpointStore], said: list[str], tmp_path: Path
) -> None:
    store = store_of(remote, keep_last=1)
    save(store, 100)
    remote.fails = lambda method, path: method == "delete"
    save(store, 200)
    assert len(said) == 1
    assert said[0].startswith("old checkpoints cannot be removed: ")
    assert files(tmp_path) == ["step-00000100", "step-00000200"]
    remote.fails = lambda method, path: False
    save(store, 300)
    assert files(tmp_path) == ["step-00000300"]


def test_the_commit_is_removed_before_the_data(remote: RemoteStorage, store_of: Callable[..., CheckpointStore]) -> None:
    store = store_of(remote, keep_last=1)
    save(store, 100)
    save(store, 200)
    removed = [path.rpartition("/")[2] for method, path in remote.calls if method == "delete" and "step-00000100" in path]
    assert removed[0] == "COMMIT.json"
    assert set(removed[1:]) == {"__0_0.distcp", ".metadata", "values.json"}
