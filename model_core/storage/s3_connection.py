"""Requests to one S3 bucket: the client, what is sent again and for how long, and what each refusal means."""

from __future__ import annotations

import io
import itertools
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from model_core.storage.errors import CorruptError, NotFoundError, StorageError
from model_core.storage.settings import S3Settings

Result = TypeVar("Result")

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 5.0
_CONNECTIONS = 16
_PASSING_STATUS = (429, 500, 502, 503, 504)
_PASSING_CODES = ("IncompleteBody", "InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling")
_DAMAGED_CODES = ("BadDigest", "XAmzContentSHA256Mismatch")  # bytes that changed on their way, and the store noticed
_DENIED_CODES = (
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
    "XAdminUserNotFound",  # versitygw's name for an unknown access key
)


class S3Connection:
    """Requests to `bucket`. Can be pickled and used after a fork: each process has its own sockets."""

    def __init__(self, bucket: str, settings: S3Settings) -> None:
        self.bucket, self.settings = bucket, settings
        self._owner: int | None = None
        self._connected: Any = None

    def call(self, operation: str, *, stream: bytes | None = None, **arguments: Any) -> Any:
        """The answer to one request, sent again for `retry_seconds` while the server is away. Raises botocore's errors.

        `stream` is its body. It goes as a stream: bytes sent as one piece would have to leave within one connect time-out.
        """

        def request() -> Any:
            body = {} if stream is None else {"Body": io.BytesIO(stream)}
            return getattr(self._client, operation)(Bucket=self.bucket, **arguments, **body)

        return repeated(request, seconds=self.settings.retry_seconds)

    def read(self, key: str, **arguments: Any) -> tuple[bytes, Any]:
        """The bytes and the answer of a GET, whole: a body that breaks off is asked for again."""

        def request() -> tuple[bytes, Any]:
            answer = self._client.get_object(Bucket=self.bucket, Key=key, **arguments)
            return bytes(answer["Body"].read()), answer

        return repeated(request, seconds=self.settings.retry_seconds)

    @contextmanager
    def errors(self, name: str) -> Iterator[None]:
        """Turns what botocore and the disk raise into a StorageError about `name`, the whole uri of an object."""
        from botocore.exceptions import BotoCoreError, ClientError, FlexibleChecksumError, NoCredentialsError
        from botocore.parsers import ResponseParserError

        try:
            yield
        except ClientError as error:
            if code(error) == "NoSuchBucket":
                raise StorageError(f"{name}: the bucket {self.bucket} does not exist") from error
            if code(error) == "NoSuchUpload":
                raise StorageError(f"{name}: its upload was ended by another process") from error
            if code(error) == "QuotaExceeded":  # Ceph's way to say that there is no room; a 403, but no question of rights
                raise StorageError(f"{name}: the store has no room left for this key ({code(error)})") from error
            if status(error) in (401, 403) or code(error) in _DENIED_CODES:
                raise StorageError(
                    f"{name}: access denied ({code(error)}); credentials come from the AWS chain: key variables, a profile or a pod role"
                ) from error
            if code(error) == "NoSuchKey":  # a 404 can be about a bucket, an upload or, from versitygw, an unknown access key
                raise NotFoundError(f"{name}: not found") from error
            raise StorageError(f"{name}: {error}") from error
        except NoCredentialsError as error:
            raise StorageError(f"{name}: no AWS credentials found; allowed are key variables, a profile or a pod role") from error
        except FlexibleChecksumError as error:
            raise CorruptError(f"{name}: {error}") from error
        except (BotoCoreError, ResponseParserError, OSError) as error:
            raise StorageError(f"{name}: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_owner": None, "_connected": None}

    @property
    def _client(self) -> Any:
        if self._owner != os.getpid():
            self._connected, self._owner = _connect(self.settings), os.getpid()
        return self._connected


def repeated(request: Callable[[], Result], *, seconds: float) -> Result:
    """What `request` returns; it is made again, with growing random pauses, while it fails in a way that passes.

    The last attempt begins no later than `seconds` after the first. botocore's own retries are off: their number and pauses
    change between its releases (5 attempts are over in less than a second), and a quota for the whole client ends them early.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    deadline = time.monotonic() + seconds
    for attempt in itertools.count():
        try:
            return request()
        except (BotoCoreError, ClientError, ResponseParserError) as error:
            pause = random.uniform(0.5, 1.0) * min(_FIRST_PAUSE_SECONDS * 2**attempt, _LONGEST_PAUSE_SECONDS)
            if not _passes(error) or time.monotonic() + pause > deadline:
                raise
            time.sleep(pause)
    raise AssertionError("counting has no end")


def status(error: Any) -> int:
    """HTTP status of a ClientError."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code(error: Any) -> str:
    """S3's name for a ClientError."""
    return str(error.response.get("Error", {}).get("Code", ""))


def _passes(error: Exception) -> bool:
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError, IncompleteReadError
    from botocore.parsers import ResponseParserError  # an answer that was cut short

    if isinstance(error, ClientError):
        return status(error) in _PASSING_STATUS or code(error) in (*_PASSING_CODES, *_DAMAGED_CODES)
    return isinstance(error, ConnectionError | HTTPClientError | IncompleteReadError | ResponseParserError)


def _connect(settings: S3Settings) -> Any:
    import boto3
    from botocore.config import Config

    session = boto3.session.Session()
    return session.client(
        "s3",
        endpoint_url=settings.endpoint_url,
        region_name=settings.region or session.region_name or "us-east-1",
        config=Config(
            connect_timeout=settings.connect_timeout_seconds,
            read_timeout=settings.read_timeout_seconds,
            retries={"mode": "standard", "total_max_attempts": 1},
            s3={"addressing_style": settings.addressing_style},
            request_checksum_calculation=settings.checksum_mode,
            response_checksum_validation=settings.checksum_mode,
            max_pool_connections=_CONNECTIONS,
        ),
    )
