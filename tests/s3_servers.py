"""S3 servers that tests start, stop and kill, each in a folder and on a port of its own; here versitygw, in rgw.py Ceph's."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from model_core.storage import S3Settings, Storage, open_storage

ACCESS_KEY, SECRET_KEY = "testaccesskey", "testsecretkey"
BUCKET = "darkroom"
START_SECONDS = 90


class Server(Protocol):
    """What the tests do to a server."""

    endpoint: str

    def start(self) -> None:
        """Returns when the server answers; what it stored before is there."""

    def signal(self, number: signal.Signals) -> None:
        """To the process that speaks S3."""

    def stop(self) -> None:
        """Everything that was started."""


class Process:
    """A program that was started here, and is stopped by its own pid."""

    def __init__(self, *command: str, log: Path) -> None:
        with log.open("ab") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        self.log = log

    def signal(self, number: signal.Signals) -> None:
        """Send it; after a SIGKILL the process is gone when this returns."""
        self._process.send_signal(number)
        if number == signal.SIGKILL:
            self._process.wait()

    def check(self) -> None:
        """Fails with the end of its log when it has ended."""
        if self._process.poll() is not None:
            pytest.fail(f"{self._process.args} ended with {self._process.returncode}: {self.log.read_text(errors='replace')[-2000:]}")


class Versitygw:
    """The lab's S3 server, with its objects as files of `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self._process: Process | None = None

    def start(self) -> None:
        command = (require("versitygw"), "--access", ACCESS_KEY, "--secret", SECRET_KEY, "--quiet", "--port", f"127.0.0.1:{self._port}")
        self._process = Process(*command, "posix", str(self._folder), log=self._folder.with_suffix(".log"))
        wait_until_it_answers(self.endpoint, self._process)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.signal(number)

    def stop(self) -> None:
        if self._process is not None:
            self.signal(signal.SIGKILL)


AnyServer = TypeVar("AnyServer", bound=Server)


def running(server: AnyServer) -> Iterator[AnyServer]:
    """A server with a bucket, for as long as a fixture lasts."""
    try:
        server.start()
        admin(server.endpoint).create_bucket(Bucket=BUCKET)
        yield server
    finally:
        server.stop()


def new_uri() -> str:
    """A prefix in the servers' bucket that nothing is below yet."""
    return f"s3://{BUCKET}/test-{uuid.uuid4().hex}"


def open_at(uri: str, endpoint: str, **settings: Any) -> Storage:
    """A store with time-outs that a test can wait for, and parts of 5 MiB."""
    quick = {"connect_timeout_seconds": 1, "read_timeout_seconds": 3, "retry_seconds": 10, "multipart_bytes": 5 << 20}
    return open_storage(uri, S3Settings(endpoint_url=endpoint, **(quick | settings)))


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails when the body takes longer."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


def require(program: str) -> str:
    """Where a program is; the test is skipped without it, and fails where it must be there (CI with REQUIRE_LAB=1)."""
    path = shutil.which(program)
    if path is None:
        reason = f"NO {program.upper()}: there is no such program, so nothing here was checked against its S3 server"
        if os.environ.get("CI") == "true" and os.environ.get("REQUIRE_LAB") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def wait_until_it_answers(endpoint: str, process: Process) -> None:
    """Until a bucket can be listed for; fails with the log of a process that ended."""
    client = admin(endpoint)
    deadline = time.monotonic() + START_SECONDS
    while True:
        process.check()
        try:
            client.list_buckets()
            return
        except (BotoCoreError, ClientError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def admin(endpoint: str) -> Any:
    """A client of boto3 with the key of the server's owner, for what storage does not do: making buckets."""
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=30),
    )
