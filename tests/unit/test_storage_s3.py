"""An S3 bucket as a store, on moto's server in this process. tests/integration/test_storage_lab.py has the same on a real one."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer
from pydantic import ValidationError

from model_core.storage import ConflictError, CorruptError, NotFoundError, S3Settings, Storage, StorageError, open_storage
from model_core.storage.s3_connection import S3Connection
from model_core.storage.s3_multipart import part_bytes
from model_core.storage.settings import MiB
from tests.faults import Exchange, Proxy, answer, cut_answer, flip_sent_byte, lose_answer
from tests.s3_conformance import S3Conformance


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing-access-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing-secret-key")


@pytest.fixture
def settings(endpoint: str) -> S3Settings:
    return S3Settings(endpoint_url=endpoint, multipart_bytes=5 << 20)


@pytest.fixture
def storage(settings: S3Settings, request: pytest.FixtureRequest) -> Storage:
    bucket = f"test-{abs(hash(request.node.nodeid)):x}"
    boto3.client("s3", endpoint_url=settings.endpoint_url, region_name="us-east-1").create_bucket(Bucket=bucket)
    return open_storage(f"s3://{bucket}/some/prefix", settings)


class TestMoto(S3Conformance):
    def test_list_goes_on_past_one_page(self, storage: Storage) -> None:
        bucket = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        paths = [f"many/{number:05}" for number in range(2500)]
        for path in paths:  # straight into the server's memory: as many requests would take 8 s
            bucket.put_object(storage.uri.split("/")[2], f"some/prefix/{path}", b"x")
        assert [found.path for found in storage.list("many/")] == paths


def test_large_upload_goes_in_parts(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(11 << 20))
    storage.upload("file", tmp_path / "file")
    assert storage.stat("file").etag.endswith("-3")


def test_missing_bucket_is_not_taken_for_a_missing_object(settings: S3Settings) -> None:
    storage = open_storage("s3://no-such-bucket/x", settings)
    for call in (
        lambda: storage.get("a"),
        lambda: storage.stat("a"),
        lambda: storage.put("a", b"", create_only=True),
        lambda: list(storage.list()),
    ):
        with pytest.raises(StorageError, match="no-such-bucket does not exist") as error:
            call()
        assert not isinstance(error.value, NotFoundError | ConflictError)


def test_unreachable_server_names_object_and_endpoint() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        storage = open_storage("s3://bucket/x", S3Settings(endpoint_url=url, retry_seconds=0, connect_timeout_seconds=1))
        with pytest.raises(StorageError, match=f"s3://bucket/x/a: .*{url}"):
            storage.get("a")


def test_no_credentials_says_where_they_come_from(settings: S3Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(StorageError, match="no AWS credentials found"):
        open_storage("s3://bucket/x", settings).get("a")


@pytest.fixture
def proxy(endpoint: str) -> Iterator[Proxy]:
    proxy = Proxy(endpoint)
    yield proxy
    proxy.close()


@pytest.mark.parametrize("read", ["get", "download"])
def test_body_that_breaks_off_is_read_again(storage: Storage, proxy: Proxy, tmp_path: Path, read: str) -> None:
    content = bytes(range(256)) * 1000
    storage.put("object", content)
    plan = proxy.plan(cut_answer, start=b"GET")
    through = open_storage(storage.uri, S3Settings(endpoint_url=proxy.url))
    if read == "get":
        assert through.get("object") == content
    else:
        through.download("object", tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == content
    assert plan.met == 1


@pytest.mark.parametrize("conditional", ["create_only", "if_match"])
def test_conditional_put_whose_answer_was_lost_is_still_ours(storage: Storage, proxy: Proxy, conditional: str) -> None:
    before = storage.put("claim", b"before") if conditional == "if_match" else None
    plan = proxy.plan(lose_answer, start=b"PUT")
    through = open_storage(storage.uri, S3Settings(endpoint_url=proxy.url))
    etag = through.put("claim", b"mine", create_only=conditional == "create_only", if_match=before)
    assert plan.met == 1
    assert storage.get("claim") == b"mine"
    assert storage.stat("claim").etag == etag


def test_download_is_never_a_mix_of_two_objects(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.put("object", bytes(11 << 20))
    read = S3Connection.read

    def read_and_replace(self: S3Connection, key: str, **arguments: Any) -> tuple[bytes, Any]:
        answer = read(self, key, **arguments)
        if "IfMatch" not in arguments:
            storage.put("object", b"!" * (11 << 20))
        return answer

    monkeypatch.setattr(S3Connection, "read", read_and_replace)
    with pytest.raises(ConflictError, match="object: was replaced by another writer while it was read"):
        storage.download("object", tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_store_that_took_other_bytes_is_found_out(storage: Storage, proxy: Proxy) -> None:
    proxy.plan(flip_sent_byte, start=b"PUT")  # moto compares no md5, so it takes them
    through = open_storage(storage.uri, S3Settings(endpoint_url=proxy.url))
    with pytest.raises(CorruptError, match=f"{storage.uri}/object: sent 4096 bytes with md5 .*, the store got md5 "):
        through.put("object", bytes(4096))


def test_bucket_is_in_the_path_and_checksums_go_where_they_are_wanted(proxy: Proxy) -> None:
    seen: list[bytes] = []

    def note(exchange: Exchange) -> None:
        seen.append(exchange.head)
        answer(503)(exchange)

    proxy.plan(note, start=b"PUT", times=math.inf)
    for mode in ("when_required", "when_supported"):
        with pytest.raises(StorageError):
            open_storage("s3://bucket/x", S3Settings(endpoint_url=proxy.url, checksum_mode=mode, retry_seconds=0)).put("a", b"data")
    assert [head.split(b" ")[1] for head in seen] == [b"/bucket/x/a"] * 2
    assert [b"x-amz-checksum-crc32" in head.lower() for head in seen] == [False, True]


def test_parts_grow_so_that_ten_thousand_are_enough() -> None:
    assert part_bytes(10_000 * 16 * MiB, at_least=16 * MiB) == 16 * MiB
    assert part_bytes(10_000 * 16 * MiB + 1, at_least=16 * MiB) == 17 * MiB


@pytest.mark.parametrize("document", [{"endpoint": "http://x"}, {"endpoint_url": "ftp://x"}, {"multipart_bytes": 1}, {"retry_seconds": -1}])
def test_wrong_settings_are_refused(document: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        S3Settings.model_validate(document)
