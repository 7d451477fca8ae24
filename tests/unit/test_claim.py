"""One writer a key: who holds a claim, who may take it over, and what a holder that lost it is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from model_core import claim as claims
from model_core.claim import Claim, ClaimLostError, acquire, current_owner, is_gone, read_claim, take
from model_core.storage import Storage, StorageError, open_storage
from model_core.storage.file import FileStorage

PATH = "step/key/claim.json"
ELSEWHERE = replace(current_owner("theirs"), host="another/boot/namespace")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path.as_uri())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims fall silent after half a second."""
    monkeypatch.setattr(claims, "STALE_SECONDS", 0.5)
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.02)


def claim_of(storage: Storage, **changes: Any) -> Claim | None:
    return acquire(storage, PATH, **({"finished": lambda: False, "on_lost": lambda: None, "say": lambda _: None} | changes))


def taken(storage: Storage, **changes: Any) -> Claim:
    claim = claim_of(storage, **changes)
    assert claim is not None
    return claim


def write(storage: Storage, **changes: Any) -> None:
    storage.put(PATH, json.dumps(asdict(replace(ELSEWHERE, **changes))).encode())


def owner(storage: Storage) -> str:
    return json.loads(storage.get(PATH))["attempt"]


def test_of_those_that_want_a_claim_one_gets_it_at_a_time(storage: Storage, quick: None) -> None:
    holders: list[int] = []
    most: list[int] = []

    def work() -> None:
        with taken(storage):
            holders.append(1)
            most.append(len(holders))
            time.sleep(0.01)
            holders.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8


def test_a_claim_of_a_process_that_died_is_taken_over_at_once(storage: Storage) -> None:
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    storage.put(PATH, json.dumps(asdict(replace(current_owner("theirs"), pid=gone.pid))).encode())
    began = time.monotonic()
    with taken(storage):
        assert time.monotonic() - began < 1
        assert json.loads(storage.get(PATH))["pid"] == os.getpid()


def test_a_living_claim_is_left_alone_however_wrong_its_clock_is(storage: Storage, quick: None) -> None:
    write(storage)
    began = time.monotonic()
    beats = 0

    def finished() -> bool:
        nonlocal beats
        beats += 1
        write(storage, heartbeat=1.0, num_heartbeats=beats)  # a clock that stands still in 1970
        return time.monotonic() - began > 1.2

    assert claim_of(storage, finished=finished) is None
    assert owner(storage) == "theirs"


def test_a_claim_that_stays_unchanged_is_taken_over_however_wrong_its_clock_is(storage: Storage, quick: None) -> None:
    write(storage, heartbeat=time.time() + 1e6)
    began = time.monotonic()
    with taken(storage) as claim:
        assert 0.5 <= time.monotonic() - began < 5
        assert owner(storage) == claim.attempt


@pytest.mark.parametrize("changes", [{"host": current_owner("").host + "x"}, {"process_started": ""}], ids=["other namespace", "no /proc"])
def test_a_process_that_cannot_be_seen_is_not_taken_for_dead(changes: dict[str, Any]) -> None:
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    dead = replace(current_owner("theirs"), pid=gone.pid)
    assert is_gone(dead)
    assert not is_gone(replace(dead, **changes))


def test_a_claim_of_another_version_is_waited_for(storage: Storage, quick: None) -> None:
    storage.put(PATH, b'{"who": "a later version"}')
    said: list[str] = []
    with taken(storage, say=said.append):
        assert said == ["waiting for another version of this program, which is doing this step"]


def test_a_holder_that_was_taken_over_is_told_when_it_confirms(storage: Storage) -> None:
    mine = take(storage, PATH, etag=None, on_lost=lambda: None)
    assert mine is not None
    mine.confirm()
    write(storage)
    with pytest.raises(ClaimLostError, match=f"{storage.uri}/{PATH}: another process has taken this claim over"):
        mine.confirm()


def test_a_holder_that_was_taken_over_leaves_the_new_owners_claim_in_place(storage: Storage) -> None:
    with taken(storage):
        write(storage)
    assert owner(storage) == "theirs"


def test_a_holder_whose_claim_was_removed_is_told(storage: Storage) -> None:
    mine = taken(storage)
    storage.delete(PATH)
    with pytest.raises(ClaimLostError):
        mine.confirm()


def test_the_heartbeat_tells_a_holder_that_was_taken_over(storage: Storage, quick: None) -> None:
    lost = threading.Event()
    with taken(storage, on_lost=lost.set):
        write(storage)
        assert lost.wait(5)


class Unsteady(FileStorage):
    """A store that can be away, or do what it was told and lose the answer."""

    fault = ""

    def put(self, path: str, data: bytes, *, create_only: bool = False, if_match: str | None = None) -> str:
        if self.fault == "away":
            raise StorageError(f"{self.uri}/{path}: connection refused")
        etag = super().put(path, data, create_only=create_only, if_match=if_match)
        if self.fault == "answer lost":
            raise StorageError(f"{self.uri}/{path}: timed out")
        return etag


def test_a_heartbeat_whose_answer_was_lost_does_not_cost_the_claim(tmp_path: Path) -> None:
    storage = Unsteady(tmp_path)
    mine = taken(storage)
    storage.fault = "answer lost"
    with pytest.raises(StorageError, match="timed out"):
        mine.confirm()
    storage.fault = ""
    mine.confirm()
    assert owner(storage) == mine.attempt


def test_a_store_that_was_away_does_not_cost_a_claim_that_nobody_wanted(
    tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    storage, lost = Unsteady(tmp_path), threading.Event()
    with taken(storage, on_lost=lost.set) as mine:
        storage.fault = "away"
        time.sleep(1.0)  # twice as long as a claim may be silent
        storage.fault = ""
        mine.confirm()
    assert not lost.is_set()
    assert "heartbeat failed" in capsys.readouterr().err
    assert read_claim(storage, PATH) is None


def test_a_store_that_is_away_when_a_claim_is_given_back_hides_no_failure_of_the_step(tmp_path: Path) -> None:
    storage = Unsteady(tmp_path)

    def work() -> None:
        with taken(storage):
            storage.fault = "away"
            raise RuntimeError("the step's own")

    with pytest.raises(RuntimeError, match="the step's own"):
        work()


def test_waiting_for_a_claim_ends_when_somebody_else_has_finished(storage: Storage, quick: None) -> None:
    write(storage)
    answers = iter([False, False, True])
    said: list[str] = []
    assert claim_of(storage, finished=lambda: next(answers), say=said.append) is None
    assert said == [f"waiting for process {ELSEWHERE.pid} on another, which is doing this step"]


def test_a_claim_that_was_given_back_after_the_work_was_done_is_not_worth_having(storage: Storage) -> None:
    answers = iter([False, True])  # finished between the look and the claim
    assert claim_of(storage, finished=lambda: next(answers)) is None
    assert read_claim(storage, PATH) is None
