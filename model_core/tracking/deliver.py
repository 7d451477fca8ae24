"""Tells one spool's story to MLflow, event by event, and remembers in the spool's state how far it came."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model_core.tracking.sender import BATCH_METRICS, BATCH_PAIRS, RunVanished, Sender, is_refusal
from model_core.tracking.spool import files_folder, has_writer, parse_lines, state_path


@dataclass
class DrainReport:
    """What one drain has done. `error` says why it stopped early; what was not sent stays in the spools."""

    sent_events: int = 0
    pending_spools: list[str] = field(default_factory=list)
    runs: dict[str, str] = field(default_factory=dict)  # spool -> run id
    warnings: list[str] = field(default_factory=list)  # events that the server has refused for good
    error: str | None = None

    @property
    def complete(self) -> bool:
        """Whether everything that was in the spools has been dealt with."""
        return self.error is None and not self.pending_spools


@dataclass
class Spool:
    """A spool as it was when the drain began: later lines wait for the next one."""

    path: Path
    size: int
    state: dict[str, Any]

    @property
    def settled(self) -> bool:
        """Whether all is sent and the run is not left open."""
        return self.state.get("offset") == self.size and self.state.get("status") not in (None, "RUNNING")


def send_spool(sender: Sender, spool: Spool, tracking_uri: str, report: DrainReport) -> None:
    """Sends the events of a spool that are not sent yet; with a writer that died without a word, the run ends as KILLED."""
    with spool.path.open("rb") as file:
        data = file.read(spool.size)
    if not any(event["op"] == "start" for event in parse_lines(data)):
        report.warnings.append(f"{spool.path.name}: its first line is damaged, so nobody knows what it tells of")
        spool.state = {"tracking_uri": tracking_uri, "offset": spool.size, "status": "LOST"}
        _save(spool)
        return
    try:
        if "run_id" in spool.state and sender.is_deleted(spool.state["run_id"]):
            spool.state |= {"offset": spool.size, "status": "DELETED"}  # somebody has thrown it away and wants no more of it
            _save(spool)
            return
    except RunVanished:
        spool.state = {}
    if "run_id" not in spool.state:
        spool.state = _open_run(sender, data, tracking_uri)
        _save(spool)
    _Story(sender, spool, report).send(data)
    untouched = whole_size(spool.path) == spool.size
    if spool.state["status"] == "RUNNING" and untouched and not has_writer(spool.path):
        # The process is gone without a word; a next attempt opens the run again.
        _set_status(sender, spool, "KILLED", max(event["time"] for event in parse_lines(data)))
        _save(spool)


def _open_run(sender: Sender, data: bytes, tracking_uri: str) -> dict[str, Any]:
    start = next(event for event in parse_lines(data) if event["op"] == "start")
    experiment = sender.experiment(start["experiment"])
    parent = None if start["adopt"] else sender.pipeline_run(experiment, start["run"], started=start["time"])
    return {
        "tracking_uri": tracking_uri,
        "experiment_id": experiment,
        "run": start["run"],
        "parent_run_id": parent,
        "run_id": sender.step_run(experiment, start, parent=parent),
        "offset": 0,
        "status": None,
        "ended": None,
    }


class _Story:
    """Sends the unsent events of one spool in order, metrics in batches."""

    def __init__(self, sender: Sender, spool: Spool, report: DrainReport) -> None:
        self._sender, self._spool, self._report = sender, spool, report
        self._run_id: str = spool.state["run_id"]
        self._points: list[tuple[str, float, int, int]] = []

    def send(self, data: bytes) -> None:
        state = self._spool.state
        offset = state["offset"]
        for line in data[offset:].splitlines(keepends=True):
            for event in parse_lines(line):
                if event["op"] == "metrics":
                    self._points += [(name, float(value), event["time"], event["step"]) for name, value in event["values"].items()]
                else:
                    self._apply(event)
                self._report.sent_events += 1
            offset += len(line)
            if len(self._points) >= BATCH_METRICS:
                self._flush()
                state["offset"] = offset
                _save(self._spool)
        self._flush()
        state["offset"] = offset
        _save(self._spool)

    def _flush(self) -> None:
        while self._points:
            batch, self._points = self._points[:BATCH_METRICS], self._points[BATCH_METRICS:]
            if not self._tried(f"{len(batch)} points", self._sender.metrics, self._run_id, batch) and len(batch) > 1:
                for point in batch:  # one bad point must not take the others with it
                    self._tried(f"point {point[0]} at step {point[3]}", self._sender.metrics, self._run_id, [point])

    def _apply(self, event: dict[str, Any]) -> None:
        sender, state, run_id = self._sender, self._spool.state, self._run_id
        match event["op"]:
            case "start":
                self._tried("the attempt", sender.tags, run_id, {"attempts": str(event["attempt"])})
                _set_status(sender, self._spool, "RUNNING", None)
            case "params":
                for chunk in _chunks(event["values"]):
                    if not self._tried("parameters", sender.params, run_id, chunk):
                        for name, value in chunk.items():
                            self._tried(f"parameter {name}", sender.params, run_id, {name: value})
            case "tags":
                for chunk in _chunks(event["values"]):
                    self._tried(f"tags {', '.join(chunk)}", sender.tags, run_id, chunk)
            case "image":
                file = files_folder(self._spool.path) / event["file"]
                if file.exists():
                    self._tried(
                        f"image {event['key']}", sender.image, run_id, file, key=event["key"], step=event["step"], moment=event["time"]
                    )
                else:
                    self._report.warnings.append(f"{self._spool.path.name}: image {event['key']}: {file.name} is gone")
            case "dataset":
                if self._tried(f"dataset {event['name']}", sender.dataset, run_id, event) and event["context"] == "output":
                    state["dataset_digest"] = event["digest"]
            case "model_input":
                self._tried(f"model {event['name']}", sender.model_input, run_id, state["experiment_id"], event)
            case "model_output":
                state["model_id"] = self._tried(f"model {event['name']}", sender.model_output, run_id, state["experiment_id"], event)
                state["model"] = {"uri": event["uri"], "digest": event["digest"]}
            case "register":
                state["register"] = event
            case "end":
                self._flush()
                if event["status"] == "FINISHED" and "register" in state and state.get("model_id"):
                    request = state["register"]
                    tags = request["tags"] | state["model"]
                    state["version"] = self._tried(
                        f"model {request['name']}", sender.register, run_id, state["model_id"], request, tags=tags
                    )
                _set_status(sender, self._spool, event["status"], event["time"])

    def _tried(self, what: str, call: Any, *arguments: Any, **named: Any) -> Any:
        """What the call returns (True for None); None, and a warning, when the server refuses for good."""
        try:
            result = call(*arguments, **named)
        except Exception as error:
            if not is_refusal(error):
                raise
            self._report.warnings.append(f"{self._spool.path.name}: {what}: {one_line(error)}")
            return None
        return True if result is None else result


def close_pipelines(sender: Sender, spools: list[Spool], report: DrainReport) -> None:
    """Gives parent runs the status that follows from their steps: running while one runs, else as the last one ended."""
    pipelines: dict[str, list[Spool]] = {}
    for spool in spools:
        if spool.state.get("parent_run_id"):
            pipelines.setdefault(spool.state["parent_run_id"], []).append(spool)
    for parent, steps in pipelines.items():
        last = max(steps, key=lambda spool: spool.state["ended"] or 0).state
        if last["ended"] is None:
            continue
        status = "RUNNING" if any(spool.state["status"] in (None, "RUNNING") for spool in steps) else last["status"]
        if any(spool.state.get("parent_status") != [status, last["ended"]] for spool in steps):
            try:
                sender.set_status(parent, status, ended=last["ended"])
            except Exception as error:
                if not is_refusal(error):
                    raise
                report.warnings.append(f"run {last['run']}: {one_line(error)}")
            for spool in steps:
                spool.state["parent_status"] = [status, last["ended"]]
                _save(spool)


def _set_status(sender: Sender, spool: Spool, status: str, ended: int | None) -> None:
    sender.set_status(spool.state["run_id"], status, ended=ended)
    spool.state |= {"status": status, "ended": ended}


def _save(spool: Spool) -> None:
    target = state_path(spool.path)
    partial = target.with_name(f".{target.name}")
    with partial.open("w") as file:
        json.dump(spool.state, file, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(target)


def _chunks(values: dict[str, str]) -> Iterator[dict[str, str]]:
    names = list(values)
    for first in range(0, len(names), BATCH_PAIRS):
        yield {name: values[name] for name in names[first : first + BATCH_PAIRS]}


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def whole_size(path: Path) -> int:
    """Bytes of the spool's whole lines."""
    data = path.read_bytes()
    return data.rfind(b"\n") + 1
