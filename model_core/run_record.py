"""What happened in one run: `<workspace>/runs/<run>/run.json` and a small record for each step."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from model_core.documents import UserError
from model_core.storage import NotFoundError, Storage

Status = Literal["running", "done", "failed"]


@dataclass(frozen=True)
class StepRecord:
    """One step of a run. `seconds` is the step's own time; `reused` says that an earlier run had done it."""

    step: str
    stage: str | None
    key: str
    status: Status
    seconds: float
    reused: bool
    uri: str
    started_at: str
    error: str | None = None

    @property
    def label(self) -> str:
        """Step and stage in one word."""
        return self.step if self.stage is None else f"{self.step}-{self.stage}"


@dataclass(frozen=True)
class RunRecord:
    """One run of the pipeline: its name, the whole recipe, and when it began."""

    run: str
    recipe: dict[str, Any]
    recipe_digest: str
    started_at: str


def check_run_name(name: str) -> str:
    """The name, when it can name a folder everywhere; raises UserError otherwise."""
    if not 1 <= len(name) <= 100 or not all(c.isascii() and (c.isalnum() or c in "-_.") for c in name) or name.startswith("."):
        raise UserError(f"run name: found {name!r}; allowed are up to 100 letters, digits, '-', '_' and '.'")
    return name


def write_run(storage: Storage, record: RunRecord) -> None:
    """Writes `run.json`."""
    storage.put(f"runs/{record.run}/run.json", _json(asdict(record)))


def read_run(storage: Storage, run: str) -> RunRecord:
    """Reads `run.json`; raises UserError naming the runs there are when it does not exist."""
    try:
        return RunRecord(**json.loads(storage.get(f"runs/{check_run_name(run)}/run.json")))
    except NotFoundError as error:
        known = run_names(storage)
        raise UserError(f"run: found {run!r}; {storage.uri} holds {', '.join(known[-5:]) if known else 'no run yet'}") from error


def run_names(storage: Storage) -> list[str]:
    """Names of all runs, in order of their names."""
    return [entry.path.split("/")[1] for entry in storage.list("runs/") if entry.path.count("/") == 2 and entry.path.endswith("/run.json")]


def write_step(storage: Storage, run: str, record: StepRecord) -> None:
    """Writes the record of one step, over an earlier one of the same step."""
    storage.put(f"runs/{run}/steps/{record.label}.json", _json(asdict(record)))


def read_steps(storage: Storage, run: str) -> list[StepRecord]:
    """The records of a run's steps in the order in which they began."""
    prefix = f"runs/{run}/steps/"
    records = [StepRecord(**json.loads(storage.get(entry.path))) for entry in storage.list(prefix)]
    return sorted(records, key=lambda record: record.started_at)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
