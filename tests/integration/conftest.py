"""One run of the recipe smoke for all integration tests: every step real, through Kubeflow's local runner."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from model_core.storage import S3Settings, open_storage
from tests.rgw import Rgw
from tests.s3_servers import Versitygw, running

DARKROOM = str(Path(sys.executable).parent / "darkroom")


def pytest_configure() -> None:
    """Ctrl-C reaches what tests start, even where a shell began this in the background and so has it ignored."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Darkroom:
    """The command line, called in a folder of its own."""

    here: Path

    @property
    def workspace(self) -> Path:
        """Where the default site keeps its results."""
        return self.here / "workspace"

    def __call__(self, *arguments: str) -> str:
        """Standard output of a call that must succeed."""
        done = subprocess.run([DARKROOM, *arguments], cwd=self.here, capture_output=True, text=True, check=False, timeout=900)
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """A call that goes on by itself."""
        return subprocess.Popen([DARKROOM, *arguments], cwd=self.here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of two workers (--dist loadgroup) one does all that needs the run of smoke, the other all that faces servers.

    What several ranks do together is done by the one that is free first.
    """
    for item in items:
        needs_smoke = "darkroom" in getattr(item, "fixturenames", ())
        others = "ranks" if item.path.name == "test_training_ranks.py" else "servers"
        item.add_marker(pytest.mark.xdist_group("smoke" if needs_smoke else others))


@pytest.fixture
def lab_site(tmp_path: Path) -> Iterator[Path]:
    """The file of a site whose workspace is a prefix of its own on the lab's S3 server; it is emptied afterwards."""
    endpoint, bucket = os.environ.get("LAB_S3_ENDPOINT"), os.environ.get("LAB_S3_BUCKET")
    if not endpoint:
        assert not os.environ.get("REQUIRE_LAB"), "REQUIRE_LAB is set, but LAB_S3_ENDPOINT is not: the lab is not up"
        pytest.skip("LAB_S3_ENDPOINT is not set: start the lab to test against its S3 server")
    settings = S3Settings(endpoint_url=endpoint)
    site = {
        "workspace": f"s3://{bucket}/test-{uuid.uuid4().hex}",
        "scratch": str(tmp_path / "scratch"),
        "s3": settings.model_dump(exclude_unset=True),
    }
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    yield tmp_path / "site.yaml"
    storage = open_storage(str(site["workspace"]), settings)
    for entry in list(storage.list()):
        storage.delete(entry.path)


@pytest.fixture(scope="session")
def versitygw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Versitygw]:
    server = Versitygw(tmp_path_factory.mktemp("versitygw"))
    yield from running(server)


@pytest.fixture(scope="session")
def rgw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rgw]:
    server = Rgw(tmp_path_factory.mktemp("rgw"))
    yield from running(server)


@pytest.fixture(scope="session")
def darkroom(tmp_path_factory: pytest.TempPathFactory) -> Darkroom:
    return Darkroom(tmp_path_factory.mktemp("smoke"))


@pytest.fixture(scope="session")
def first(darkroom: Darkroom) -> dict[str, Any]:
    """What `darkroom run smoke --json` told of the undisturbed run named `first`."""
    told: dict[str, Any] = json.loads(darkroom("run", "smoke", "--name", "first", "--json"))
    return told


@pytest.fixture(scope="session")
def workspace(darkroom: Darkroom, first: dict[str, Any]) -> Path:
    """The workspace of the undisturbed run."""
    return darkroom.workspace
