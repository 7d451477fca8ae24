"""The reward service as a process: killed in the middle of its work, started again, told to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from model_core.data.synthetic import describe, held_out_scenes, render
from model_core.recipe import Scenes
from model_core.rewards.attribute_check import AttributeCheck
from model_core.rewards.client import HTTPScorer
from model_core.rewards.verdict import RewardUnavailable, ScoreRequest, Value
from tests.reward_servers import body_of, get, picture_request, post

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "pipelines" / "recipes" / "smoke.yaml")
# Scores a picture by its red, writes the key of each that it begins, and waits for a file before it goes on.
SLOW = """
import pathlib, sys, time
from model_core.rewards import service
from model_core.rewards.verdict import Value

class Slow:
    names = ("red",)
    def score(self, requests):
        for request in requests:
            with open("begun", "a") as stream:
                stream.write(request.key + chr(10))
            while not pathlib.Path("go").exists():
                time.sleep(0.01)
        return [{"red": Value(float(request.image.getpixel((0, 0))[0]))} for request in requests]

sys.exit(service.main(make_scorer=lambda recipe, site, inputs: Slow()))
"""


class Place:
    """A folder that services are started in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[str]] = []
        (folder / "site.yaml").write_text(yaml.safe_dump({"workspace": str(folder / "workspace")}))

    def start(self, *program: str, port: int = 0, recipe: str = RECIPE) -> tuple[subprocess.Popen[str], str]:
        """The process and the uri that it announced."""
        (self.folder / "uri").unlink(missing_ok=True)
        given = ["--recipe", recipe, "--site", "site.yaml", "--port", str(port), "--announce", "uri", "--batch-size", "1"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, *program, *given],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.processes.append(process)
        wait_for(lambda: (self.folder / "uri").exists() or process.poll() is not None)
        assert process.poll() is None, process.communicate()[0]
        return process, (self.folder / "uri").read_text()

    def begun(self) -> list[str]:
        path = self.folder / "begun"
        return path.read_text().split() if path.exists() else []

    def go(self) -> None:
        (self.folder / "go").touch()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    for process in made.processes:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_client_goes_on_when_the_service_is_killed_at_work_and_started_again(place: Place, said: list[str]) -> None:
    process, uri = place.start("-c", SLOW)
    client = HTTPScorer(uri, ("red",), timeout_seconds=60, patience_seconds=60, say=said.append)
    with ThreadPoolExecutor(1) as pool:
        scores = pool.submit(client.score, [picture_request("a", red=7), picture_request("b", red=9)])
        wait_for(lambda: place.begun() == ["a"])
        process.kill()
        process.wait(10)
        wait_for(lambda: bool(said))
        place.go()
        process, _ = place.start("-c", SLOW, port=int(uri.rpartition(":")[2]))
        assert scores.result(60) == [{"red": Value(7.0)}, {"red": Value(9.0)}]
    assert place.begun() == ["a", "a", "b"]
    assert "are back" in said[-1]
    process.terminate()
    assert process.wait(20) == 0


def test_sigterm_finishes_the_batch_at_hand_and_refuses_what_waits(place: Place) -> None:
    process, uri = place.start("-c", SLOW)
    with ThreadPoolExecutor(2) as pool:
        at_work = pool.submit(post, uri, body_of(picture_request("a", red=7), rewards=("red",)))
        wait_for(lambda: place.begun() == ["a"])
        waiting = pool.submit(post, uri, body_of(picture_request("b"), rewards=("red",)))
        wait_for(lambda: "queue_depth 1\n" in get(uri, "/metrics")[1])
        process.terminate()
        assert waiting.result(60)[:2] == (503, {"error": "the service is stopping"})
        place.go()
        assert at_work.result(60)[:2] == (200, {"scores": [{"red": {"value": 7.0, "uncertainty": 0.0}}]})
    assert process.wait(20) == 0
    with pytest.raises(ConnectionRefusedError):
        get(uri, "/healthz")


def test_the_rules_are_served_as_they_score_in_process(place: Place, said: list[str]) -> None:
    (place.folder / "rules.yaml").write_text(yaml.safe_dump({"name": "rules", "mmdit": {"stages": {"S1": {}}}}))
    process, uri = place.start("-m", "model_core.rewards.service", recipe="rules.yaml")
    scenes = held_out_scenes(6, Scenes(), seed=1)
    requests = [
        ScoreRequest(key=str(index), prompt=describe(scene, index), image=render(scene, 64, 1), notes=scene.to_dict())
        for index, scene in enumerate(scenes)
    ]
    client = HTTPScorer(uri, AttributeCheck.names, timeout_seconds=60, patience_seconds=0, say=said.append)
    assert client.score(requests) == AttributeCheck(Scenes()).score(requests)
    with pytest.raises(RewardUnavailable, match="found the rewards taste; allowed are .*check_color"):
        HTTPScorer(uri, ["taste"], timeout_seconds=60, patience_seconds=60, say=said.append).score(requests)
    process.send_signal(signal.SIGINT)
    process.wait(20)


def test_what_keeps_it_from_starting_ends_with_the_code_that_says_so(place: Place) -> None:
    for program, given, code, words in (
        (["-m", "model_core.rewards.service"], ["--port", "70000"], 10, "rewards: --port: found 70000"),
        (["-m", "model_core.rewards.service"], ["--port", "0", "--input", "a=none.json"], 10, "--input a: none.json cannot be read"),
        (["-c", SLOW.replace("Slow())", "1 / 0)")], ["--port", "0"], 30, "ZeroDivisionError"),
    ):
        done = subprocess.run(
            [sys.executable, *program, "--recipe", RECIPE, "--site", "site.yaml", *given],
            cwd=place.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stderr
        assert words in done.stderr
