"""Row groups: one read each, checked; damage is quarantined and counted, an outage is waited for, never a silent skip."""

import threading
from pathlib import Path

import pytest

from model_core.data.folders import LocalFolder
from model_core.data.latents import latent_group
from model_core.data.row_groups import RowGroups
from model_core.storage import NotFoundError, StorageError
from tests.latent_sets import write_latents


class Remote:
    """The same folder as a store would give it: by ranges. `faults` are raised, or flip a byte, in turn."""

    def __init__(self, root: Path, *faults: Exception | str) -> None:
        self.root, self.faults, self.reads = root, list(faults), []

    def local(self, name: str) -> Path | None:
        return None

    def read(self, name: str, *, start: int, length: int) -> bytes:
        self.reads.append((name, start, length))
        data = (self.root / name).read_bytes()[start : start + length]
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        if fault == "flip":
            return bytes([data[0] ^ 1]) + data[1:]
        return data[:-3] if fault == "cut" else data


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("latents")
    return root, write_latents(root, {"image": 400}, rows_a_group=4)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr("model_core.data.row_groups.PAUSE_SECONDS", 0.0)


def reader(made, shards, *, capacity=200):
    said: list[str] = []
    return RowGroups(shards, made[1], latent_group, capacity=capacity, say=said.append), said


def test_a_remote_group_is_one_ranged_read_and_equal_to_the_local_one(made):
    remote, _ = reader(made, shards := Remote(made[0]))
    local, _ = reader(made, LocalFolder(made[0]))
    for number in (0, 7, 99):
        assert (remote.get(number).latents == local.get(number).latents).all()
        assert remote.get(number).prompts == local.get(number).prompts
    assert len(shards.reads) == remote.num_reads == 3


def test_the_last_used_groups_stay_and_no_more(made):
    groups, _ = reader(made, shards := Remote(made[0]), capacity=2)
    for number in (0, 1, 0, 1, 2, 1, 0):
        groups.get(number)
    assert len(shards.reads) == 4
    assert [groups.has(number) for number in (0, 1, 2)] == [True, True, False]


def test_threads_that_ask_at_once_share_one_read(made):
    groups, _ = reader(made, shards := Remote(made[0]))
    found = []
    threads = [threading.Thread(target=lambda: found.append(groups.get(5))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(shards.reads) == 1
    assert len({id(group) for group in found}) == 1


@pytest.mark.parametrize("fault", ["flip", "cut", NotFoundError("gone for a moment")])
def test_damage_that_passes_is_read_again(made, fault):
    groups, said = reader(made, shards := Remote(made[0], fault, fault))
    assert groups.get(0) is not None
    assert (len(shards.reads), groups.quarantined, said) == (3, {}, [])


@pytest.mark.parametrize(
    ("fault", "told"), [("flip", "changed since"), ("cut", "cut off"), (NotFoundError("part-1: not found"), "not found")]
)
def test_damage_that_stays_is_quarantined_told_and_counted(made, fault, told):
    groups, said = reader(made, Remote(made[0], fault, fault, fault))
    assert groups.get(3) is None
    assert groups.get(3) is None
    assert list(groups.quarantined) == [3]
    assert len(said) == 1
    assert "with 4 rows after 3 reads" in said[0]
    assert told in said[0]
    assert made[1][3].path in said[0]


def test_too_much_damage_stops_the_training(made):
    groups, _ = reader(made, Remote(made[0], *["flip"] * 9))
    assert groups.get(0) is None
    with pytest.raises(StorageError, match="2 of 100 row groups are damaged"):
        groups.get(1)


def test_an_outage_is_waited_for_and_is_no_damage(made):
    outage = StorageError("s3://b/x: connection refused")
    groups, said = reader(made, Remote(made[0], *[outage] * 7))
    assert groups.get(0) is not None
    assert groups.quarantined == {}
    assert len(said) == 7


def test_an_outage_without_end_is_an_error(made, monkeypatch):
    monkeypatch.setattr("model_core.data.row_groups.OUTAGE_SECONDS", 0.0)
    groups, _ = reader(made, Remote(made[0], StorageError("s3://b/x: connection refused")))
    with pytest.raises(StorageError, match="connection refused"):
        groups.get(0)
    assert groups.get(0) is not None  # and the store's return is noticed


def test_a_flipped_byte_on_disk_is_found(tmp_path):
    index = write_latents(tmp_path, {"image": 400}, rows_a_group=4)
    path = tmp_path / index[2].path
    data = bytearray(path.read_bytes())
    data[index[2].offset + 40] ^= 1
    path.write_bytes(data)
    groups, said = reader((tmp_path, index), LocalFolder(tmp_path))
    assert groups.get(2) is None
    assert groups.get(1) is not None
    assert "changed since it was written" in said[0]
