"""Fixtures that several files of tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model_core.storage import Storage, open_storage
from model_core.training.checkpoint import CheckpointStore
from tests.checkpoint_parts import PREFIX, RemoteStorage


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture(params=["in place", "remote"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    storage = open_storage((tmp_path / "store").as_uri())
    return storage if request.param == "in place" else RemoteStorage(storage)


@pytest.fixture
def remote(tmp_path: Path) -> RemoteStorage:
    return RemoteStorage(open_storage((tmp_path / "store").as_uri()))


@pytest.fixture
def store_of(tmp_path: Path, said: list[str]) -> Callable[..., CheckpointStore]:
    def make(storage: Storage, **options: Any) -> CheckpointStore:
        return CheckpointStore(storage, PREFIX, say=said.append, scratch=tmp_path / "scratch", **options)

    return make
