"""Checkpoints of one process: what comes back, what stays, and what becomes of damage and faults."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from model_core.storage import Storage, StorageError, Unfinished, open_storage
from model_core.training.checkpoint import CheckpointStore, Restored
from tests.checkpoint_parts import Part, RemoteStorage, value_of, weights

PREFIX = "train_vae/0/checkpoints"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture(params=["in place", "remote"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    storage = open_storage((tmp_path / "store").as_uri())
    return storage if request.param == "in place" else RemoteStorage(storage)


@pytest.fixture
def remote(tmp_path: Path) -> RemoteStorage:
    return RemoteStorage(open_storage((tmp_path / "store").as_uri()))


@pytest.fixture
def store_of(tmp_path: Path, said: list[str]) -> Callable[..., CheckpointStore]:
    def make(storage: Storage, **options: Any) -> CheckpointStore:
        return CheckpointStore(storage, PREFIX, say=said.append, scratch=tmp_path / "scratch", **options)

    return make


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


def test_state_comes_back_bitwise_with_its_notes(storage: Storage, store_of: Callable[..., CheckpointStore]) -> None:
    torch.manual_seed(0)
    tensors = {
        "half": torch.randn(5, 3).bfloat16(),
        "double": torch.randn(7, dtype=torch.float64),
        "counts": torch.arange(4),
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 2),
        "transposed": torch.randn(4, 6).t(),
        "part of a larger one": torch.randn(10, 2)[3:5],
        "not a number": torch.tensor([float("nan"), float("-inf"), -0.0]),
    }
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    store = store_of(storage)
    store.save(7, {"part": Part({"tensors": tensors, "loss": [0.1, float("inf")], "betas": (0.9, 0.99)})}, notes={"seen": [1, {"x": 0.1}]})
    store.wait()
    part = Part({})
    assert store_of(storage).restore({"part": part}) == Restored(7, {"seen": [1, {"x": 0.1}]})
    assert part.state["loss"] == [0.1, float("inf")]
    assert part.state["betas"] == (0.9, 0.99)
    for name, tensor in saved.items():
        found = part.state["tensors"][name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def test_restoring_writes_into_the_tensors_that_are_there(storage: Storage, store_of: Callable[..., CheckpointStore]) -> None:
    save(store_of(storage), 100)
    parts = weights(-1.0)
    own = parts["model"].state["w"]
    store_of(storage).restore(parts)
    assert parts["model"].state["w"] is own
    assert own[0, 0] == 100.0


def test_a_save_holds_the_state_of_its_moment_though_training_goes_on(storage: Storage, store_of: Callable[..., CheckpointStore]) -> None:
    store, parts = store_of(storage, keep_last=3), weights(1.0)
    for value in (1.0, 2.0, 3.0):
        parts["model"].state["w"].fill_(value)
        parts["model"].state["b"].fill_(value)
        parts["curves"].state["points"][0]["loss"] = value
        store.save(int(value), parts, notes={})
        parts["model"].state["w"].fill_(-value)
        parts["curves"].state["points"][0]["loss"] = -value
    store.wait()
    assert restored(store_of(storage)) == (3, 3.0)
    (Path(storage.uri.removeprefix("file://")) / PREFIX / "step-00000003" / "COMMIT.json").unlink()
    assert restored(store_of(storage)) == (2, 2.0)


def test_copies_in_memory_are_reused(storage: Storage, store_of: Callable[..., CheckpointStore]) -> None:
    store, tensors = store_of(storage), {"w": torch.zeros(1000)}
    assert store._staged(tensors)["w"].data_ptr() == store._staged(tensors)["w"].data_ptr() != tensors["w"].data_ptr()


def test_the_newest_is_used_and_said(storage: Storage, store_of: Callable[..., CheckpointStore], said: list[str]) -> None:
    assert restored(store_of(storage)) is None
    for step in (100, 200):
        save(store_of(storage), step)
    assert restored(store_of(storage)) == (200, 200.0)
    assert said == ["resumed after step 200"]


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


OTHER = "its bytes are not the promised ones"
DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "flipped byte": ("attempt-*/__0_0.distcp", flip_a_byte, f"__0_0.distcp: {OTHER}"),
    "flipped byte of the metadata": ("attempt-*/.metadata", flip_a_byte, f".metadata: {OTHER}"),
    "truncated": (
        "attempt-*/__0_0.distcp",
        lambda path: path.write_bytes(path.read_bytes()[:-10]),
        f"__0_0.distcp: {OTHER}",
    ),
    "missing": ("attempt-*/values.json", Path.unlink, "values.json: not found"),
    "empty commit": ("COMMIT.json", lambda path: path.write_bytes(b""), "COMMIT.json: not a commit (not JSON)"),
    "commit of something else": ("COMMIT.json", lambda path: path.write_bytes(b"{}"), "COMMIT.json: not a commit ("),
    "commit that points elsewhere": (
        "COMMIT.json",
        lambda path: path.write_bytes(path.read_bytes().replace(b"values.json", b"../values.json")),
        "COMMIT.json: not a commit (",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_said_in_one_line_and_the_one_before_it_used(
    storage: Storage, store_of: Callable[..., CheckpointStore], said: list[str], tmp_path: Path, damage: str
) -> None:
    for step in (100, 200):
        save(store_of(storage), step)
    pattern, harm, message = DAMAGES[damage]
    harm(next(folder(tmp_path, 200).glob(pattern)))
    assert restored(store_of(storage)) == (100, 100.0)
    assert said[0].startswith(f"damaged checkpoint: {storage.uri}/{PREFIX}/step-00000200/")
    assert message in said[0]
    assert said[0].endswith("; the checkpoint of step 100 is used instead")
    assert said[1:] == ["resumed after step 100"]


def test_with_no_sound_checkpoint_training_starts_anew(
    storage: Storage, store_of: Callable[..., CheckpointStore], said: list[str], tmp_path: Path
) -> None:
    save(store_of(storage), 100)
    flip_a_byte(next(folder(tmp_path, 100).glob("attempt-*/__0_0.distcp")))
    assert restored(store_of(storage)) is None
    assert said[0].endswith("; training starts from nothing")


@pytest.mark.parametrize(("again", "newest", "kept"), [(200, 200, [100, 200]), (150, 150, [100, 150])])
def test_a_damaged_checkpoint_is_replaced_when_its_step_is_reached_again_and_does_not_count_among_those_kept(
    storage: Storage, store_of: Callable[..., CheckpointStore], tmp_path: Path, again: int, newest: int, kept: list[int]
) -> None:
    for step in (100, 200):
        save(store_of(storage), step)
    flip_a_byte(next(folder(tmp_path, 200).glob("attempt-*/__0_0.distcp")))
    store = store_of(storage)
    restored(store)
    save(store, again)
    assert files(tmp_path) == [f"step-{step:08d}" for step in kept]
    assert restored(store_of(storage)) == (newest, float(newest))


def test_a_store_that_cannot_be_read_is_no_damage(remote: RemoteStorage, store_of: Callable[..., CheckpointStore], said: list[str]) -> None:
    save(store_of(remote), 100)
    remote.fails = lambda method, path: method == "download"
    with pytest.raises(StorageError, match=r"step-00000100/attempt-.*: no route to host"):
        store_of(remote).restore(weights(0.0))
    assert said == []


def test_a_checkpoint_of_other_parts_is_refused(storage: Storage, store_of: Callable[..., CheckpointStore]) -> None:
    save(store_of(storage), 100)
    with pytest.raises(ValueError, match="checkpoint of step 100: holds curves, model; found model"):
        store_of(storage).restore({"model": Part({})})


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


def test_the_commit_tells_what_was_written(storage: Storage, store_of: Callable[..., CheckpointStore], tmp_path: Path) -> None:
    save(store_of(storage), 100)
    commit = json.loads((folder(tmp_path, 100) / "COMMIT.json").read_bytes())
    assert (commit["step"], commit["world_size"], commit["notes"]) == (100, 1, {"seen": 100})
    sizes = {file["path"]: file["bytes"] for file in commit["files"]}
    assert sizes == {path.name: path.stat().st_size for path in folder(tmp_path, 100).glob("attempt-*/*")}


def test_notes_that_are_no_json_are_refused_before_anything_is_written(
    storage: Storage, store_of: Callable[..., CheckpointStore], tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        store_of(storage).save(100, weights(1.0), notes={"path": tmp_path})
    assert files(tmp_path) == []
