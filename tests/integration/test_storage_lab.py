"""The same promises on a real S3 server: LAB_S3_ENDPOINT, LAB_S3_BUCKET and the AWS variables name it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model_core.storage import S3Settings, Storage, StorageError, open_storage
from tests.s3_conformance import RealS3Conformance

pytestmark = pytest.mark.lab


@pytest.fixture
def storage() -> Iterator[Storage]:
    endpoint, bucket = os.environ.get("LAB_S3_ENDPOINT"), os.environ.get("LAB_S3_BUCKET")
    if not endpoint or not bucket:
        reason = "NO S3 SERVER: LAB_S3_ENDPOINT and LAB_S3_BUCKET are not set, so nothing here was checked against a real store"
        if os.environ.get("CI") == "true" and os.environ.get("REQUIRE_LAB") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    storage = open_storage(f"s3://{bucket}/test-{uuid.uuid4().hex}", S3Settings(endpoint_url=endpoint, multipart_bytes=5 << 20))
    yield storage
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(storage.delete, [found.path for found in storage.list()]))
    for left in storage.unfinished():
        storage.abort(left)


class TestLab(RealS3Conformance):
    pass


def test_large_upload_goes_in_parts(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(11 << 20))
    storage.upload("file", tmp_path / "file")
    assert storage.stat("file").etag.endswith("-3")


def test_wrong_key_is_refused_and_named(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.put("object", b"x")
    with monkeypatch.context() as environment:
        environment.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-of-this-store")
        stranger = open_storage(storage.uri, S3Settings(endpoint_url=os.environ["LAB_S3_ENDPOINT"]))
        with pytest.raises(StorageError, match="object: access denied"):
            stranger.get("object")
