"""The spool: what a step has to say to MLflow, as synced lines of a file. Nothing here talks to a server or imports MLflow.

A dead tracking server therefore stops nothing and loses nothing. One file holds one step of one run:
`<spool>/<run>--<step>[-<stage>]--<key>.jsonl`. Each line is an event with the time (milliseconds since 1970) at which it was
written; the server gets that time, so that sending a line twice leaves one point. `model_core.tracking.drain` sends the
lines and writes `<file>.run.json`, with the run's id, beside them.
"""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

SUFFIX = ".jsonl"
_LOCK_WAIT_SECONDS = 0.5  # the drainer holds a spool's lock for the blink in which it looks whether the writer lives
_VALUE_CHARACTERS = 6000  # MLflow cuts longer parameters without a word; here they end in dots


class Tracker:
    """Writes one step's spool. Never raises for trouble with the spool, never waits for a server.

    Opening an existing spool continues it. Training repeats itself bitwise, so what a killed attempt has already said is
    not said again: charts do not zig-zag after a resume. When the step has finished in this run, nothing is added any more.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self._header = header
        self._file: io.BufferedRandom | None = None
        self._said: set[str] = set()
        self._points: set[tuple[str, int]] = set()
        self._tags: dict[str, str] = {}
        self._finished = False
        self._warned = False

    def params(self, values: Mapping[str, Any]) -> None:
        """Settings; nested mappings become dotted names, and the drainer puts them below `cfg/`."""
        flat = {clean_name(name): _cut(value) for name, value in _flatten(values)}
        self._once({"op": "params", "values": flat})

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Numbers at a step; a name that has a value at this step already keeps it."""
        if self._ready():
            named = {clean_name(name): float(value) for name, value in values.items()}
            new = {name: value for name, value in named.items() if (name, step) not in self._points}
            if new and self._write({"op": "metrics", "step": step, "values": {name: _encode(value) for name, value in new.items()}}):
                self._points.update((name, step) for name in new)

    def tags(self, values: Mapping[str, str]) -> None:
        """Facts that may change; the newest value counts."""
        if self._ready():
            new = {name: str(value) for name, value in values.items() if self._tags.get(name) != str(value)}
            if new and self._write({"op": "tags", "values": new}):
                self._tags.update(new)

    def image(self, key: str, path: Path, step: int) -> None:
        """A picture of a series `key` at a step; the file is copied into the spool."""
        key = clean_name(key)
        copy = files_folder(self.path) / f"{key.replace('/', '~')}+{step}{path.suffix}"
        event = {"op": "image", "key": key, "step": step, "file": copy.name}
        if self._ready() and _identity(event) not in self._said:
            try:
                copy.parent.mkdir(parents=True, exist_ok=True)
                partial = copy.with_name(f".{copy.name}")
                shutil.copyfile(path, partial)
                partial.replace(copy)
            except OSError as error:
                self._warn(error)
            else:
                self._once(event)

    def dataset(self, name: str, digest: str, uri: str, context: str, rows: int | None) -> None:
        """A dataset that the step has read or, with the context "output", has left."""
        self._once({"op": "dataset", "name": name, "digest": digest, "uri": uri, "context": context, "rows": rows})

    def model_input(self, name: str, *, uri: str, digest: str) -> None:
        """A model that the step has used, told from others by its digest."""
        self._once({"op": "model_input", "name": name, "uri": uri, "digest": digest})

    def model_output(self, name: str, *, uri: str, digest: str, params: Mapping[str, Any]) -> None:
        """The model that the step has left."""
        flat = {clean_name(key): _cut(value) for key, value in _flatten(params)}
        self._once({"op": "model_output", "name": name, "uri": uri, "digest": digest, "params": flat})

    def register_model(self, name: str, *, alias: str, tags: Mapping[str, str]) -> None:
        """The step's model output becomes a version of the registered model `name`, once the step has finished."""
        self._once({"op": "register", "name": name, "alias": alias, "tags": dict(tags)})

    def end(self, status: RunStatus) -> None:
        """The attempt is over."""
        if self._ready() and self._write({"op": "end", "status": status}):
            self._finished = status == "FINISHED"
            self.close()

    def close(self) -> None:
        """Releases the spool, as the end of the process would."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def run_id(self) -> str | None:
        """The MLflow run of this step, None as long as no drainer has made it known."""
        adopted = self._header["adopt"]
        return str(adopted) if adopted else read_state(self.path).get("run_id")

    def _once(self, event: dict[str, Any]) -> None:
        identity = _identity(event)
        if self._ready() and identity not in self._said and self._write(event):
            self._said.add(identity)

    def _ready(self) -> bool:
        """Whether events go to the spool: it is open, ours alone, and its step has not finished."""
        if self._file is None and not self._finished:
            try:
                self._open()
            except OSError as error:
                self._warn(error)
        return self._file is not None and not self._finished

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        if not _lock(file):  # another process is doing this very step; it tells the story
            file.close()
            return
        data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:  # a line that a crash has torn
            file.truncate(len(whole))
            file.seek(len(whole))
        attempts = 0
        for event in parse_lines(whole):
            attempts += event["op"] == "start"
            self._remember(event)
        if self._finished:
            file.close()
            return
        self._file = file
        self._write(self._header | {"attempt": attempts + 1})

    def _remember(self, event: dict[str, Any]) -> None:
        match event["op"]:
            case "metrics":
                self._points.update((name, event["step"]) for name in event["values"])
            case "tags":
                self._tags.update(event["values"])
            case "end":
                self._finished = event["status"] == "FINISHED"
            case _:
                self._said.add(_identity(event))

    def _write(self, event: dict[str, Any]) -> bool:
        assert self._file is not None
        line = json.dumps(event | {"time": time.time_ns() // 1_000_000}, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            self._file.write(line.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self._warn(error)
            return False
        return True

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            print(f"tracking: {self.path}: {error.strerror or error}; the step goes on, its history has gaps", file=sys.stderr, flush=True)
            self._warned = True


def open_tracker(spool_dir: Path, *, run: str, step: str, stage: str | None, key: str, experiment: str) -> Tracker:
    """The tracker of one step of one run. The file is made with the first event.

    When a platform has already made an MLflow run for this task (MLFLOW_RUN_ID, as Kubeflow Pipelines does), it is adopted.
    """
    label = step if stage is None else f"{step}-{stage}"
    adopt = os.environ.get("MLFLOW_RUN_ID") or None
    header = {"op": "start", "run": run, "step": step, "stage": stage, "key": key, "experiment": experiment, "adopt": adopt}
    return Tracker(spool_dir / f"{run}--{label}--{key}{SUFFIX}", header)


def spool_files(spool_dir: Path) -> list[Path]:
    """All spools in a folder, by name."""
    return sorted(spool_dir.glob(f"*{SUFFIX}"))


def files_folder(spool: Path) -> Path:
    """Where the files lie that a spool's events name."""
    return spool.with_suffix(".files")


