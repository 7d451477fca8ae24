"""What networks do to a store. Each fault is written once, and done to versitygw and to Ceph's gateway."""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model_core.storage import ConflictError, CorruptError, NotFoundError, Storage, StorageError
from tests.faults import Fault, Proxy, answer, cut_answer, flip_received_byte, flip_sent_byte, lose_answer, reset, slow
from tests.s3_servers import ACCESS_KEY, SECRET_KEY, Server, new_uri, open_at, within

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
    return new_uri()


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


IN_ITS_MIDDLE = {"start": b"PUT", "part": b"partNumber=3"}
LAST_REQUEST = {"start": b"POST", "part": b"uploadId="}


@pytest.mark.parametrize(
    ("fault", "request_"),
    [
        *((fault, IN_ITS_MIDDLE) for fault in (answer(500), reset, lose_answer, flip_sent_byte)),
        *((fault, LAST_REQUEST) for fault in (answer(500), lose_answer, cut_answer)),
    ],
)
def test_upload_with_a_fault_in_its_middle_or_at_its_end_arrives_whole(
    storage: Storage, behind: Storage, proxy: Proxy, source: Path, fault: Fault, request_: dict[str, bytes]
) -> None:
    plan = proxy.plan(fault, **request_)
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
        with within(5), pytest.raises(NotFoundError, match=f"^{behind.uri}/nothing: not found"):
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
