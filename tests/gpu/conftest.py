"""Tests that need a GPU; on a machine without one they are collected and skipped, and one line says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test of this folder."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)


def pytest_runtest_setup() -> None:
    """Skips from one place, so that one line tells of all."""
    if not torch.cuda.is_available():
        pytest.skip("found no GPU")


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The first GPU, empty again afterwards."""
    yield torch.device("cuda", 0)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
