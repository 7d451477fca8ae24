"""The same promises on Ceph's gateway, which pages, dates and checks in its own way."""

from __future__ import annotations

import pytest

from model_core.storage import Storage
from tests.rgw import Rgw
from tests.s3_conformance import RealS3Conformance
from tests.s3_servers import ACCESS_KEY, SECRET_KEY, new_uri, open_at

pytestmark = pytest.mark.lab


@pytest.fixture
def storage(rgw: Rgw, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    return open_at(new_uri(), rgw.endpoint, retry_seconds=2)


class TestRgw(RealS3Conformance):
    pass
