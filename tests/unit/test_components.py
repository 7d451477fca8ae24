"""Components and the launcher: what is started, what is forwarded, and that nothing outlives its starter."""

from __future__ import annotations

import fcntl
import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from components.launch import INFRASTRUCTURE, SCHEDULERS, StepError, run_step
from components.launch.local import ALIVE_FILE, LINE_MARK, RUN_FOLDER, Outcome, is_alive
from model_core.steps.registry import STEPS

# Stands where `python -m model_core` looks first: it says what it was given, and ends as it was told.
FAKE_STEP = """
import argparse, json, os, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("step")
for name in ("recipe", "site", "run", "stage", "output"):
    parser.add_argument(f"--{name}")
parser.add_argument("--input", action="append", default=[])
given = vars(parser.parse_args())
recipe = json.load(open(given["recipe"]))
site = json.load(open(given["site"]))
open("pid", "w").write(str(os.getpid()))
for number in range(recipe.get("num_lines", 1)):
    print(f"line {number}", flush=True)
print("to stderr", file=sys.stderr, flush=True)
time.sleep(recipe.get("sleep_seconds", 0))
if recipe.get("code"):
    sys.exit(recipe["code"])
stats = {"vae/psnr": 27.5, "rows": 8, "note": "x", "flag": True}
json.dump({**given, "recipe": recipe, "site": site, "stats": stats}, open(given["output"], "w"))
"""


@dataclass
class FakeArtifact:
    """What a component sees of a Kubeflow artifact."""

    path: str
    metadata: dict[str, float] = field(default_factory=dict)

    def log_metric(self, metric: str, value: float) -> None:
        self.metadata[metric] = value


