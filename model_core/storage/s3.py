"""Objects in an S3 bucket, through boto3."""

from __future__ import annotations

import os
import secrets
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model_core.storage.errors import ConflictError, NotFoundError, StorageError
from model_core.storage.protocol import Stat, check_path, check_prefix, check_range
from model_core.storage.settings import S3Settings

_PARTS_AT_ONCE = 4
_WRITE_ID = "darkroom-write"  # user metadata: tells our own repeated write from another writer's


class S3Storage:
    """Storage below `prefix` of `bucket`. Can be pickled and used after a fork: each process has its own connections."""

    def __init__(self, bucket: str, prefix: str, *, settings: S3Settings) -> None:
        self.bucket, self.prefix, self.settings = bucket, prefix, settings
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._owner: int | None = None
        self._connected: Any = None

    def get(self, path: str, *, start: int | None = None, length: int | None = None) -> bytes:
        offset, count = check_range(start, length)
        if count == 0:
            self.stat(path)
            return b""
        span = {} if start is None and length is None else {"Range": f"bytes={offset}-{'' if count is None else offset + count - 1}"}
        with self._errors(path):
            return self._read(self._object(path), span)

    def put(self, path: str, data: bytes, *, create_only: bool = False, if_match: str | None = None) -> str:
        from botocore.exceptions import ClientError

        condition = {"IfNoneMatch": "*"} if create_only else {"IfMatch": f'"{if_match}"'} if if_match is not None else {}
        write_id = uuid.uuid4().hex
        with self._errors(path):
            try:
                answer = self._client.put_object(**self._object(path), Body=data, Metadata={_WRITE_ID: write_id}, **condition)
            except ClientError as error:
                if not condition or _status(error) not in (404, 409, 412) or _code(error) == "NoSuchBucket":
                    raise
                # A write whose answer was lost is sent again and then meets its own object: that is a success.
                if (mine := self._written_as(path, write_id)) is not None:
                    return mine
                found = "exists already" if create_only else "was changed by another writer"
                raise ConflictError(f"{self.uri}/{path}: {found}") from error
        return str(answer["ETag"]).strip('"')

    def upload(self, path: str, source: Path) -> None:
        target = self._object(path)
        source.resolve(strict=True)  # a missing source is the caller's mistake, not the store's
        with self._errors(path):
            self._client.upload_file(str(source), target["Bucket"], target["Key"], Config=self._transfer())

    def download(self, path: str, target: Path) -> None:
        source = self._object(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        with self._errors(path):
            try:
                with partial.open("wb") as file:
                    self._client.download_fileobj(source["Bucket"], source["Key"], file, Config=self._transfer())
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)

    def stat(self, path: str) -> Stat:
        with self._errors(path):
            answer = self._client.head_object(**self._object(path))
        return Stat(path, int(answer["ContentLength"]), str(answer["ETag"]).strip('"'))

    def list(self, prefix: str = "") -> Iterator[Stat]:
        below = f"{self.prefix}/" if self.prefix else ""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=below + check_prefix(prefix))
        with self._errors(prefix):
            for page in pages:
                for item in page.get("Contents", []):
                    if not item["Key"].endswith("/"):  # a folder marker that some browsers of S3 leave
                        yield Stat(item["Key"].removeprefix(below), int(item["Size"]), str(item["ETag"]).strip('"'))

    def delete(self, path: str) -> None:
        try:
            with self._errors(path):
                self._client.delete_object(**self._object(path))
        except NotFoundError:
            return

    def local_path(self, path: str) -> Path | None:
        check_path(path)
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_owner": None, "_connected": None}

    @property
    def _client(self) -> Any:
        if self._owner != os.getpid():
            self._connected, self._owner = _connect(self.settings), os.getpid()
        return self._connected

    def _object(self, path: str) -> dict[str, str]:
        check_path(path)
        return {"Bucket": self.bucket, "Key": f"{self.prefix}/{path}" if self.prefix else path}

    def _read(self, target: dict[str, str], span: dict[str, str]) -> bytes:
        """Request and read a body. botocore repeats requests that fail, but not a body that breaks off: that is done here."""
        from botocore.exceptions import ClientError, IncompleteReadError, ReadTimeoutError, ResponseStreamingError

        for attempt in range(1, self.settings.max_attempts + 1):
            try:
                return bytes(self._client.get_object(**target, **span)["Body"].read())
            except ClientError as error:
                if _status(error) == 416:  # the range starts past the end
                    return b""
                raise
            except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
                if attempt == self.settings.max_attempts:
                    raise
        raise AssertionError("max_attempts is at least 1")

    def _written_as(self, path: str, write_id: str) -> str | None:
        """The etag of the object when it is the write `write_id`, else None."""
        from botocore.exceptions import ClientError

        try:
            answer = self._client.head_object(**self._object(path))
        except ClientError as error:
            if _status(error) == 404:
                return None
            raise
        return str(answer["ETag"]).strip('"') if answer.get("Metadata", {}).get(_WRITE_ID) == write_id else None

    def _transfer(self) -> Any:
        from boto3.s3.transfer import TransferConfig

        size = self.settings.multipart_bytes
        return TransferConfig(
            multipart_threshold=size,
            multipart_chunksize=size,
            max_concurrency=_PARTS_AT_ONCE,
            num_download_attempts=self.settings.max_attempts,
        )

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

        name = f"{self.uri}/{path}"
        try:
            yield
        except ClientError as error:
            if _code(error) == "NoSuchBucket":
                raise StorageError(f"{name}: the bucket {self.bucket} does not exist") from error
            if _status(error) == 404:
                raise NotFoundError(f"{name}: not found") from error
            if _status(error) in (401, 403):
                raise StorageError(f"{name}: access denied ({_code(error)}); the credentials come from the AWS chain") from error
            raise StorageError(f"{name}: {error}") from error
        except NoCredentialsError as error:
            raise StorageError(f"{name}: no AWS credentials found; allowed are key variables, a profile or a pod role") from error
        except (BotoCoreError, Boto3Error, OSError) as error:
            raise StorageError(f"{name}: {error}") from error


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
            retries={"mode": "standard", "total_max_attempts": settings.max_attempts},
            s3={"addressing_style": settings.addressing_style},
            request_checksum_calculation=settings.checksum_mode,
            response_checksum_validation=settings.checksum_mode,
            max_pool_connections=16,
        ),
    )


def _status(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
