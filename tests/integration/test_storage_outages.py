"""Servers that are killed or stopped, and disks that are full, in the middle of a write."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest

from model_core.storage import NotFoundError, Storage, StorageError, open_storage
from model_core.storage.s3_connection import S3Connection
from tests.rgw import Rgw
from tests.s3_servers import ACCESS_KEY, SECRET_KEY, Server, Versitygw, new_uri, open_at, running, within

pytestmark = pytest.mark.lab

MiB = 1 << 20
CONTENT = random.Random(0).randbytes(21 * MiB)  # five parts
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").write_bytes(CONTENT)
    return tmp_path / "source"


@pytest.mark.parametrize("name", ["versitygw", "rgw"])
def test_server_killed_in_the_middle_of_an_upload_loses_nothing(
    request: pytest.FixtureRequest, name: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server: Server = request.getfixturevalue(name)
    storage = open_at(new_uri(), server.endpoint, retry_seconds=30)
    storage.put("before", b"x")

    def kill_and_restart() -> None:
        server.signal(signal.SIGKILL)
        time.sleep(2)
        server.start()

    after_two_parts(monkeypatch, kill_and_restart)
    with within(15):
        assert storage.upload("object", source) == SHA256
    assert storage.get("object", sha256=SHA256) == CONTENT
    assert storage.get("before") == b"x"
    assert list(storage.unfinished()) == []


def test_both_servers_stopped_for_20_seconds_lose_nothing(
    request: pytest.FixtureRequest, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers: list[Server] = [request.getfixturevalue(name) for name in ("versitygw", "rgw")]
    stores = [open_at(new_uri(), server.endpoint, retry_seconds=60) for server in servers]
    etags = [store.put("claim", b"before") for store in stores]

    def stop_and_go_on() -> None:
        for server in servers:
            server.signal(signal.SIGSTOP)
        time.sleep(20)
        for server in servers:
            server.signal(signal.SIGCONT)

    stopping = threading.Thread(target=stop_and_go_on)
    after_two_parts(monkeypatch, stopping.start)
    with within(35), ThreadPoolExecutor(4) as pool:
        uploads = [pool.submit(store.upload, "object", source) for store in stores]
        while not stopping.is_alive():
            time.sleep(0.01)
        puts = [pool.submit(store.put, "claim", b"after", if_match=etag) for store, etag in zip(stores, etags, strict=True)]
        assert [upload.result() for upload in uploads] == [SHA256] * 2
        assert [put.result() for put in puts] == [store.stat("claim").etag for store in stores]
    stopping.join()
    for store in stores:
        assert store.get("object", sha256=SHA256) == CONTENT
        assert store.get("claim") == b"after"


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A disk of so many MiB."""
    if os.geteuid() != 0:
        pytest.skip("NO ROOT: a disk that is full was not tried, because only root can mount one")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={request.param}m", "none", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def check_full_disk(store: Storage, source: Path, tmp_path: Path, *, counted: Callable[[], None] = lambda: None) -> None:
    """There is room for one upload and not for the other: that one fails, and what stood there stays.

    `counted` waits until the store knows how much it holds.
    """
    part = tmp_path / "part"
    part.write_bytes(CONTENT[: 11 * MiB])
    first = store.upload("first", part)
    counted()
    for write in (lambda: store.upload("second", source), lambda: store.put("second", CONTENT[: 14 * MiB])):
        with within(10), pytest.raises(StorageError, match=f"^{store.uri}/second: "):
            write()
    with pytest.raises(NotFoundError):
        store.stat("second")
    assert store.get("first", sha256=first) == CONTENT[: 11 * MiB]
    for left in store.unfinished():
        store.abort(left)
    assert store.get("again", sha256=store.upload("again", part)) == CONTENT[: 11 * MiB]


@pytest.mark.parametrize("small_disk", [24], indirect=True)
def test_full_disk_below_a_folder_loses_nothing(small_disk: Path, source: Path, tmp_path: Path) -> None:
    check_full_disk(open_storage((small_disk / "store").as_uri()), source, tmp_path)


@pytest.mark.parametrize("small_disk", [40], indirect=True)  # versitygw joins the parts by copying them
def test_full_disk_below_a_server_loses_nothing(small_disk: Path, source: Path, tmp_path: Path) -> None:
    (small_disk / "objects").mkdir()
    for server in running(Versitygw(small_disk / "objects")):
        check_full_disk(open_at(new_uri(), server.endpoint, retry_seconds=1), source, tmp_path)


def test_no_room_left_in_ceph_loses_nothing(rgw: Rgw, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gateway refuses by quota. A store of Ceph that is really full makes writers wait instead: that ends by time-out."""
    rgw.limit("limited", max_bytes=24 * MiB)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "limited")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "limited")
    boto3.client("s3", endpoint_url=rgw.endpoint, region_name="us-east-1").create_bucket(Bucket="limited")
    store = open_at("s3://limited/x", rgw.endpoint)
    check_full_disk(store, source, tmp_path, counted=lambda: rgw.wait_until_counted("limited", 11 * MiB))


def after_two_parts(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Calls `act` once, when the second part of an upload has arrived."""
    call = S3Connection.call
    arrived: list[int] = []

    def call_and_act(self: S3Connection, operation: str, **arguments: Any) -> Any:
        answer = call(self, operation, **arguments)
        if operation == "upload_part":
            arrived.append(1)
            if len(arrived) == 2:
                act()
        return answer

    monkeypatch.setattr(S3Connection, "call", call_and_act)
