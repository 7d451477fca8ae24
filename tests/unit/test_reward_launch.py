"""The reward service beside a step: there before it, told of, and gone after it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.launch import StepError, run_step
from components.launch.local import RUN_FOLDER

# Stand where `python -m model_core.rewards.service` and `python -m model_core` look first.
FAKE_SERVICE = """
import argparse, os, signal, sys, time, yaml
parser = argparse.ArgumentParser()
for name in ("recipe", "site", "port", "announce"):
    parser.add_argument(f"--{name}")
parser.add_argument("--input", action="append", default=[])
given = parser.parse_args()
recipe = yaml.safe_load(open(given.recipe))
open("service-pid", "w").write(str(os.getpid()))
print("loading", *given.input, flush=True)
def stop(*_):
    open("stopped", "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if recipe.get("deaf") else stop)
if recipe.get("refused"):
    sys.exit("no such reward") if recipe["refused"] == 1 else sys.exit(recipe["refused"])
time.sleep(recipe.get("loading_seconds", 0))
open(given.announce + ".new", "w").write("http://127.0.0.1:1234")
os.replace(given.announce + ".new", given.announce)
if recipe.get("dies"):
    sys.exit(7)
time.sleep(60)
"""
FAKE_STEP = """
import json, os, sys, time
given = sys.argv
recipe = json.load(open(given[given.index("--recipe") + 1]))
os.kill(int(open("service-pid").read()), 0) if not recipe.get("dies") else time.sleep(0.5)
print("the step", os.environ.get("DARKROOM_REWARDS_URI"), flush=True)
time.sleep(recipe.get("sleep_seconds", 0))
json.dump({"stats": {}}, open(given[given.index("--output") + 1], "w"))
sys.exit(recipe.get("code", 0))
"""
SITE = json.dumps({"launch": {"steps": {"train_vae": {"reward_service": True}}}})


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "model_core"
    (package / "rewards").mkdir(parents=True)
    for name, text in (("__init__", ""), ("__main__", FAKE_STEP), ("rewards/__init__", ""), ("rewards/service", FAKE_SERVICE)):
        (package / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(RUN_FOLDER, raising=False)
    return tmp_path


def run(place: Path, *, site: str = SITE, inputs: dict[str, str | None] | None = None, **recipe: Any) -> None:
    run_step("train_vae", recipe=json.dumps(recipe), site=site, run="r", inputs=inputs or {}, output=str(place / "m.json"))


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def service_pid(place: Path) -> int:
    return int((place / "service-pid").read_text())


def test_step_finds_its_service_ready_and_leaves_none_behind(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(place, inputs={"taste": "taste.json", "absent": None}, loading_seconds=0.3)
    assert capsys.readouterr().out.splitlines() == ["loading taste=taste.json", "the step http://127.0.0.1:1234"]
    assert (place / "stopped").exists(), "was not asked to stop"
    assert not is_running(service_pid(place))
    assert "DARKROOM_REWARDS_URI" not in os.environ


def test_no_service_is_started_that_the_profile_does_not_ask_for(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "service-pid").write_text(str(os.getpid()))
    run(place, site="{}")
    assert capsys.readouterr().out.splitlines() == ["the step None"]


def test_service_is_stopped_when_the_step_fails(place: Path) -> None:
    with pytest.raises(StepError, match=r"train_vae failed \(exit code 30\)"):
        run(place, code=30)
    assert not is_running(service_pid(place))


def test_service_that_ends_before_it_is_ready_ends_the_step_with_its_code(place: Path) -> None:
    with pytest.raises(StepError, match="train_vae: the reward service refused its configuration") as caught:
        run(place, refused=10)
    assert caught.value.code == 10
    with pytest.raises(StepError, match="no such reward"):
        run(place, refused=1)
    assert not (place / "m.json").exists()


def test_service_that_dies_while_the_step_runs_is_told_of(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(place, dies=True)
    assert "the reward service has ended with exit code 7" in capsys.readouterr().out


def test_service_that_heeds_no_signal_is_killed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.launch.rewards.GRACE_SECONDS", 0.2)
    run(place, deaf=True)
    assert not is_running(service_pid(place))


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux alone can be asked for it")
@pytest.mark.parametrize("recipe", [{"loading_seconds": 60}, {"sleep_seconds": 60}], ids=["while it loads", "while the step runs"])
def test_service_dies_when_its_launcher_is_killed(recipe: dict[str, Any], place: Path) -> None:
    code = f"""
    import components.launch
    components.launch.run_step("train_vae", recipe={json.dumps(recipe)!r}, site={SITE!r}, run="r", inputs={{}}, output="m.json")
    """
    environment = os.environ | {"PYTHONPATH": f"{place}:{Path(__file__).parents[2]}"}
    launcher = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=place, env=environment, stdout=subprocess.PIPE)
    assert launcher.stdout is not None
    for _ in recipe:
        launcher.stdout.readline()
    wait_for((place / "service-pid").exists)
    if "sleep_seconds" in recipe:
        assert launcher.stdout.readline() == b"the step http://127.0.0.1:1234\n"
    launcher.send_signal(signal.SIGKILL)
    launcher.wait(10)
    wait_for(lambda: not is_running(service_pid(place)))
