"""Objects in an S3 bucket, through boto3."""

from __future__ import annotations

import hashlib
import os
import secrets
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model_core.storage.errors import ConflictError, NotFoundError
from model_core.storage.protocol import Stat, Unfinished, check_digest, check_path, check_prefix, check_range, check_sha256
from model_core.storage.s3_connection import S3Connection, code, status
from model_core.storage.s3_download import download_in_ranges
from model_core.storage.s3_multipart import NO_UPLOAD, send_checked, upload_in_parts, uploads
from model_core.storage.settings import S3Settings
from model_core.storage.version import Version

_WRITE_ID = "darkroom-write"  # user metadata: tells our own repeated write from another writer's


class S3Storage:
    """Storage below `prefix` of `bucket`. Can be pickled and used after a fork."""

    def __init__(self, bucket: str, prefix: str, *, settings: S3Settings) -> None:
        self.prefix, self.settings = prefix, settings
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._below = f"{prefix}/" if prefix else ""
        self._connection = S3Connection(bucket, settings)

    def get(self, path: str, *, start: int | None = None, length: int | None = None, sha256: str | None = None) -> bytes:
        from botocore.exceptions import ClientError

        offset, count = check_range(start, length)
        check_digest(sha256)
        key, name = self._key(path), self._name(path)
        span = {} if start is None and length is None else {"Range": f"bytes={offset}-{'' if count is None else offset + count - 1}"}
        with self._connection.errors(name):
            data = b""
            if count == 0:
                self.stat(path)
            else:
                try:
                    data, _ = self._connection.read(key, **span)
                except ClientError as error:
                    if status(error) != 416:  # the range starts past the end
                        raise
        if sha256 is not None:
            check_sha256(name, hashlib.sha256(data), size=len(data), expected=sha256)
        return data

    def put(self, path: str, data: bytes, *, create_only: bool = False, if_match: str | None = None) -> str:
        from botocore.exceptions import ClientError

        key, name = self._key(path), self._name(path)
        # Without quotes around the etag: Ceph compares it with them, and finds another one.
        condition = {"IfNoneMatch": "*"} if create_only else {"IfMatch": if_match} if if_match is not None else {}
        write_id = uuid.uuid4().hex
        with self._connection.errors(name):
            try:
                return send_checked(self._connection, "put_object", data, name=name, Key=key, Metadata={_WRITE_ID: write_id}, **condition)[
                    0
                ]
            except ClientError as error:
                if not condition or (status(error) not in (409, 412) and code(error) != "NoSuchKey"):
                    raise
                # A write whose answer was lost is sent again and then meets its own object: that is a success.
                if (mine := self._written_as(key, write_id)) is not None:
                    return mine
                found = "exists already" if create_only else "was changed by another writer"
                raise ConflictError(f"{name}: {found}") from error

    def upload(self, path: str, source: Path) -> str:
        key, name = self._key(path), self._name(path)
        source.resolve(strict=True)  # a missing source is the caller's mistake, not the store's
        with self._connection.errors(name), source.open("rb") as file:
            version = Version.of(file)
            if version.size > self.settings.multipart_bytes:
                return upload_in_parts(self._connection, key, file, name=name)
            data = file.read()
            version.check(file, name)
            send_checked(self._connection, "put_object", data, name=name, Key=key)
            return hashlib.sha256(data).hexdigest()

    def download(self, path: str, target: Path, *, sha256: str | None = None) -> None:
        check_digest(sha256)
        key, name = self._key(path), self._name(path)
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        with self._connection.errors(name):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("xb") as file:
                    digest = hashlib.sha256()
                    size = download_in_ranges(self._connection, key, file, digest=digest, name=name)
                    check_sha256(name, digest, size=size, expected=sha256)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)

    def stat(self, path: str) -> Stat:
        from botocore.exceptions import ClientError

        key = self._key(path)
        with self._connection.errors(self._name(path)):
            try:
                answer = self._connection.call("head_object", Key=key)
            except ClientError as error:
                if status(error) != 404:
                    raise
                # The answer to a HEAD cannot say what was not found: the object, the bucket, or the caller. A GET says it.
                self.get(path, start=0, length=1)
                return self.stat(path)  # it was written between the two
        return Stat(path, int(answer["ContentLength"]), str(answer["ETag"]).strip('"'))

    def list(self, prefix: str = "") -> Iterator[Stat]:
        start = self._below + check_prefix(prefix)
        token: dict[str, Any] = {}
        while True:
            with self._connection.errors(self._name(prefix)):
                page = self._connection.call("list_objects_v2", Prefix=start, **token)
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):  # a folder marker that some browsers of S3 leave
                    yield Stat(item["Key"].removeprefix(self._below), int(item["Size"]), str(item["ETag"]).strip('"'))
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, path: str) -> None:
        key = self._key(path)
        try:
            with self._connection.errors(self._name(path)):
                self._connection.call("delete_object", Key=key)
        except NotFoundError:
            return

    def unfinished(self) -> Iterator[Unfinished]:
        """Multipart uploads. How many bytes one holds would cost a request for each, so `size` is None."""
        with self._connection.errors(self._name("")):
            found = [*uploads(self._connection, self._below)]
        for upload in found:
            yield Unfinished(upload["Key"].removeprefix(self._below), upload["UploadId"], upload["Initiated"].timestamp(), None)

    def abort(self, unfinished: Unfinished) -> None:
        from botocore.exceptions import ClientError

        key = self._key(unfinished.path)
        with self._connection.errors(self._name(unfinished.path)):
            try:
                self._connection.call("abort_multipart_upload", Key=key, UploadId=unfinished.id)
            except ClientError as error:
                if code(error) not in NO_UPLOAD:
                    raise

    def local_path(self, path: str) -> Path | None:
        check_path(path)
        return None

    def _key(self, path: str) -> str:
        return self._below + check_path(path)

    def _name(self, path: str) -> str:
        return f"{self.uri}/{path}"

    def _written_as(self, key: str, write_id: str) -> str | None:
        """The etag of the object when it is the write `write_id`, else None."""
        from botocore.exceptions import ClientError

        try:
            answer = self._connection.call("head_object", Key=key)
        except ClientError as error:
            if status(error) == 404:
                return None
            raise
        return str(answer["ETag"]).strip('"') if answer.get("Metadata", {}).get(_WRITE_ID) == write_id else None
