"""What networks, disks and servers do to a store. Each fault is written once, and done to versitygw and to Ceph's gateway."""

from __future__ import annotations

import hashlib
import math
import os
import random
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from model_core.storage import ConflictError, CorruptError, NotFoundError, S3Settings, Storage, StorageError, open_storage
from model_core.storage.s3_connection import S3Connection
from tests.faults import Fault, Proxy, answer, cut_answer, flip_received_byte, flip_sent_byte, lose_answer, reset, slow
from tests.s3_servers import ACCESS_KEY, BUCKET, SECRET_KEY, Server, Versitygw, running

pytestmark = pytest.mark.lab

MiB = 1 << 20
CONTENT = random.Random(0).randbytes(21 * MiB)  # five parts
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(params=["versitygw", "rgw"])
def server(request: pytest.FixtureRequest) -> Server:
    server: Server = request.getfixturevalue(request.param)
    return server


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server.endpoint)
    yield proxy
    proxy.close()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)


@pytest.fixture
def uri() -> str:
    return f"s3://{BUCKET}/test-{uuid.uuid4().hex}"


def open_at(uri: str, endpoint: str, **settings: Any) -> Storage:
    quick = {"connect_timeout_seconds": 1, "read_timeout_seconds": 3, "retry_seconds": 10, "multipart_bytes": 5 * MiB}
    return open_storage(uri, S3Settings(endpoint_url=endpoint, **(quick | settings)))


@pytest.fixture
def storage(uri: str, proxy: Proxy) -> Storage:
    """Through the proxy."""
    return open_at(uri, proxy.url)


@pytest.fixture
def behind(uri: str, server: Server) -> Storage:
    """The same objects, past the proxy: what really is there."""
    return open_at(uri, server.endpoint)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").write_bytes(CONTENT)
    return tmp_path / "source"


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails when the body takes longer."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


@pytest.mark.parametrize("fault", [answer(500, "InternalError"), answer(503, "SlowDown"), reset, lose_answer, flip_sent_byte])
def test_put_that_fails_twice_arrives(storage: Storage, behind: Storage, proxy: Proxy, fault: Fault) -> None:
    data = CONTENT[: 2 * MiB]
    plan = proxy.plan(fault, start=b"PUT", times=2)
    with within(5):
        storage.put("object", data, create_only=True)
    assert plan.met == 2
    assert behind.get("object", sha256=hashlib.sha256(data).hexdigest()) == data


@pytest.mark.parametrize("fault", [answer(503, "SlowDown"), reset])
def test_server_that_fails_for_ever_is_given_up_in_time_and_named(
    uri: str, behind: Storage, proxy: Proxy, fault: Fault, source: Path
) -> None:
    storage = open_at(uri, proxy.url, retry_seconds=0.5)
    proxy.plan(fault, start=b"PUT", times=math.inf)
    for write in (lambda: storage.put("object", CONTENT[: 2 * MiB]), lambda: storage.upload("object", source)):
        with within(5), pytest.raises(StorageError, match=f"^{uri}/object: "):
            write()
    assert list(behind.list()) == []


def test_write_over_a_slow_link_takes_longer_than_any_time_out_and_arrives(storage: Storage, behind: Storage, proxy: Proxy) -> None:
    data = CONTENT[: 4 * MiB]
    proxy.plan(slow, start=b"PUT", times=math.inf)
    start = time.monotonic()
    storage.put("object", data)
    assert time.monotonic() - start > 1.1  # longer than the connect time-out, which limits each piece that is sent
    assert behind.get("object") == data


@pytest.mark.parametrize("fault", [answer(500), reset, lose_answer, flip_sent_byte])
def test_upload_with_a_fault_in_its_middle_arrives_whole(
    storage: Storage, behind: Storage, proxy: Proxy, source: Path, fault: Fault
) -> None:
    plan = proxy.plan(fault, start=b"PUT", part=b"partNumber=3")
    with within(10):
        assert storage.upload("object", source) == SHA256
    assert plan.met == 1
    assert behind.get("object", sha256=SHA256) == CONTENT
    assert list(behind.unfinished()) == []


@pytest.mark.parametrize("fault", [answer(500), lose_answer, cut_answer])
def test_upload_whose_last_request_is_in_doubt_ends_well(
    storage: Storage, behind: Storage, proxy: Proxy, source: Path, fault: Fault
) -> None:
    plan = proxy.plan(fault, start=b"POST", part=b"uploadId=")
    with within(10):
        assert storage.upload("object", source) == SHA256
    assert plan.met == 1
    assert behind.get("object", sha256=SHA256) == CONTENT
    assert list(behind.unfinished()) == []


def test_upload_that_was_given_up_goes_on_at_the_next_call(uri: str, proxy: Proxy, source: Path, behind: Storage) -> None:
    storage = open_at(uri, proxy.url, retry_seconds=0)
    proxy.plan(reset, start=b"PUT", part=b"partNumber=5")
    with pytest.raises(StorageError, match=f"^{uri}/object: "):
        storage.upload("object", source)
    again = proxy.plan(answer(500), start=b"PUT", part=b"partNumber=1&")  # never met: the store has this part
    assert storage.upload("object", source) == SHA256
    assert again.met == 0
    assert behind.get("object", sha256=SHA256) == CONTENT


