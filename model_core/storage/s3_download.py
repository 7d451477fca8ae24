"""An object of any size from S3 to a local file, by ranges that travel side by side and are written in order."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

from model_core.storage.errors import ConflictError, CorruptError
from model_core.storage.protocol import Digest
from model_core.storage.s3_connection import S3Connection, status

RANGES_AT_ONCE = 4


def download_in_ranges(connection: S3Connection, key: str, file: BinaryIO, *, digest: Digest, name: str) -> int:
    """Write an object to `file`, add its bytes to `digest`, and return their number.

    Every range is asked for with the etag of the first: raises ConflictError when the object is replaced meanwhile, so that the
    file is never a mix of two. Raises CorruptError when a range is shorter than the store said, and botocore's errors.
    """
    from botocore.exceptions import ClientError

    length = connection.settings.multipart_bytes
    try:
        data, answer = connection.read(key, Range=f"bytes=0-{length - 1}")
    except ClientError as error:
        if status(error) != 416:
            raise
        return 0  # an empty object has no byte 0
    size = int(str(answer.get("ContentRange", f"/{len(data)}")).rpartition("/")[2])
    etag = answer["ETag"]

    def fetch(start: int) -> bytes:
        try:
            return connection.read(key, Range=f"bytes={start}-{min(start + length, size) - 1}", IfMatch=etag)[0]
        except ClientError as error:
            if status(error) != 412:
                raise
            raise ConflictError(f"{name}: was replaced by another writer while it was read") from error

    written = 0
    pending: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(RANGES_AT_ONCE) as pool:
        try:
            starts = iter(range(length, size, length))
            while True:
                file.write(data)
                digest.update(data)
                written += len(data)
                while len(pending) < RANGES_AT_ONCE and (start := next(starts, None)) is not None:
                    pending.append(pool.submit(fetch, start))
                if not pending:
                    break
                data = pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
    if written != size:
        raise CorruptError(f"{name}: found {written} bytes, expected {size}")
    return written
