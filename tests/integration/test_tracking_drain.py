"""Spools sent to a real MLflow server that dies on the way."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import PIL.Image
import pytest
from mlflow.entities import ViewType

from model_core.tracking.drain import drain, main
from model_core.tracking.spool import Tracker, open_tracker, read_state, spool_files, state_path
from model_core.tracking.ui import ui_command

START_SECONDS = 120


class Server:
    """`mlflow server` on an SQLite file, as `darkroom ui` starts it, with a store of its own for artifacts."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.url = folder, f"http://127.0.0.1:{self.port}"
        self.database = folder / "server.db"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [*ui_command(f"sqlite:///{self.database}", port=self.port), "--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                assert time.monotonic() < deadline, (self.folder / "server.log").read_text()
                time.sleep(0.2)

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    for _ in tell_training(server.folder / "spool", "local", steps=4):  # a run without a server comes first, into the same database
        pass
    assert drain(server.folder / "spool", f"sqlite:///{server.database}").complete
    server.start()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def tell_training(spool: Path, experiment: str, *, steps: int = 1200) -> Iterator[None]:
    """Two steps as a run would tell them; stops after each part, for the test to disturb."""
    vae = tracker(spool, experiment, "train_vae", key="a" * 16)
    vae.params({"vae": {"lr": 0.002, "steps": steps}})
    vae.tags({"reused": "false"})
    for step in range(1, steps + 1):
        if step % 2:  # one line in two, or syncing the disk would take the time of this test
            vae.metrics({"train/loss": 1 / step, "train/norm": float(step)}, step=step)
        if step == steps // 2:
            yield
    picture = spool.parent / "grid.png"
    PIL.Image.new("RGB", (24, 16), "red").save(picture)
    vae.image("samples/reconstructions", picture, steps)
    vae.dataset("captions", "c" * 64, "s3://bucket/captions", "input", 100)
    vae.dataset("latents", "d" * 64, "file:///w/latents", "output", 90)
    yield
    vae.model_output("train_vae", uri="file:///w/train_vae/aa", digest="e" * 64, params={"ema": 0.99})
    vae.end("FINISHED")
    registration = tracker(spool, experiment, "register_model", key="b" * 16)
    registration.model_input("train_vae", uri="file:///w/train_vae/aa", digest="e" * 64)
    registration.register_model(f"painter-{experiment}", alias="candidate", tags={"score/judge/mean": "0.9"})
    yield
    registration.model_output("register_model", uri="file:///w/register_model/bb", digest=f"{experiment:f<64}"[:64], params={})
    registration.end("FINISHED")


def tracker(spool: Path, experiment: str, step: str, **changes: Any) -> Tracker:
    arguments = {"run": "r1", "stage": None, "key": "0123456789abcdef", "experiment": experiment}
    return open_tracker(spool, step=step, **(arguments | changes))


def history(uri: str, experiment: str) -> dict[str, Any]:
    """Everything that a reader of the experiment sees, ids and random names aside."""
    client = mlflow.MlflowClient(uri, registry_uri=uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    models = {model.model_id: model for model in client.search_logged_models([found.experiment_id])}
    runs = {run.info.run_id: client.get_run(run.info.run_id) for run in client.search_runs([found.experiment_id])}
    names = {run_id: run.info.run_name for run_id, run in runs.items()}
    told: dict[str, Any] = {"kind": found.tags["mlflow.experimentKind"], "models": [], "versions": []}
    for run_id, run in runs.items():
        points = {name: [(p.step, p.value) for p in client.get_metric_history(run_id, name)] for name in run.data.metrics}
        told[run.info.run_name] = {
            "status": run.info.status,
            "parent": names.get(run.data.tags.get("mlflow.parentRunId", "")),
            "tags": {name: value for name, value in run.data.tags.items() if name not in ("mlflow.parentRunId", "mlflow.runName")},
            "params": run.data.params,
            "points": {name: sorted(curve) for name, curve in points.items()},
            "datasets": sorted(
                (entry.dataset.name, entry.dataset.digest, entry.dataset.source_type, sorted((tag.key, tag.value) for tag in entry.tags))
                for entry in run.inputs.dataset_inputs
            ),
            "inputs": [models[entry.model_id].name for entry in run.inputs.model_inputs],
            "outputs": [models[entry.model_id].name for entry in run.outputs.model_outputs],
            "images": sorted(
                path.path.split("+timestamp+")[0] + Path(path.path).suffix for path in client.list_artifacts(run_id, "images")
            ),
        }
    for model in models.values():
        told["models"].append((model.name, str(model.status), model.tags["uri"], model.params, names.get(model.source_run_id or "")))
    for version in client.search_model_versions(f"name='painter-{experiment}'"):
        alias = client.get_model_version_by_alias(version.name, "candidate").version
        told["versions"].append((str(version.version), str(alias), version.tags, names[version.run_id], version.source.split("/")[0]))
    told["models"].sort(key=str)
    return told


@pytest.fixture(scope="module")
def undisturbed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    spool = tmp_path_factory.mktemp("undisturbed") / "spool"
    for _ in tell_training(spool, "undisturbed"):
        pass
    report = drain(spool, server.url)
    assert (report.complete, report.warnings) == (True, [])
    assert sorted(report.runs) == [path.name for path in spool_files(spool)]
    return renamed(history(server.url, "undisturbed"), "undisturbed")


def renamed(told: dict[str, Any], experiment: str) -> dict[str, Any]:
    """Digests of registered models hold the experiment's name, as the registry is one for all tests."""
    for version in told["versions"]:
        version[2].pop("digest")
    return told


def test_history_says_what_the_steps_said(undisturbed: dict[str, Any]) -> None:
    vae, registration, parent = undisturbed["train_vae"], undisturbed["register_model"], undisturbed["r1"]
    assert undisturbed["kind"] == "custom_model_development"
    assert (parent["status"], parent["parent"], parent["tags"]["stage"]) == ("FINISHED", None, "pipeline")
    assert (vae["status"], vae["parent"], registration["parent"]) == ("FINISHED", "r1", "r1")
    assert vae["params"] == {"cfg/vae.lr": "0.002", "cfg/vae.steps": "1200"}
    assert vae["points"]["train/loss"] == [(step, 1 / step) for step in range(1, 1201, 2)]
    assert (vae["tags"]["stage_key"], vae["tags"]["attempts"], vae["tags"]["output.dataset/latents"]) == ("a" * 16, "1", "d" * 64)
    assert [entry[:3] for entry in vae["datasets"]] == [("captions", "c" * 32, "s3"), ("latents", "d" * 32, "local")]
    assert ("mlflow.data.context", "output") in vae["datasets"][1][3]
    assert vae["images"] == ["images/samples~reconstructions+step+1200.png", "images/samples~reconstructions+step+1200.webp"]
    assert (vae["inputs"], vae["outputs"]) == ([], ["train_vae"])
    assert (registration["inputs"], registration["outputs"]) == (["train_vae"], ["register_model"])
    assert undisturbed["models"][1] == ("train_vae", "READY", "file:///w/train_vae/aa", {"ema": "0.99"}, "train_vae")
    expected_tags = {"uri": "file:///w/register_model/bb", "score/judge/mean": "0.9"}
    assert undisturbed["versions"] == [("1", "1", expected_tags, "register_model", "models:")]


def test_server_killed_in_the_middle_leaves_the_history_of_an_undisturbed_run(
    server: Server, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    spool = tmp_path / "spool"
    story = tell_training(spool, "disturbed")
    next(story)
    assert drain(spool, server.url).complete
    assert history(server.url, "disturbed")["train_vae"]["status"] == "RUNNING"
    server.kill()
    next(story)
    report = drain(spool, server.url)
    assert report.error is not None
    assert report.pending_spools == [spool_files(spool)[0].name]
    for _ in story:
        pass
    server.start()
    assert drain(spool, server.url).complete
    assert renamed(history(server.url, "disturbed"), "disturbed") == undisturbed


def test_sending_everything_a_second_time_changes_nothing(server: Server, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    spool = tmp_path / "spool"
    for _ in tell_training(spool, "repeated"):
        drain(spool, server.url)
    for path in spool_files(spool):
        state_path(path).unlink(missing_ok=True)  # as if the drainer had died before it could note anything
    assert drain(spool, server.url).complete
    for path in spool_files(spool):
        state_path(path).unlink()
    assert drain(spool, server.url).complete
    assert renamed(history(server.url, "repeated"), "repeated") == undisturbed


def test_step_that_is_killed_and_resumed_is_one_run_with_one_curve(server: Server, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    first = tracker(spool, "resumed", "train_vae")
    for step in range(6):
        first.metrics({"loss": float(-step)}, step=step)
    first.close()  # the process is gone
    assert drain(spool, server.url).complete
    told = history(server.url, "resumed")
    assert (told["train_vae"]["status"], told["r1"]["status"]) == ("KILLED", "KILLED")
    second = tracker(spool, "resumed", "train_vae")
    for step in range(3, 9):
        second.metrics({"loss": float(-step)}, step=step)
    assert drain(spool, server.url).complete
    assert history(server.url, "resumed")["train_vae"]["status"] == "RUNNING"
    second.end("FINISHED")
    assert drain(spool, server.url).complete
    told = history(server.url, "resumed")
    assert told["train_vae"]["points"]["loss"] == [(step, float(-step)) for step in range(9)]
    assert (told["train_vae"]["status"], told["r1"]["status"], told["train_vae"]["tags"]["attempts"]) == ("FINISHED", "FINISHED", "2")


def test_run_made_by_the_platform_is_adopted(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = mlflow.MlflowClient(server.url)
    experiment = client.create_experiment("adopted")
    parent = client.create_run(experiment, run_name="kubeflow-run").info.run_id
    task = client.create_run(experiment, run_name="kubeflow-task", tags={"mlflow.parentRunId": parent}).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", task)
    step = tracker(tmp_path / "spool", "adopted", "train_vae")
    step.metrics({"loss": 1.0}, step=1)
    step.end("FINISHED")
    assert drain(tmp_path / "spool", server.url).complete
    assert os.environ["MLFLOW_RUN_ID"] == task
    assert len(client.search_runs([experiment])) == 2
    run = client.get_run(task)
    assert (run.info.run_name, run.data.tags["stage_key"], run.data.metrics["loss"]) == ("kubeflow-task", "0123456789abcdef", 1.0)


def test_event_that_the_server_refuses_is_named_and_holds_nothing_up(server: Server, tmp_path: Path) -> None:
    step = tracker(tmp_path / "spool", "refused", "train_vae")
    step.params({"lr": 1})
    step.params({"lr": 2})  # MLflow never changes a parameter
    step.metrics({"loss": 1.0}, step=1)
    step.end("FINISHED")
    report = drain(tmp_path / "spool", server.url)
    assert report.complete
    assert len([warning for warning in report.warnings if "parameter lr" in warning]) == 1
    told = history(server.url, "refused")["train_vae"]
    assert (told["params"], told["points"], told["status"]) == ({"cfg/lr": "1"}, {"loss": [(1, 1.0)]}, "FINISHED")


def test_run_that_a_user_deleted_stays_deleted(server: Server, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    step = tracker(spool, "deleted", "train_vae")
    step.metrics({"loss": 1.0}, step=1)
    drain(spool, server.url)
    client = mlflow.MlflowClient(server.url)
    client.delete_run(read_state(step.path)["run_id"])
    step.metrics({"loss": 1.0}, step=2)
    step.end("FINISHED")
    assert drain(spool, server.url).complete
    experiment = client.get_experiment_by_name("deleted")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id], run_view_type=ViewType.DELETED_ONLY)) == 1


def test_two_drainers_send_each_event_once(server: Server, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    for _ in tell_training(spool, "raced"):
        pass
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda _: drain(spool, server.url), range(2)))
    assert [report.complete for report in reports] == [True, True]
    assert sorted(report.sent_events > 0 for report in reports) == [False, True]
    told = history(server.url, "raced")
    assert sorted(name for name in told if name not in ("kind", "models", "versions")) == ["r1", "register_model", "train_vae"]
    assert len(told["versions"]) == 1


def test_follower_tells_all_after_its_process_is_killed(tmp_path: Path) -> None:
    spool, uri = tmp_path / "spool", f"sqlite:///{tmp_path / 'local' / 'mlflow.db'}"
    step = tracker(spool, "followed", "train_vae")
    step.metrics({"loss": 1.0}, step=1)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        command = [sys.executable, "-m", "model_core.tracking.drain", "--spool", str(spool), "--uri", uri, "--follow", str(process.pid)]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as drainer:
            deadline = time.monotonic() + 60
            while step.run_id() is None:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            step.metrics({"loss": 0.5}, step=2)
            step.end("FINISHED")
            process.kill()
            assert drainer.wait(60) == 0
            assert drainer.stderr is not None
            assert drainer.stderr.read() == b""
    told = history(uri, "followed")
    assert (told["train_vae"]["points"]["loss"], told["train_vae"]["status"]) == ([(1, 1.0), (2, 0.5)], "FINISHED")


def test_local_database_holds_pictures_beside_it_and_a_server_shows_them(server: Server) -> None:
    (spool,) = [path for path in spool_files(server.folder / "spool") if "train_vae" in path.name]
    run_id = read_state(spool)["run_id"]
    assert len(list((server.folder / "mlartifacts").rglob("*.png"))) == 1
    pictures = [found.path for found in mlflow.MlflowClient(server.url).list_artifacts(run_id, "images")]
    (picture,) = [path for path in pictures if path.endswith(".png")]
    query = urllib.parse.urlencode({"path": picture, "run_uuid": run_id})
    with urllib.request.urlopen(f"{server.url}/get-artifact?{query}", timeout=30) as answer:
        assert answer.read(8) == b"\x89PNG\r\n\x1a\n"


def test_run_that_the_server_does_not_know_is_told_from_its_beginning(server: Server, tmp_path: Path) -> None:
    step = tracker(tmp_path / "spool", "moved", "train_vae")
    step.metrics({"loss": 1.0}, step=1)
    step.close()
    state = {"tracking_uri": server.url, "run_id": "0" * 32, "offset": step.path.stat().st_size, "status": "RUNNING"}
    state_path(step.path).write_text(json.dumps(state))
    assert drain(tmp_path / "spool", server.url).complete
    assert history(server.url, "moved")["train_vae"]["points"] == {"loss": [(1, 1.0)]}


def test_server_that_is_away_is_told_of_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = tracker(tmp_path, "away", "train_vae")
    step.metrics({"loss": 1.0}, step=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        assert main(["--spool", str(tmp_path), "--uri", url]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"1 spools are kept in {tmp_path}" in said