def test_flipped_byte_is_found_and_leaves_no_file(storage: Storage, behind: Storage, proxy: Proxy, source: Path, tmp_path: Path) -> None:
    sha256 = behind.upload("object", source)
    proxy.plan(flip_received_byte, start=b"GET", times=math.inf)
    message = f"^{storage.uri}/object: .*found {len(CONTENT)} bytes with sha256 .*, expected sha256 {sha256[:12]}"
    with pytest.raises(CorruptError, match=message):
        storage.get("object", sha256=sha256)
    with pytest.raises(CorruptError, match=message):
        storage.download("object", tmp_path / "target", sha256=sha256)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_truncated_object_is_found_and_leaves_no_file(behind: Storage, tmp_path: Path) -> None:
    behind.put("object", CONTENT[: 11 * MiB - 1])
    sha256 = hashlib.sha256(CONTENT[: 11 * MiB]).hexdigest()
    for read in (lambda: behind.get("object", sha256=sha256), lambda: behind.download("object", tmp_path / "target", sha256=sha256)):
        with pytest.raises(CorruptError, match=f"^{behind.uri}/object: .*found {11 * MiB - 1} bytes"):
            read()
    assert list(tmp_path.iterdir()) == []


def test_answer_that_always_breaks_off_is_given_up_in_time_and_named(uri: str, behind: Storage, proxy: Proxy, tmp_path: Path) -> None:
    behind.put("object", CONTENT[:MiB])
    storage = open_at(uri, proxy.url, retry_seconds=0.5)
    proxy.plan(cut_answer, start=b"GET", times=math.inf)
    for read in (lambda: storage.get("object"), lambda: storage.download("object", tmp_path / "target")):
        with within(5), pytest.raises(StorageError, match=f"^{uri}/object: "):
            read()
    assert list(tmp_path.iterdir()) == []


def test_missing_object_is_named_at_once(behind: Storage, tmp_path: Path) -> None:
    for read in (lambda: behind.get("nothing"), lambda: behind.stat("nothing"), lambda: behind.download("nothing", tmp_path / "target")):
        with within(1), pytest.raises(NotFoundError, match=f"^{behind.uri}/nothing: not found"):
            read()


def test_one_of_two_committers_wins_each_time(uri: str, server: Server, proxy: Proxy) -> None:
    proxy.plan(lose_answer, start=b"PUT", times=3)  # also for a winner that did not hear of it
    both = [open_at(uri, server.endpoint), open_at(uri, proxy.url)]

    def commit(number: int, name: str) -> bool:
        try:
            both[number].put(name, str(number).encode(), create_only=True)
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        for name in map(str, range(6)):
            won = list(pool.map(commit, range(2), [name] * 2))
            assert sorted(won) == [False, True]
            assert both[0].get(name) == str(won.index(True)).encode()


@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_key_is_refused_at_once_and_no_secret_is_told(
    uri: str, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wrong: str, source: Path
) -> None:
    monkeypatch.setenv(wrong, "a-wrong-key-of-some-length")
    storage = open_at(uri, server.endpoint, retry_seconds=60)
    for call in (
        lambda: storage.get("object"),
        lambda: storage.stat("object"),
        lambda: storage.put("object", b"x", create_only=True),
        lambda: storage.upload("object", source),
        lambda: storage.delete("object"),
    ):
        with within(2), pytest.raises(StorageError, match=f"^{uri}/object: access denied .*come from the AWS chain") as error:
            call()
        told = str(error.value) + caplog.text
        assert "a-wrong-key" not in told
        assert SECRET_KEY not in told


def test_expired_key_is_refused_at_once(storage: Storage, proxy: Proxy) -> None:
    plan = proxy.plan(answer(400, "ExpiredToken"), start=b"PUT", times=math.inf)
    with within(2), pytest.raises(StorageError, match=f"^{storage.uri}/object: access denied .ExpiredToken."):
        storage.put("object", b"x")
    assert plan.met == 1


def test_server_killed_in_the_middle_of_an_upload_loses_nothing(
    uri: str, server: Server, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_at(uri, server.endpoint, retry_seconds=30)
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
    request: pytest.FixtureRequest, uri: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers: list[Server] = [request.getfixturevalue(name) for name in ("versitygw", "rgw")]
    stores = [open_at(uri, server.endpoint, retry_seconds=60) for server in servers]
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


def check_full_disk(store: Storage, source: Path, tmp_path: Path) -> None:
    """There is room for one upload and not for the other: that one fails, and what stood there stays."""
    part = tmp_path / "part"
    part.write_bytes(CONTENT[: 11 * MiB])
    first = store.upload("first", part)
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
def test_full_disk_below_a_server_loses_nothing(small_disk: Path, uri: str, source: Path, tmp_path: Path) -> None:
    (small_disk / "objects").mkdir()
    for server in running(Versitygw(small_disk / "objects")):
        check_full_disk(open_at(uri, server.endpoint, retry_seconds=1), source, tmp_path)


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
