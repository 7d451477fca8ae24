"""`darkroom run` as a program: failing, stopped and killed, with steps that only wait and write a file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import model_core

DARKROOM = str(Path(sys.executable).parent / "darkroom")
REAL = Path(model_core.__file__).parent

# `python -m model_core` finds this package first, in the working folder: the real one, with other step modules.
FAKE_PACKAGE = f"__path__.append({str(REAL)!r})\n"
FAKE_STEPS = f"""
import json, os, runpy, sys, time, types
from model_core.documents import UserError
from model_core.steps.registry import STEPS

wish = json.load(open("wish.json"))

def run(context):
    label = context.progress._label.strip()
    mine = wish.get(label, {{}})
    open("pids", "a").write(f"{{label}} {{os.getpid()}}\\n")
    time.sleep(mine.get("sleep_seconds", 0))
    if "mistake" in mine:
        raise UserError(mine["mistake"])
    if "failure" in mine:
        raise RuntimeError(mine["failure"])
    (context.output / "label.txt").write_text(label)
    (context.output / "funnel.json").write_text("[]")
    (context.output / "report.html").write_text(label)
    body = {{"scores": {{}}, "model": {{"name": "m", "alias": "a", "parts": {{}}}}, "prompts": [], "edits": []}}
    (context.output / "body.json").write_text(json.dumps({{**body, "reconstructions": [], "curves": []}}))
    return {{"value": 1.0}}

for name in STEPS:
    module = types.ModuleType(f"model_core.steps.{{name}}")
    module.run = run
    sys.modules[module.__name__] = module
runpy.run_path({str(REAL / "__main__.py")!r}, run_name="__main__")
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    folder = tmp_path / "a folder"
    package = folder / "model_core"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_PACKAGE)
    (package / "__main__.py").write_text(FAKE_STEPS)
    return folder


def start(here: Path, **wish: dict[str, Any]) -> subprocess.Popen[str]:
    (here / "wish.json").write_text(json.dumps(wish))
    (here / "pids").unlink(missing_ok=True)
    command = [DARKROOM, "run", "smoke", "--name", "r"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True)


def pids(here: Path) -> dict[str, int]:
    path = here / "pids"
    return {label: int(pid) for label, pid in map(str.split, path.read_text().splitlines())} if path.exists() else {}


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def records(here: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in (here / "workspace" / "runs" / "r" / "steps").glob("*.json")}


def test_failing_step_ends_the_run_with_one_sentence_and_the_next_run_goes_on(here: Path) -> None:
    run = start(here, caption_images={"failure": "no words"})
    out, errors = run.communicate(timeout=120)
    assert run.returncode == 1
    assert errors.strip().splitlines()[-1].startswith("darkroom: caption_images failed (exit code 30): RuntimeError: no words")
    assert "RuntimeError: no words" in out
    assert records(here)["caption_images"]["status"] == "failed"
    assert "evaluate_model" not in records(here)

    run = start(here)
    out, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    after = records(here)
    assert len(after) == 25
    assert {label for label, record in after.items() if record["reused"]} >= {
        "ingest_images",
        "render_text",
        "build_edits",
        "filter_images-S1",
    }
    assert not after["caption_images"]["reused"]
    assert "KFP" not in out
    assert "INFO" not in out


def test_mistake_that_only_a_step_can_see_is_still_the_users(here: Path) -> None:
    run = start(here, ingest_images={"mistake": "data.sources: found an empty folder; allowed is one with pictures"})
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 2
    assert errors.strip() == "darkroom: ingest_images: data.sources: found an empty folder; allowed is one with pictures"


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at /proc")
def test_killed_run_leaves_no_step_behind_and_its_claim_is_taken_over(here: Path) -> None:
    run = start(here, render_text={"sleep_seconds": 300})
    wait_for(lambda: "render_text" in pids(here))
    step = pids(here)["render_text"]
    run.kill()
    run.communicate(timeout=60)
    wait_for(lambda: not is_running(step), seconds=10)

    again = start(here)
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert records(here)["ingest_images"]["reused"]
    assert not records(here)["render_text"]["reused"]


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_run_stops_its_step_and_says_how_to_go_on(number: signal.Signals, here: Path) -> None:
    run = start(here, ingest_images={"sleep_seconds": 300})
    wait_for(lambda: "ingest_images" in pids(here))
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "darkroom: stopped; the same command goes on from there" in errors
    assert not is_running(pids(here)["ingest_images"])
    assert records(here)["ingest_images"]["status"] == "failed"
    assert not (here / "workspace" / "ingest_images" / records(here)["ingest_images"]["key"] / "claim.json").exists()
