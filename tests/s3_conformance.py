"""What stores promise that take large files in parts, as tests of a `storage` fixture that takes parts of 5 MiB."""

from __future__ import annotations

import hashlib
import pickle
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from model_core.storage import NotFoundError, Storage, StorageError, open_storage
from model_core.storage.s3_connection import S3Connection
from tests.storage_conformance import MiB, StorageConformance, put_many


class S3Conformance(StorageConformance):
    """Moto keeps these too."""

    def test_upload_goes_on_where_a_killed_process_stopped(self, storage: Storage, tmp_path: Path, sent: list[str]) -> None:
        content = random.Random(0).randbytes(26 * MiB)
        (tmp_path / "source").write_bytes(content)
        upload_and_die(storage, "large", tmp_path / "source", after_parts=2)
        with pytest.raises(NotFoundError):
            storage.stat("large")
        assert [found.path for found in storage.unfinished()] == ["large"]
        assert storage.upload("large", tmp_path / "source") == hashlib.sha256(content).hexdigest()
        assert "create_multipart_upload" not in sent
        assert 1 <= sent.count("upload_part") <= 4  # of 6
        assert storage.get("large") == content
        assert list(storage.unfinished()) == []

    def test_upload_of_a_changed_file_keeps_no_part_of_the_old_one(self, storage: Storage, tmp_path: Path, sent: list[str]) -> None:
        content = random.Random(0).randbytes(16 * MiB)
        (tmp_path / "source").write_bytes(content)
        upload_and_die(storage, "large", tmp_path / "source", after_parts=3)
        changed = b"!" + content[1 : -1 - 10 * MiB] + b"!" + content[-10 * MiB :]
        (tmp_path / "source").write_bytes(changed)
        assert storage.upload("large", tmp_path / "source") == hashlib.sha256(changed).hexdigest()
        assert storage.get("large") == changed

    def test_upload_of_a_file_of_another_size_begins_anew(self, storage: Storage, tmp_path: Path, sent: list[str]) -> None:
        (tmp_path / "source").write_bytes(bytes(16 * MiB))
        upload_and_die(storage, "large", tmp_path / "source", after_parts=3)
        (tmp_path / "source").write_bytes(bytes(11 * MiB))
        storage.upload("large", tmp_path / "source")
        assert sent.count("upload_part") == 3
        assert storage.stat("large").size == 11 * MiB

    def test_upload_of_a_file_that_changes_meanwhile_writes_nothing(
        self, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "source").write_bytes(bytes(40 * MiB))
        call = S3Connection.call

        def call_and_change(self: S3Connection, operation: str, **arguments: Any) -> Any:
            with (tmp_path / "source").open("r+b") as file:
                file.write(b"changed")
            return call(self, operation, **arguments)

        monkeypatch.setattr(S3Connection, "call", call_and_change)
        with pytest.raises(StorageError, match=f"{storage.uri}/large: not written, because its source .*source changed"):
            storage.upload("large", tmp_path / "source")
        monkeypatch.undo()
        with pytest.raises(NotFoundError):
            storage.stat("large")

    def test_aborted_upload_is_gone_and_abort_is_repeatable(self, storage: Storage, tmp_path: Path) -> None:
        (tmp_path / "source").write_bytes(bytes(16 * MiB))
        upload_and_die(storage, "folder/large", tmp_path / "source", after_parts=1)
        [unfinished] = storage.unfinished()
        storage.abort(unfinished)
        storage.abort(unfinished)
        assert list(storage.unfinished()) == []

    def test_unfinished_uploads_of_other_prefixes_are_not_ours(self, storage: Storage, tmp_path: Path) -> None:
        (tmp_path / "source").write_bytes(bytes(16 * MiB))
        upload_and_die(storage, "a/large", tmp_path / "source", after_parts=1)
        settings = storage.settings  # type: ignore[attr-defined]
        assert list(open_storage(f"{storage.uri}/b", settings).unfinished()) == []
        [found] = open_storage(f"{storage.uri}/a", settings).unfinished()
        assert found.path == "large"

    @pytest.mark.parametrize("mode", ["when_required", "when_supported"])
    def test_both_checksum_modes_write_and_read(self, storage: Storage, tmp_path: Path, mode: str) -> None:
        content = random.Random(0).randbytes(11 * MiB)
        (tmp_path / "source").write_bytes(content)
        settings = storage.settings.model_copy(update={"checksum_mode": mode})  # type: ignore[attr-defined]
        other = open_storage(storage.uri, settings)
        other.put("small", b"x")
        sha256 = other.upload("large", tmp_path / "source")
        assert other.get("small") == b"x"
        assert other.get("large", sha256=sha256) == content
        other.download("large", tmp_path / "target", sha256=sha256)

    def test_list_goes_on_past_one_page(self, storage: Storage) -> None:
        paths = put_many(storage, 2500)
        assert [found.path for found in storage.list("many/")] == paths

    @pytest.fixture
    def sent(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The operations that this process asks of the store."""
        operations: list[str] = []
        call = S3Connection.call

        def call_and_note(self: S3Connection, operation: str, **arguments: Any) -> Any:
            operations.append(operation)
            return call(self, operation, **arguments)

        monkeypatch.setattr(S3Connection, "call", call_and_note)
        return operations


class RealS3Conformance(S3Conformance):
    """What moto does not keep: it answers 500 to whatever names an upload that it does not know, and dates all uploads 2010."""

    def test_unfinished_upload_says_when_it_was_begun(self, storage: Storage, tmp_path: Path) -> None:
        (tmp_path / "source").write_bytes(bytes(16 * MiB))
        before = time.time()
        upload_and_die(storage, "large", tmp_path / "source", after_parts=1)
        [found] = storage.unfinished()
        assert before - 2 < found.started_at < time.time() + 2

    @pytest.mark.parametrize("before", ["upload_part", "complete_multipart_upload"])
    def test_upload_that_is_aborted_meanwhile_begins_anew(
        self, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
    ) -> None:
        content = random.Random(0).randbytes(11 * MiB)
        (tmp_path / "source").write_bytes(content)
        call = S3Connection.call
        aborted: list[str] = []

        def call_and_abort(self: S3Connection, operation: str, **arguments: Any) -> Any:
            if operation == before and not aborted:
                aborted.append(arguments["UploadId"])
                call(self, "abort_multipart_upload", Key=arguments["Key"], UploadId=arguments["UploadId"])
            return call(self, operation, **arguments)

        monkeypatch.setattr(S3Connection, "call", call_and_abort)
        storage.upload("large", tmp_path / "source")
        assert aborted
        assert storage.get("large") == content

    def test_two_uploads_of_one_file_at_once_both_end_well(self, storage: Storage, tmp_path: Path) -> None:
        content = random.Random(0).randbytes(11 * MiB)
        (tmp_path / "source").write_bytes(content)
        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(lambda _: storage.upload("large", tmp_path / "source"), range(2)))
        assert both == [hashlib.sha256(content).hexdigest()] * 2
        assert storage.get("large") == content


_DYING_UPLOAD = """
import os, pickle, signal, sys
from pathlib import Path
from model_core.storage.s3_connection import S3Connection

storage, path, source, left = pickle.load(sys.stdin.buffer)
call = S3Connection.call

def call_and_die(self, operation, **arguments):
    global left
    answer = call(self, operation, **arguments)
    left -= operation == "upload_part"
    if left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer

S3Connection.call = call_and_die
storage.upload(path, source)
"""


def upload_and_die(storage: Storage, path: str, source: Path, *, after_parts: int) -> None:
    """An upload by a process that gets SIGKILL as soon as the store has that many parts."""
    done = subprocess.run([sys.executable, "-c", _DYING_UPLOAD], input=pickle.dumps((storage, path, source, after_parts)), check=False)
    assert done.returncode == -signal.SIGKILL
