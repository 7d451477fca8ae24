"""An S3 bucket as a store, on moto's server in this process. tests/integration/test_storage_lab.py has the same on a real one."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer
from pydantic import ValidationError

from model_core.storage import ConflictError, NotFoundError, S3Settings, Storage, StorageError, open_storage
from tests.storage_conformance import S3Conformance


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
    for call in (lambda: storage.get("a"), lambda: storage.put("a", b"", create_only=True), lambda: list(storage.list())):
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


class BreakingProxy:
    """Forwards to `upstream`; the first answer to a request that starts with `breaks` is cut short or swallowed."""

    def __init__(self, upstream: str, *, breaks: bytes, keep_bytes: int) -> None:
        host, _, port = upstream.removeprefix("http://").partition(":")
        self.upstream, self.breaks, self.keep_bytes = (host, int(port)), breaks, keep_bytes
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.broken = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self.upstream) as server:
            client.settimeout(5)
            request = client.recv(1 << 20)
            while b"\r\n\r\n" not in request:
                request += client.recv(1 << 20)
            head, _, body = request.partition(b"\r\n\r\n")
            length = next((int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")), 0)
            if b"100-continue" in head.lower():
                client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            while len(body) < length:
                body += client.recv(1 << 20)
            lines = [line for line in head.split(b"\r\n") if not line.lower().startswith((b"expect", b"connection"))]
            server.sendall(b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + body)
            answer = b"".join(iter(lambda: server.recv(1 << 20), b""))
            if head.startswith(self.breaks) and not self.broken:
                self.broken += 1
                answer = answer[: self.keep_bytes and answer.index(b"\r\n\r\n") + 4 + self.keep_bytes]
            client.sendall(answer)


@pytest.fixture
def breaking(endpoint: str) -> Iterator[Callable[..., BreakingProxy]]:
    proxies: list[BreakingProxy] = []

    def make(**arguments: Any) -> BreakingProxy:
        proxies.append(BreakingProxy(endpoint, **arguments))
        return proxies[-1]

    yield make
    for proxy in proxies:
        proxy.listener.close()


def test_body_that_breaks_off_is_read_again(storage: Storage, breaking: Callable[..., BreakingProxy], tmp_path: Path) -> None:
    content = bytes(range(256)) * 1000
    storage.put("object", content)
    for read in ("get", "download"):
        proxy = breaking(breaks=b"GET", keep_bytes=1000)
        through = open_storage(storage.uri, S3Settings(endpoint_url=proxy.url))
        if read == "get":
            assert through.get("object") == content
        else:
            through.download("object", tmp_path / "file")
            assert (tmp_path / "file").read_bytes() == content
        assert proxy.broken == 1


@pytest.mark.parametrize("conditional", ["create_only", "if_match"])
def test_conditional_put_whose_answer_was_lost_is_still_ours(
    storage: Storage, breaking: Callable[..., BreakingProxy], conditional: str
) -> None:
    before = storage.put("claim", b"before") if conditional == "if_match" else None
    proxy = breaking(breaks=b"PUT", keep_bytes=0)
    etag = open_storage(storage.uri, S3Settings(endpoint_url=proxy.url)).put(
        "claim", b"mine", create_only=conditional == "create_only", if_match=before
    )
    assert proxy.broken == 1
    assert storage.get("claim") == b"mine"
    assert storage.stat("claim").etag == etag


@pytest.mark.parametrize("document", [{"endpoint": "http://x"}, {"endpoint_url": "ftp://x"}, {"multipart_bytes": 1}, {"retry_seconds": -1}])
def test_wrong_settings_are_refused(document: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        S3Settings.model_validate(document)
