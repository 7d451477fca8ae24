"""What every store promises, as tests of a `storage` fixture: the modules that import this give it one store or another."""

from __future__ import annotations

import hashlib
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model_core.storage import ConflictError, CorruptError, NotFoundError, Stat, Storage

MiB = 1 << 20


class StorageConformance:
    def test_get_returns_what_put_wrote_and_a_second_put_replaces_it(self, storage: Storage) -> None:
        storage.put("a/b.bin", b"first")
        storage.put("a/b.bin", b"second")
        assert storage.get("a/b.bin") == b"second"

    def test_empty_object_is_an_object(self, storage: Storage) -> None:
        storage.put("empty", b"")
        assert storage.get("empty") == b""
        assert storage.stat("empty").size == 0

    @pytest.mark.parametrize(
        ("start", "length", "expected"),
        [(0, 3, b"012"), (4, 2, b"45"), (7, None, b"789"), (None, 2, b"01"), (8, 10, b"89"), (10, None, b""), (50, 1, b""), (3, 0, b"")],
    )
    def test_range_reads_like_a_slice(self, storage: Storage, start: int | None, length: int | None, expected: bytes) -> None:
        storage.put("digits", b"0123456789")
        assert storage.get("digits", start=start, length=length) == expected

    def test_negative_range_is_refused(self, storage: Storage) -> None:
        with pytest.raises(ValueError, match="start -1"):
            storage.get("digits", start=-1)

    def test_missing_object_is_named_with_its_whole_uri(self, storage: Storage, tmp_path: Path) -> None:
        storage.put("folder/object", b"x")
        for path in ("nothing", "folder", "folder/nothing"):
            with pytest.raises(NotFoundError, match=f"{storage.uri}/{path}: not found"):
                storage.get(path)
            with pytest.raises(NotFoundError, match=f"{storage.uri}/{path}: not found"):
                storage.stat(path)
            with pytest.raises(NotFoundError):
                storage.get(path, start=0, length=0)
            with pytest.raises(NotFoundError):
                storage.download(path, tmp_path / "target")
        assert list(tmp_path.glob("**/.target*")) == []  # nothing half-written is left

    def test_create_only_put_keeps_the_first(self, storage: Storage) -> None:
        storage.put("claim", b"winner", create_only=True)
        with pytest.raises(ConflictError, match=f"{storage.uri}/claim: exists already"):
            storage.put("claim", b"loser", create_only=True)
        assert storage.get("claim") == b"winner"

    def test_create_only_put_has_one_winner_in_a_race(self, storage: Storage) -> None:
        def claim(number: int) -> int | None:
            try:
                storage.put("race", str(number).encode(), create_only=True)
            except ConflictError:
                return None
            return number

        with ThreadPoolExecutor(8) as pool:
            winners = [number for number in pool.map(claim, range(8)) if number is not None]
        assert [str(number).encode() for number in winners] == [storage.get("race")]

    def test_if_match_replaces_only_the_object_it_names(self, storage: Storage) -> None:
        first = storage.put("pointer", b"1")
        assert storage.stat("pointer").etag == first
        second = storage.put("pointer", b"2", if_match=first)
        assert second != first
        with pytest.raises(ConflictError, match=f"{storage.uri}/pointer: was changed"):
            storage.put("pointer", b"3", if_match=first)
        assert storage.get("pointer") == b"2"
        with pytest.raises(ConflictError):
            storage.put("absent", b"x", if_match=first)
        with pytest.raises(NotFoundError):
            storage.stat("absent")

    @pytest.mark.parametrize("size", [0, 1000, 11 * MiB])
    def test_upload_then_download_is_the_same_file(self, storage: Storage, tmp_path: Path, size: int) -> None:
        content = (b"0123456789abcde" * (size // 15 + 1))[:size]
        (tmp_path / "source").write_bytes(content)
        sha256 = storage.upload("big/file", tmp_path / "source")
        assert sha256 == hashlib.sha256(content).hexdigest()
        assert storage.stat("big/file").size == size
        storage.download("big/file", tmp_path / "new" / "target", sha256=sha256)
        assert (tmp_path / "new" / "target").read_bytes() == content
        assert [file.name for file in (tmp_path / "new").iterdir()] == ["target"]

    def test_upload_of_a_missing_file_writes_nothing(self, storage: Storage, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            storage.upload("object", tmp_path / "missing")
        with pytest.raises(NotFoundError):
            storage.stat("object")

    @pytest.mark.parametrize("start", [None, 3])
    def test_get_checks_the_bytes_it_was_asked_for(self, storage: Storage, start: int | None) -> None:
        storage.put("digits", b"0123456789")
        expected = b"0123456789"[start:]
        assert storage.get("digits", start=start, sha256=hashlib.sha256(expected).hexdigest()) == expected
        with pytest.raises(CorruptError, match=f"{storage.uri}/digits: .*found {len(expected)} bytes with sha256 .*, expected sha256 ffff"):
            storage.get("digits", start=start, sha256="f" * 64)

    def test_download_of_other_bytes_leaves_the_target_as_it_was(self, storage: Storage, tmp_path: Path) -> None:
        storage.put("object", b"found")
        (tmp_path / "target").write_bytes(b"before")
        with pytest.raises(CorruptError, match=f"{storage.uri}/object: .*found 5 bytes"):
            storage.download("object", tmp_path / "target", sha256=hashlib.sha256(b"other").hexdigest())
        assert (tmp_path / "target").read_bytes() == b"before"
        assert list(tmp_path.glob(".target*")) == []

    def test_what_is_no_sha256_is_refused(self, storage: Storage, tmp_path: Path) -> None:
        storage.put("object", b"x")
        for sha256 in ("", "F" * 64, "sha256:" + "f" * 57):
            with pytest.raises(ValueError, match="is no sha256"):
                storage.get("object", sha256=sha256)
            with pytest.raises(ValueError, match="is no sha256"):
                storage.download("object", tmp_path / "target", sha256=sha256)

    def test_store_at_rest_has_nothing_unfinished(self, storage: Storage, tmp_path: Path) -> None:
        (tmp_path / "source").write_bytes(bytes(11 * MiB))
        storage.upload("large", tmp_path / "source")
        storage.put("small", b"x")
        assert list(storage.unfinished()) == []

    def test_list_goes_through_folders_in_byte_order_and_takes_any_prefix(self, storage: Storage) -> None:
        paths = ["a/1", "a/2/x", "a-b/1", "ab", "b/\u00e9.txt", "b/z"]
        for path in paths:
            storage.put(path, path.encode())
        expected = sorted(paths, key=str.encode)
        assert [found.path for found in storage.list()] == expected
        assert [found.path for found in storage.list("a")] == [path for path in expected if path.startswith("a")]
        assert [found.path for found in storage.list("a/")] == ["a/1", "a/2/x"]
        assert list(storage.list("none/")) == []
        assert list(storage.list("ab")) == [Stat("ab", 2, storage.stat("ab").etag)]

    def test_delete_is_final_and_repeatable(self, storage: Storage) -> None:
        storage.put("gone", b"x")
        storage.delete("gone")
        storage.delete("gone")
        storage.delete("never/was")
        assert list(storage.list()) == []

    @pytest.mark.parametrize("path", ["", "/etc/passwd", "../up", "a//b", "a/./b", "a/", "a\nb"])
    def test_what_is_no_object_path_is_refused(self, storage: Storage, path: str) -> None:
        for call in (storage.get, storage.stat, storage.delete, storage.local_path, lambda name: storage.put(name, b"")):
            with pytest.raises(ValueError, match="is no object path"):
                call(path)

    @pytest.mark.parametrize("prefix", ["/etc/", "../up", "a//b"])
    def test_what_no_object_path_starts_with_is_refused(self, storage: Storage, prefix: str) -> None:
        with pytest.raises(ValueError, match="is no object path"):
            list(storage.list(prefix))

    def test_copy_in_another_process_reaches_the_same_objects(self, storage: Storage) -> None:
        storage.put("shared", b"x")
        assert pickle.loads(pickle.dumps(storage)).get("shared") == b"x"


def put_many(storage: Storage, count: int) -> list[str]:
    """`count` small objects below `many/`, and their paths in order."""
    paths = [f"many/{number:05}" for number in range(count)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda path: storage.put(path, b"x"), paths))
    return paths
