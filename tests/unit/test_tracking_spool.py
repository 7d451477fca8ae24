"""The spool on disk: what a step has said survives its death, and is said once."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model_core.tracking.spool import Tracker, clean_name, files_folder, has_writer, open_tracker, parse_lines, state_path


def tracker_at(folder: Path, **changes: Any) -> Tracker:
    arguments = {"run": "r1", "step": "train_vae", "stage": None, "key": "0123456789abcdef", "experiment": "darkroom"}
    return open_tracker(folder, **(arguments | changes))


def events(tracker: Tracker, *ops: str) -> list[dict[str, Any]]:
    found = parse_lines(tracker.path.read_bytes())
    return [{name: value for name, value in event.items() if name != "time"} for event in found if not ops or event["op"] in ops]


def curve(tracker: Tracker, name: str) -> list[tuple[int, float]]:
    return [(event["step"], float(event["values"][name])) for event in events(tracker, "metrics") if name in event["values"]]


@pytest.fixture(autouse=True)
def no_adopted_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)


def test_file_is_named_after_run_step_stage_and_key(tmp_path: Path) -> None:
    assert tracker_at(tmp_path).path.name == "r1--train_vae--0123456789abcdef.jsonl"
    assert tracker_at(tmp_path, step="train_mmdit", stage="S6").path.name == "r1--train_mmdit-S6--0123456789abcdef.jsonl"


def test_events_carry_the_time_they_were_written(tmp_path: Path) -> None:
    tracker = tracker_at(tmp_path)
    tracker.metrics({"loss": 1.0}, step=1)
    tracker.metrics({"loss": 0.5}, step=2)
    times = [event["time"] for event in parse_lines(tracker.path.read_bytes())]
    assert times == sorted(times)
    assert abs(times[0] / 1000 - tracker.path.stat().st_mtime) < 5


def test_opening_says_nothing_until_there_is_something_to_say(tmp_path: Path) -> None:
    assert not tracker_at(tmp_path / "spool").path.exists()


def test_resume_does_not_repeat_what_was_said(tmp_path: Path) -> None:
    def attempt(last: int, tracker: Tracker) -> None:
        tracker.params({"lr": 0.1})
        tracker.tags({"stage_key": "k"})
        tracker.dataset("captions", "d" * 64, "file:///x", "input", 10)
        for step in range(1, last):
            tracker.metrics({"loss": 1 / step}, step=step)

    first = tracker_at(tmp_path)
    attempt(6, first)
    first.close()  # as the kernel does for a killed process
    second = tracker_at(tmp_path)
    attempt(10, second)
    assert curve(second, "loss") == [(step, 1 / step) for step in range(1, 10)]
    assert [event["op"] for event in events(second) if event["op"] != "metrics"] == ["start", "params", "tags", "dataset", "start"]
    assert [event["attempt"] for event in events(second, "start")] == [1, 2]


def test_new_name_at_an_old_step_is_kept(tmp_path: Path) -> None:
    tracker = tracker_at(tmp_path)
    tracker.metrics({"a": 1.0}, step=1)
    tracker.metrics({"a": 2.0, "b": 3.0}, step=1)
    assert [event["values"] for event in events(tracker, "metrics")] == [{"a": 1.0}, {"b": 3.0}]


def test_tag_that_changes_back_is_said_each_time(tmp_path: Path) -> None:
    tracker = tracker_at(tmp_path)
    for value in ("a", "a", "b", "a"):
        tracker.tags({"name": value})
    assert [event["values"]["name"] for event in events(tracker, "tags")] == ["a", "b", "a"]


def test_torn_last_line_is_repaired(tmp_path: Path) -> None:
    first = tracker_at(tmp_path)
    first.metrics({"loss": 1.0}, step=1)
    first.close()
    with first.path.open("ab") as file:
        file.write(b'{"op": "metrics", "step": 2, "val')
    second = tracker_at(tmp_path)
    second.metrics({"loss": 0.5}, step=2)
    assert curve(second, "loss") == [(1, 1.0), (2, 0.5)]
    assert all(json.loads(line) for line in second.path.read_bytes().splitlines())


def test_damaged_line_costs_itself_only(tmp_path: Path) -> None:
    tracker = tracker_at(tmp_path)
    tracker.metrics({"loss": 1.0}, step=1)
    tracker.close()
    tracker.path.write_bytes(tracker.path.read_bytes() + b"\x00\x00\n[1]\n")
    again = tracker_at(tmp_path)
    again.metrics({"loss": 0.5}, step=2)
    assert curve(again, "loss") == [(1, 1.0), (2, 0.5)]


def test_finished_step_is_not_told_again_in_its_run(tmp_path: Path) -> None:
    first = tracker_at(tmp_path)
    first.tags({"reused": "false"})
    first.end("FINISHED")
    before = first.path.read_bytes()
    for tracker in (first, tracker_at(tmp_path)):
        tracker.tags({"reused": "true"})
        tracker.end("FINISHED")
    assert first.path.read_bytes() == before


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_failed_step_goes_on_in_its_next_attempt(tmp_path: Path, status: Any) -> None:
    first = tracker_at(tmp_path)
    first.metrics({"loss": 1.0}, step=1)
    first.end(status)
    second = tracker_at(tmp_path)
    second.metrics({"loss": 0.5}, step=2)
    second.end("FINISHED")
    assert [event["status"] for event in events(second, "end")] == [status, "FINISHED"]


def test_second_process_at_the_same_step_is_silent_while_the_first_lives(tmp_path: Path) -> None:
    first, second = tracker_at(tmp_path), tracker_at(tmp_path)
    first.metrics({"loss": 1.0}, step=1)
    assert has_writer(first.path)
    second.metrics({"loss": 9.0}, step=2)
    assert curve(first, "loss") == [(1, 1.0)]
    first.close()
    assert not has_writer(first.path)
    second.metrics({"loss": 0.5}, step=3)
    assert curve(second, "loss") == [(1, 1.0), (3, 0.5)]


def test_everything_said_before_kill_9_is_on_disk_and_the_lock_is_free(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from model_core.tracking.spool import open_tracker\n"
        "t = open_tracker(pathlib.Path(sys.argv[1]), run='r1', step='train_vae', stage=None, key='0123456789abcdef', experiment='e')\n"
        "for step in range(10**6): t.metrics({'loss': 1.0}, step=step); print(step, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(20):
            said = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        said = max([said, *map(int, process.stdout.read().split())])
    tracker = tracker_at(tmp_path)
    assert not has_writer(tracker.path)
    assert [step for step, _ in curve(tracker, "loss")][: said + 1] == list(range(said + 1))


def test_step_process_needs_no_mlflow() -> None:
    code = "import sys, model_core.tracking.spool; sys.exit(any(name in sys.modules for name in ('mlflow', 'torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_not_a_number_and_infinity_survive(tmp_path: Path) -> None:
    tracker = tracker_at(tmp_path)
    tracker.metrics({"a": math.nan, "b": math.inf, "c": -math.inf}, step=0)
    values = events(tracker, "metrics")[0]["values"]
    assert math.isnan(float(values["a"]))
    assert (float(values["b"]), float(values["c"])) == (math.inf, -math.inf)


def test_nested_parameters_become_dotted_names_and_long_values_end_in_dots(tmp_path: Path) -> None:
    tracker = tracker_at(tmp_path)
    tracker.params({"vae": {"lr": 1e-3, "widths": [1, 2]}, "note": "x" * 7000})
    values = events(tracker, "params")[0]["values"]
    assert (values["vae.lr"], values["vae.widths"]) == ("0.001", "[1, 2]")
    assert (len(values["note"]), values["note"][-4:]) == (6000, "x...")


def test_image_is_copied_and_outlives_the_original(tmp_path: Path) -> None:
    picture = tmp_path / "grid.png"
    picture.write_bytes(b"picture")
    tracker = tracker_at(tmp_path / "spool")
    tracker.image("samples/cfg4", picture, 100)
    tracker.image("samples/cfg4", picture, 100)
    picture.unlink()
    (event,) = events(tracker, "image")
    assert (event["key"], event["step"]) == ("samples/cfg4", 100)
    assert (files_folder(tracker.path) / event["file"]).read_bytes() == b"picture"


def test_trouble_with_the_spool_is_said_once_and_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spool").write_text("a file where the folder should be")
    tracker = tracker_at(tmp_path / "spool")
    tracker.metrics({"loss": 1.0}, step=1)
    tracker.image("samples", tmp_path / "missing.png", 1)
    tracker.end("FINISHED")
    assert capsys.readouterr().err.count("the step goes on") == 1


def test_run_id_is_the_drainers_or_the_platforms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = tracker_at(tmp_path)
    assert tracker.run_id() is None
    state_path(tracker.path).write_text('{"run_id": "abc"}')
    assert tracker.run_id() == "abc"
    monkeypatch.setenv("MLFLOW_RUN_ID", "from-the-platform")
    adopting = tracker_at(tmp_path, step="train_mmdit")
    assert adopting.run_id() == "from-the-platform"
    adopting.tags({"a": "b"})
    assert events(adopting, "start")[0]["adopt"] == "from-the-platform"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train/loss", "train/loss"),
        ("/a//b/../c/", "a/b/c"),
        ("psnr (dB), 中", "psnr _dB__ _"),
        ("", "_"),
        ("a b-c.d:e_f", "a b-c.d:e_f"),
    ],
)
def test_names_are_made_fit_for_mlflow(name: str, expected: str) -> None:
    assert clean_name(name) == expected
