"""Results in a bucket: what a loser sends never takes the place of the winner's, and what died attempts sent goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from model_core.claim import ClaimLostError
from model_core.manifest import FileEntry, file_entry
from model_core.publication import clear_unnamed, publish
from model_core.storage import ConflictError
from model_core.storage.file import FileStorage

PREFIX = "step/key"


class Bucket(FileStorage):
    """A store without a folder of its own on this machine, and something that happens right before an upload."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.before_upload: Callable[[], object] = lambda: None

    def local_path(self, path: str) -> Path | None:
        return None

    def upload(self, path: str, source: Path, *, create_only: bool = False, if_match: str | None = None) -> str:
        self.before_upload()
        return super().upload(path, source, create_only=create_only, if_match=if_match)


@pytest.fixture
def bucket(tmp_path: Path) -> Bucket:
    return Bucket(tmp_path / "bucket")


def attempt(folder: Path, files: dict[str, bytes]) -> tuple[FileEntry, ...]:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return tuple(file_entry(folder, folder / name) for name in sorted(files))


def objects(bucket: Bucket) -> dict[str, bytes]:
    return {entry.path.removeprefix(f"{PREFIX}/"): bucket.get(entry.path) for entry in bucket.list()}


def test_the_winners_objects_stay_when_a_loser_sends_its_own_later(bucket: Bucket, tmp_path: Path) -> None:
    slow = attempt(tmp_path / "slow", {"a.bin": b"slow", "b.bin": b"slow"})
    quick = attempt(tmp_path / "quick", {"a.bin": b"quick"})

    def overtake() -> None:
        bucket.before_upload = lambda: None
        assert publish(Bucket(bucket.root), PREFIX, tmp_path / "quick", files=quick, manifest=b"quick", confirm=lambda: None)

    bucket.before_upload = overtake
    with pytest.raises(ConflictError, match="a.bin"):
        publish(bucket, PREFIX, tmp_path / "slow", files=slow, manifest=b"slow", confirm=lambda: None)
    assert objects(bucket) == {"a.bin": b"quick", "manifest.json": b"quick"}


def test_a_loser_stops_at_the_first_object_after_it_lost_its_claim(bucket: Bucket, tmp_path: Path) -> None:
    files = attempt(tmp_path / "mine", {"a.bin": b"mine", "b.bin": b"mine", "c.bin": b"mine"})
    answers = iter([False, True])

    def confirm() -> None:
        if next(answers):
            raise ClaimLostError("taken over")

    with pytest.raises(ClaimLostError):
        publish(bucket, PREFIX, tmp_path / "mine", files=files, manifest=b"mine", confirm=confirm)
    assert objects(bucket) == {"a.bin": b"mine"}


def test_a_finished_step_is_not_published_again(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put(f"{PREFIX}/manifest.json", b"theirs")
    files = attempt(tmp_path / "mine", {"a.bin": b"mine"})
    assert not publish(bucket, PREFIX, tmp_path / "mine", files=files, manifest=b"mine", confirm=lambda: None)
    assert objects(bucket) == {"manifest.json": b"theirs"}


def test_what_an_attempt_that_died_has_sent_is_replaced_and_what_the_manifest_does_not_name_goes(bucket: Bucket, tmp_path: Path) -> None:
    for name in ("a.bin", "part-of-the-dead.bin", "checkpoints/step-00000001/COMMIT.json", "claim.json"):
        bucket.put(f"{PREFIX}/{name}", b"dead")
    files = attempt(tmp_path / "mine", {"a.bin": b"mine"})
    assert publish(bucket, PREFIX, tmp_path / "mine", files=files, manifest=b"mine", confirm=lambda: None)
    clear_unnamed(bucket, PREFIX, named=files)
    assert objects(bucket) == {
        "a.bin": b"mine",
        "checkpoints/step-00000001/COMMIT.json": b"dead",
        "claim.json": b"dead",
        "manifest.json": b"mine",
    }
