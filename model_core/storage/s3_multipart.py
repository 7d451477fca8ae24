"""A large file to S3 in parts. An interrupted upload goes on: parts that the store has, and that are the same bytes, stay."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

from model_core.storage.errors import CorruptError
from model_core.storage.s3_connection import S3Connection, code, status
from model_core.storage.settings import MiB
from model_core.storage.version import Version

PARTS_AT_ONCE = 4
_MOST_PARTS = 10_000  # S3's limit for one object
NO_UPLOAD = ("NoSuchUpload", "NoSuchKey")  # S3 says the one, Ceph the other


@dataclass(frozen=True)
class Part:
    """A part that the store has: what completing the upload names."""

    number: int
    size: int
    etag: str
    md5: str  # "" where it is not known
    checksums: dict[str, str]  # of S3's own, in checksum mode when_supported

    def document(self) -> dict[str, Any]:
        """The part as CompleteMultipartUpload wants it."""
        return {"PartNumber": self.number, "ETag": f'"{self.etag}"', **self.checksums}


def upload_in_parts(connection: S3Connection, key: str, file: BinaryIO, *, name: str) -> str:
    """Send a file from one reading of it, and return its sha256 (hex).

    Raises StorageError when the file changes meanwhile (nothing is written then), CorruptError when the object at the end is not
    the one that was sent, and botocore's errors.
    """
    from botocore.exceptions import ClientError

    version = Version.of(file)
    length = part_bytes(version.size, at_least=connection.settings.multipart_bytes)
    upload_id, there = _to_go_on_with(connection, key, size=version.size, length=length) or (_begin(connection, key), {})
    try:
        return _send(connection, key, file, upload_id=upload_id, there=there, version=version, length=length, name=name)
    except ClientError as error:
        # Another process sent other parts into this upload, or ended it.
        if code(error) not in ("InvalidPart", "InvalidPartOrder") and not _ended(connection, key, upload_id, error):
            raise
    file.seek(0)
    return _send(connection, key, file, upload_id=_begin(connection, key), there={}, version=version, length=length, name=name)


def part_bytes(size: int, *, at_least: int) -> int:
    """Bytes of each part but the last: `at_least`, or as many more as keep a file of `size` bytes within 10,000 parts."""
    needed = -(-size // _MOST_PARTS)
    return max(at_least, -(-needed // MiB) * MiB)


def uploads(connection: S3Connection, prefix: str) -> Iterator[dict[str, Any]]:
    """The unfinished uploads to keys that start with `prefix`, as S3 describes them."""
    marker: dict[str, Any] = {}
    while True:
        page = connection.call("list_multipart_uploads", Prefix=prefix, **marker)
        yield from page.get("Uploads", [])
        if not page.get("IsTruncated"):
            return
        marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def send_checked(connection: S3Connection, operation: str, data: bytes, *, name: str, **arguments: Any) -> tuple[str, str, dict[str, str]]:
    """Send bytes by `operation`: their etag, md5 (hex) and S3's own checksums. Raises CorruptError when other bytes arrived.

    The md5 goes along, so that a store refuses damaged bytes; not every store looks at it, and for those the etag tells.
    """
    md5 = hashlib.md5(data, usedforsecurity=False)
    answer = connection.call(operation, stream=data, ContentMD5=base64.b64encode(md5.digest()).decode(), **arguments)
    etag = str(answer["ETag"]).strip('"')
    if _is_md5(etag, answer) and etag != md5.hexdigest():
        raise CorruptError(f"{name}: sent {len(data)} bytes with md5 {md5.hexdigest()[:12]}, the store got md5 {etag[:12]}")
    return etag, md5.hexdigest(), _checksums(answer)


def _send(
    connection: S3Connection,
    key: str,
    file: BinaryIO,
    *,
    upload_id: str,
    there: dict[int, Part],
    version: Version,
    length: int,
    name: str,
) -> str:
    sha256 = hashlib.sha256()
    parts: list[Part] = []
    pending: deque[Future[Part]] = deque()
    with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
        try:
            for number in range(1, -(-version.size // length) + 1):
                data = file.read(length)
                version.check(file, name)
                sha256.update(data)
                if len(pending) == PARTS_AT_ONCE:  # what is read ahead lies in memory
                    parts.append(pending.popleft().result())
                pending.append(pool.submit(_send_part, connection, key, upload_id, number, data, there.get(number), name))
            parts += [future.result() for future in pending]
        finally:
            for future in pending:
                future.cancel()
    _complete(connection, key, upload_id, parts, name=name)
    return sha256.hexdigest()


def _send_part(connection: S3Connection, key: str, upload_id: str, number: int, data: bytes, there: Part | None, name: str) -> Part:
    if there and there.size == len(data) and there.etag == hashlib.md5(data, usedforsecurity=False).hexdigest():
        return Part(number, there.size, there.etag, there.etag, there.checksums)
    etag, md5, checksums = send_checked(
        connection, "upload_part", data, name=f"{name}: part {number}", Key=key, UploadId=upload_id, PartNumber=number
    )
    return Part(number, len(data), etag, md5, checksums)


def _complete(connection: S3Connection, key: str, upload_id: str, parts: list[Part], *, name: str) -> None:
    """Make the object of its parts, and see that it is the one that was sent."""
    from botocore.exceptions import ClientError

    size = sum(part.size for part in parts)
    joined = b"".join(bytes.fromhex(part.md5) for part in parts)
    expected: str | None = f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(parts)}"
    if any(part.etag != part.md5 for part in parts):  # an encrypting store's etags are no md5
        expected = None
    try:
        connection.call(
            "complete_multipart_upload", Key=key, UploadId=upload_id, MultipartUpload={"Parts": [part.document() for part in parts]}
        )
    except ClientError:
        # The first request may have been carried out and its answer lost; asked again, the store no longer knows the upload.
        if expected is None or _found(connection, key) != (size, expected):
            raise
    found = _found(connection, key)
    if found is None or found[0] != size or (expected is not None and found[1] != expected):
        raise CorruptError(f"{name}: sent {size} bytes as etag {expected}, the store has {found or 'nothing'}")


def _begin(connection: S3Connection, key: str) -> str:
    # botocore adds this checksum to each part in that mode, and a store wants to be told of it beforehand.
    checksum: dict[str, Any] = {"ChecksumAlgorithm": "CRC32"} if connection.settings.checksum_mode == "when_supported" else {}
    return str(connection.call("create_multipart_upload", Key=key, **checksum)["UploadId"])


def _to_go_on_with(connection: S3Connection, key: str, *, size: int, length: int) -> tuple[str, dict[int, Part]] | None:
    """The unfinished upload of this key that has the most parts of a file of this size, or None.

    Some stores refuse to complete an upload that has other parts than are named, so one with a part of another size or number is
    left alone.
    """
    from botocore.exceptions import ClientError

    sizes = {number + 1: min(length, size - start) for number, start in enumerate(range(0, size, length))}
    best: tuple[str, dict[int, Part]] | None = None
    for upload in uploads(connection, key):
        if upload["Key"] != key:
            continue
        try:
            parts = _parts(connection, key, upload["UploadId"])
        except ClientError as error:
            if code(error) not in NO_UPLOAD:  # ended since it was listed
                raise
            continue
        if all(sizes.get(part.number) == part.size for part in parts.values()) and (best is None or len(parts) > len(best[1])):
            best = (upload["UploadId"], parts)
    return best


def _parts(connection: S3Connection, key: str, upload_id: str) -> dict[int, Part]:
    parts: dict[int, Part] = {}
    marker: dict[str, Any] = {}
    while True:
        page = connection.call("list_parts", Key=key, UploadId=upload_id, **marker)
        for item in page.get("Parts", []):
            number = int(item["PartNumber"])
            parts[number] = Part(number, int(item["Size"]), str(item["ETag"]).strip('"'), "", _checksums(item))
        if not page.get("IsTruncated"):
            return parts
        marker = {"PartNumberMarker": int(page["NextPartNumberMarker"])}


def _ended(connection: S3Connection, key: str, upload_id: str, error: Exception) -> bool:
    """Whether a request failed because its upload was completed or aborted. Ceph answers that with a 500."""
    from botocore.exceptions import ClientError

    if status(error) != 404 and status(error) < 500:
        return False
    try:
        connection.call("list_parts", Key=key, UploadId=upload_id)
    except ClientError as missing:
        return code(missing) in NO_UPLOAD
    return False


def _found(connection: S3Connection, key: str) -> tuple[int, str] | None:
    """Size and etag of the object that is there."""
    from botocore.exceptions import ClientError

    try:
        answer = connection.call("head_object", Key=key)
    except ClientError as error:
        if status(error) == 404:
            return None
        raise
    return int(answer["ContentLength"]), str(answer["ETag"]).strip('"')


def _checksums(answer: dict[str, Any]) -> dict[str, str]:
    return {
        name: answer[name]
        for name in ("ChecksumCRC32", "ChecksumCRC32C", "ChecksumCRC64NVME", "ChecksumSHA1", "ChecksumSHA256")
        if name in answer
    }


def _is_md5(etag: str, answer: dict[str, Any]) -> bool:
    """Whether the store means the md5 of the bytes: it does unless it encrypts them with keys of its user or of a key service."""
    encrypted = "SSECustomerAlgorithm" in answer or str(answer.get("ServerSideEncryption", "")).startswith("aws:kms")
    return bool(re.fullmatch("[0-9a-f]{32}", etag)) and not encrypted
