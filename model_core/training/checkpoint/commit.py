"""The document that makes a folder of files a checkpoint, and where things lie."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model_core.storage import Storage

COMMIT = "COMMIT.json"
_PATH = re.compile(r"step-(?P<step>\d{8,})/((?P<attempt>attempt-[0-9a-f]{8})/)?(?P<name>[^/]+)")


class SavedFile(BaseModel):
    """One file of an attempt."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(pattern=r"^(\.metadata|values\.json|__\d+_\d+\.distcp)$")
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Commit(BaseModel):
    """What a checkpoint consists of, and what its writer noted down with it."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_version: Literal[1] = Field(1, alias="schema")
    step: int = Field(ge=0)
    attempt: str = Field(pattern=r"^attempt-[0-9a-f]{8}$")
    files: tuple[SavedFile, ...]
    world_size: int = Field(ge=1)
    notes: dict[str, Any]
    created_at: str

    def to_bytes(self) -> bytes:
        """Sorted keys, two spaces, a final newline."""
        return (json.dumps(self.model_dump(by_alias=True), sort_keys=True, indent=2) + "\n").encode()


def read_commit(storage: Storage, path: str) -> Commit:
    """A commit as it is stored. Raises ValueError when the object at `path` is none, NotFoundError when there is no object."""
    data = storage.get(path)
    try:
        return Commit.model_validate(json.loads(data))
    except ValidationError as error:
        raise ValueError(f"{storage.uri}/{path}: not a commit ({error.errors()[0]['msg']})") from error
    except ValueError as error:
        raise ValueError(f"{storage.uri}/{path}: not a commit (not JSON)") from error


def step_folder(prefix: str, step: int) -> str:
    """Where a checkpoint lies, as a path in the store."""
    return f"{prefix}/step-{step:08d}"


def parts_of(prefix: str, path: str) -> tuple[int, str | None, str] | None:
    """(step, attempt, file name) of an object's path; a commit has no attempt. None for what is no part of a checkpoint."""
    found = _PATH.fullmatch(path.removeprefix(f"{prefix}/"))
    return None if found is None else (int(found["step"]), found["attempt"], found["name"])


def committed_steps(storage: Storage, prefix: str) -> list[int]:
    """Steps that have a commit, in rising order."""
    found = (parts_of(prefix, entry.path) for entry in storage.list(f"{prefix}/step-"))
    return sorted(parts[0] for parts in found if parts is not None and parts[1:] == (None, COMMIT))