def state_path(spool: Path) -> Path:
    """Where the drainer notes what it has sent of a spool, and the ids it has found."""
    return spool.with_name(spool.name + ".run.json")


def read_state(spool: Path) -> dict[str, Any]:
    """The drainer's note on a spool; empty when there is none."""
    try:
        state = json.loads(state_path(spool).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def has_writer(spool: Path) -> bool:
    """Whether a living process has the spool open: the kernel releases its lock however it dies."""
    with spool.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def parse_lines(data: bytes) -> Iterator[dict[str, Any]]:
    """The events in whole lines; a line that is none (a damaged disk) is passed over."""
    for line in data.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "op" in event and "time" in event:
            yield event


def clean_name(name: str) -> str:
    """`name` as MLflow takes it: letters, digits, `_ - . space :`, with `/` only between parts."""
    parts = [re.sub(r"[^\w\-. :]", "_", part, flags=re.ASCII) for part in name.split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:250] or "_"


def _encode(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no NaN


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _cut(text: str) -> str:
    return text if len(text) <= _VALUE_CHARACTERS else text[: _VALUE_CHARACTERS - 3] + "..."


def _identity(event: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in event.items() if name != "time"}, sort_keys=True)


def _lock(file: io.BufferedRandom) -> bool:
    deadline = time.monotonic() + _LOCK_WAIT_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