@pytest.fixture
def fake_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    package = tmp_path / "model_core"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(FAKE_STEP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(RUN_FOLDER, raising=False)
    return tmp_path


def component(name: str) -> Any:
    return getattr(importlib.import_module(f"components.{name}"), name)


@pytest.mark.parametrize("name", [name for name in STEPS if name != "publish_report"])
def test_component_passes_its_inputs_to_the_step_of_its_name(name: str, fake_step: Path) -> None:
    spec = STEPS[name]
    arguments: dict[str, Any] = {key: FakeArtifact(str(fake_step / f"{key}.json")) for key in spec.inputs}
    if spec.staged:
        arguments["stage"] = "S1"
    if name == "evaluate_model":
        arguments["scores"] = FakeArtifact("scores")
    output = FakeArtifact(str(fake_step / "manifest.json"))
    component(name).python_func(recipe='{"name": "x"}', site="{}", run="r", manifest=output, **arguments)
    given = json.loads(Path(output.path).read_text())
    assert given["step"] == name
    assert given["stage"] == ("S1" if spec.staged else None)
    assert sorted(given["input"]) == sorted(f"{key}={fake_step / key}.json" for key in spec.inputs)


@pytest.mark.parametrize("name", list(STEPS))
def test_component_takes_what_its_step_takes_and_explains_each_argument(name: str) -> None:
    spec = STEPS[name]
    function = component(name).python_func
    parameters = set(inspect.signature(function).parameters)
    assert set(spec.inputs) | set(spec.optional) | {"recipe", "site", "run", "manifest"} <= parameters
    assert ("stage" in parameters) == spec.staged
    for parameter in parameters:
        assert f"        {parameter}: " in function.__doc__, f"{name}: Args lacks {parameter}"


def test_optional_input_is_passed_on_when_it_is_there(fake_step: Path) -> None:
    inputs = {key: FakeArtifact(f"{key}.json") for key in ("latents", "encoder", "previous")}
    output = FakeArtifact(str(fake_step / "manifest.json"))
    component("train_mmdit").python_func(recipe="{}", site="{}", run="r", stage="S2", manifest=output, **inputs)
    assert "previous=previous.json" in json.loads(Path(output.path).read_text())["input"]


def test_numbers_of_the_result_become_metrics(fake_step: Path) -> None:
    scores = FakeArtifact("")
    run_step("evaluate_model", recipe="{}", site="{}", run="r", inputs={}, output=str(fake_step / "m.json"), metrics=scores)
    assert scores.metadata == {"vae/psnr": 27.5, "rows": 8.0}


def test_every_line_is_forwarded_in_order(fake_step: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_step("train_vae", recipe='{"num_lines": 100}', site="{}", run="r", inputs={}, output=str(fake_step / "m.json"))
    assert capsys.readouterr().out.splitlines() == [*(f"line {number}" for number in range(100)), "to stderr"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (10, "train_vae-S1 refused its configuration"),
        (20, "running it again goes on from its newest checkpoint"),
        (30, "train_vae-S1 failed (exit code 30)"),
        (1, "train_vae-S1 failed (exit code 1)"),
    ],
)
def test_exit_code_becomes_an_error_that_says_what_it_means(code: int, words: str, fake_step: Path) -> None:
    with pytest.raises(StepError, match="to stderr") as caught:
        run_step("train_vae", recipe=json.dumps({"code": code}), site="{}", run="r", stage="S1", inputs={}, output="m.json")
    assert words in str(caught.value)
    assert caught.value.code == code


def test_unknown_scheduler_is_refused_with_those_there_are() -> None:
    with pytest.raises(StepError, match=", ".join(SCHEDULERS)):
        run_step("train_vae", recipe="{}", site='{"launch": {"default": {"scheduler": "slurm"}}}', run="r", inputs={}, output="m.json")


@pytest.mark.parametrize(("processes", "program"), [(1, ["model_core"]), (3, ["model_core.torchrun", "3"])])
def test_a_step_of_several_processes_is_started_by_torchrun(
    processes: int, program: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    def start(argv: list[str], _label: str, _environment: Mapping[str, str]) -> Outcome:
        started.append(argv)
        return Outcome(0, ())

    monkeypatch.setitem(SCHEDULERS, "local_cwd", start)
    site = json.dumps({"launch": {"steps": {"train_vae": {"processes": processes}}}})
    for step in ("train_vae", "ingest_images"):
        run_step(step, recipe="{}", site=site, run="r", inputs={}, output=str(tmp_path / "m.json"))
    assert started[0][1 : 3 + len(program)] == ["-m", *program, "train_vae"]
    assert started[1][1:4] == ["-m", "model_core", "ingest_images"]


def start_launcher(folder: Path, *, run_folder: Path | None = None, recipe: dict[str, Any]) -> subprocess.Popen[str]:
    code = f"""
    import components.launch
    components.launch.run_step("train_vae", recipe={json.dumps(recipe)!r}, site="{{}}", run="r", inputs={{}}, output="m.json")
    """
    env = {**os.environ, **({RUN_FOLDER: str(run_folder)} if run_folder else {})}
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=folder, env=env, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (folder / "pid").exists() and (folder / "pid").read_text() != "")
    return process


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def test_sigterm_reaches_the_step(fake_step: Path) -> None:
    launcher = start_launcher(fake_step, recipe={"sleep_seconds": 60})
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate(timeout=20)
    assert "was killed by signal 15" in errors


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
def test_step_dies_when_its_launcher_is_killed(fake_step: Path) -> None:
    launcher = start_launcher(fake_step, recipe={"sleep_seconds": 60})
    launcher.kill()
    launcher.communicate(timeout=20)
    wait_for(lambda: not is_running(int((fake_step / "pid").read_text())), seconds=5)


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at /proc")
def test_step_dies_when_darkroom_run_is_killed(fake_step: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import fcntl, time; f = open({ALIVE_FILE!r}, 'wb'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); time.sleep(60)",
        ],
        cwd=fake_step,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    assert is_alive(fake_step)
    launcher = start_launcher(fake_step, run_folder=fake_step, recipe={"sleep_seconds": 60})
    time.sleep(1.5)
    assert is_running(int((fake_step / "pid").read_text())), "stopped although the run lives"
    holder.kill()
    holder.wait()
    _, errors = launcher.communicate(timeout=20)
    assert not is_running(int((fake_step / "pid").read_text()))
    assert "`darkroom run` is gone" in errors


def test_lines_are_marked_for_darkroom_run_and_a_failure_is_told(
    fake_step: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (fake_step / ALIVE_FILE).open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        monkeypatch.setenv(RUN_FOLDER, str(fake_step))
        with pytest.raises(StepError):
            run_step("train_vae", recipe=json.dumps({"code": INFRASTRUCTURE}), site="{}", run="r", stage="S1", inputs={}, output="m.json")
    assert capsys.readouterr().out.splitlines()[0] == f"{LINE_MARK}train_vae-S1{LINE_MARK}line 0"
    told = json.loads((fake_step / "failure.json").read_text())
    assert told["code"] == INFRASTRUCTURE
    assert told["reason"] == "to stderr"
