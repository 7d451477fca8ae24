"""Files of this machine as a store."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from model_core.documents import UserError
from model_core.storage import ConflictError, CorruptError, Storage, StorageError, Unfinished, open_storage
from tests.storage_conformance import StorageConformance, put_many


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(f"file://{tmp_path}/store")


class TestFile(StorageConformance):
    pass


def _count_up(uri: str, times: int) -> None:
    storage = open_storage(uri)
    for _ in range(times):
        while True:
            etag, value = storage.stat("counter").etag, int(storage.get("counter"))
            try:
                storage.put("counter", str(value + 1).encode(), if_match=etag)
                break
            except ConflictError:
                continue


def test_if_match_loses_no_update_between_processes(storage: Storage) -> None:
    storage.put("counter", b"0")
    workers = [multiprocessing.get_context("fork").Process(target=_count_up, args=(storage.uri, 10)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert storage.get("counter") == b"30"


def test_local_path_is_where_the_object_lies(storage: Storage, tmp_path: Path) -> None:
    storage.put("a/b", b"x")
    assert storage.local_path("a/b") == tmp_path / "store" / "a" / "b"
    assert (tmp_path / "store" / "a" / "b").read_bytes() == b"x"


def test_write_that_fails_leaves_the_old_object_and_no_remains(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.put("object", b"old")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StorageError, match="object: No space left on device"):
        storage.put("object", b"new")
    assert storage.get("object") == b"old"
    assert [file.name for file in (tmp_path / "store" / ".staging").iterdir()] == ["lock"]


def test_unfinished_writes_are_not_listed(storage: Storage, tmp_path: Path) -> None:
    storage.put("object", b"x")
    (tmp_path / "store" / ".staging" / "0123").write_bytes(b"half")
    assert [found.path for found in storage.list()] == ["object"]
    with pytest.raises(ValueError, match="own folder"):
        storage.get(".staging/0123")


def test_what_a_killed_writer_left_is_found_and_removed(storage: Storage, tmp_path: Path) -> None:
    storage.put("object", b"x")
    (tmp_path / "store" / ".staging" / "0123").write_bytes(b"half")
    [found] = storage.unfinished()
    assert (found.path, found.id, found.size) == (".staging/0123", "0123", 4)
    assert abs(found.started_at - time.time()) < 60
    storage.abort(found)
    storage.abort(found)
    assert list(storage.unfinished()) == []
    storage.put("object", b"y", if_match=storage.stat("object").etag)  # the lock was not taken for a remain


@pytest.mark.parametrize("name", ["lock", "../object", ""])
def test_abort_removes_staged_files_only(storage: Storage, name: str) -> None:
    storage.put("object", b"x")
    with pytest.raises(ValueError, match="is no"):
        storage.abort(Unfinished(path="object", id=name, started_at=0.0, size=None))
    assert storage.get("object") == b"x"


def test_upload_of_a_file_that_changes_meanwhile_writes_nothing(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(bytes(100))
    sync = os.fsync

    def change_and_sync(descriptor: int) -> None:
        (tmp_path / "source").write_bytes(b"changed")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", change_and_sync)
    with pytest.raises(StorageError, match="object: not written, because its source .*source changed"):
        storage.upload("object", tmp_path / "source")
    assert list(storage.list()) == []
    assert list(storage.unfinished()) == []


def test_download_onto_the_object_itself_still_checks_it(storage: Storage, tmp_path: Path) -> None:
    storage.put("object", b"x")
    with pytest.raises(CorruptError, match="object: .*found 1 bytes"):
        storage.download("object", tmp_path / "store" / "object", sha256="0" * 64)
    assert storage.get("object") == b"x"


def test_etag_of_a_large_file_changes_when_it_is_written_anew(storage: Storage) -> None:
    first = storage.put("large", bytes(2 << 20))
    assert storage.put("large", bytes(2 << 20), if_match=first) != first


def test_many_objects_are_listed_in_order(storage: Storage) -> None:
    paths = put_many(storage, 50)
    assert [found.path for found in storage.list("many/")] == paths


@pytest.mark.parametrize("uri", ["file:///data/store", "file:///data/store/", "s3://bucket/a/b", "s3://bucket"])
def test_uri_has_no_slash_at_its_end(uri: str) -> None:
    assert open_storage(uri).uri == uri.rstrip("/")


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("/plain/folder", "allowed are file:///FOLDER and s3://BUCKET/PREFIX"),
        ("gs://bucket/prefix", "allowed are file:///FOLDER and s3://BUCKET/PREFIX"),
        ("file://relative/folder", "needs an absolute folder"),
        ("file:///", "needs an absolute folder"),
        ("file:///a/../b", "plain names"),
        ("file:///a/%2e%2e/b", "plain names"),
        ("s3://", "found bucket ''"),
        ("s3://Big_Bucket/x", "found bucket 'Big_Bucket'"),
        ("s3://bucket//x", "plain names"),
    ],
)
def test_bad_uri_is_a_user_error_in_one_sentence(uri: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        open_storage(uri)
    assert repr(uri) in str(error.value)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("uri", ["file:///data/store", "s3://bucket/x"])
def test_every_store_has_the_methods_of_the_protocol(uri: str) -> None:
    assert isinstance(open_storage(uri), Storage)


@pytest.mark.parametrize("name", ["my photos", "100%", "\u00fcber-\u6570\u636e", "a%20b"])
def test_folder_of_any_name_is_found_again_by_its_uri(tmp_path: Path, name: str) -> None:
    first = open_storage((tmp_path / name).as_uri())
    first.put("object", b"x")
    assert (tmp_path / name / "object").exists()
    assert open_storage(first.uri).get("object") == b"x"
