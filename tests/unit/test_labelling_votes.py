"""The file of votes: what was taken is never lost, and what a killed process left unfinished is told and moved away."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from model_core.data.preferences import RUBRIC_VERSION
from model_core.data.rubrics import INVALID_REASONS, RUBRICS, SCALE
from model_core.data.votes import Vote, vote_line
from model_core.documents import UserError
from model_core.recipe import DIMENSIONS
from pipelines.labelling.votes_file import VotesFile

VOTE = Vote(
    pair_id="p",
    dimension="alignment",
    label="a",
    annotator="Zoë",
    scores={"a": 5, "b": 2},
    rubric_version=RUBRIC_VERSION,
    reason=None,
    time="2026-11-21T09:30:00+00:00",
)
OTHER = replace(VOTE, pair_id="q", label="invalid", scores=None, reason="broken")


def read(path: Path) -> list[Vote]:
    file = VotesFile(path)
    file.close()
    return file.votes


def test_record_is_one_line_of_json_with_the_agreed_fields() -> None:
    line = vote_line(VOTE)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert json.loads(line) == {
        "pair_id": "p",
        "dimension": "alignment",
        "label": "a",
        "annotator": "Zoë",
        "scores": {"a": 5, "b": 2},
        "rubric_version": RUBRIC_VERSION,
        "reason": None,
        "time": "2026-11-21T09:30:00+00:00",
    }


def test_votes_are_added_to_those_of_before(tmp_path: Path) -> None:
    for vote in (VOTE, OTHER):
        file = VotesFile(tmp_path / "a/new/folder/votes.jsonl")
        file.append(vote)
        file.close()
    assert read(tmp_path / "a/new/folder/votes.jsonl") == [VOTE, OTHER]


def test_file_cut_at_any_byte_keeps_every_whole_vote_and_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # hundreds of files: the disk's time is no part of this
    first, second = vote_line(VOTE), vote_line(OTHER)
    for length in range(len(first), len(first + second) + 1):
        path = tmp_path / f"{length}.jsonl"
        path.write_bytes((first + second)[:length])
        file = VotesFile(path)
        is_whole = length >= len(first + second) - 1
        assert file.votes == ([VOTE, OTHER] if is_whole else [VOTE])
        assert (file.repaired is None) == (length in (len(first), len(first + second)))
        aside = Path(f"{path}.torn")
        torn = second[: length - len(first)]
        assert aside.exists() == (bool(torn) and not is_whole)
        if aside.exists():
            assert aside.read_bytes() == torn + b"\n"
        file.append(replace(OTHER, pair_id="r"))
        file.close()
        assert [vote.pair_id for vote in read(path)] == (["p", "q", "r"] if is_whole else ["p", "r"])


def test_vote_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = VotesFile(tmp_path / "votes.jsonl")
    file.append(VOTE)
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) <= 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:10])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            file.append(OTHER)
    assert file.votes == [VOTE]
    file.append(OTHER)
    file.close()
    assert read(tmp_path / "votes.jsonl") == [VOTE, OTHER]
    assert not (tmp_path / "votes.jsonl.torn").exists()


def test_vote_is_on_the_disk_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = VotesFile(tmp_path / "votes.jsonl")
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append((tmp_path / "votes.jsonl").read_bytes()))
    file.append(VOTE)
    assert synced == [vote_line(VOTE)]
    file.close()


def test_second_page_on_the_same_file_is_refused(tmp_path: Path) -> None:
    file = VotesFile(tmp_path / "votes.jsonl")
    with pytest.raises(UserError, match="in use by another labelling page"):
        VotesFile(tmp_path / "votes.jsonl")
    file.close()
    assert read(tmp_path / "votes.jsonl") == []


REFUSED = {
    "another rubric version": (json.dumps(json.loads(vote_line(VOTE)) | {"rubric_version": "0"}).encode(), ("line 2", "'0'", "1")),
    "no JSON": (b"{", ("line 2",)),
    "no vote": (b"[]", ("line 2",)),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("end", [b"\n", b"\n" + vote_line(OTHER)])
def test_file_with_something_else_is_refused_and_left_as_it_is(case: str, end: bytes, tmp_path: Path) -> None:
    line, words = REFUSED[case]
    data = vote_line(VOTE) + line + end
    (tmp_path / "votes.jsonl").write_bytes(data)
    with pytest.raises(UserError) as caught:
        VotesFile(tmp_path / "votes.jsonl")
    assert all(word in str(caught.value) for word in (*words, "votes.jsonl"))
    assert (tmp_path / "votes.jsonl").read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["votes.jsonl"]


@pytest.mark.parametrize("place", [".", "/dev/null", "/dev/null/votes.jsonl"])
def test_what_is_no_file_is_refused(place: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="votes"):
        VotesFile(tmp_path / place)


def test_rubric_of_this_version_is_this_text() -> None:
    """Votes on other words are votes of another rubric: with a change raise RUBRIC_VERSION, and then this digest."""
    assert set(RUBRICS) == set(DIMENSIONS)
    text = repr((RUBRICS, SCALE, INVALID_REASONS)).encode()
    assert (RUBRIC_VERSION, hashlib.sha256(text).hexdigest()[:16]) == ("1", "c3fa5a5ae928ee4a")
