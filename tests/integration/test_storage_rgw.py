"""The same promises on Ceph's gateway, which pages, dates and checks in its own way."""

from __future__ import annotations

import uuid

import pytest

from model_core.storage import S3Settings, Storage, open_storage
from tests.rgw import Rgw
from tests.s3_servers import ACCESS_KEY, BUCKET, SECRET_KEY
from tests.storage_conformance import RealS3Conformance

pytestmark = pytest.mark.lab


@pytest.fixture
def storage(rgw: Rgw, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    settings = S3Settings(endpoint_url=rgw.endpoint, multipart_bytes=5 << 20, retry_seconds=5)
    return open_storage(f"s3://{BUCKET}/test-{uuid.uuid4().hex}", settings)


class TestRgw(RealS3Conformance):
    pass
