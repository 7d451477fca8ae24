"""The document that makes a folder of files a checkpoint, and where things lie."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model_core.storage import Storage

COMMIT = "COMMIT.json"


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


def parse_commit(data: bytes) -> Commit:
    """A commit from its bytes; raises ValueError when they are not one."""
    try:
        return Commit.model_validate(json.loads(data))
    except ValidationError as error:
        raise ValueError(f"not a commit ({error.errors()[0]['msg']})") from error
    except ValueError as error:
        raise ValueError("not a commit (not JSON)") from error


def step_folder(prefix: str, step: int) -> str:
    """Where a checkpoint lies, as a path in the store."""
    return f"{prefix}/step-{step:08d}"


def committed_steps(storage: Storage, prefix: str) -> list[int]:
    """Steps that have a commit, in rising order."""
    parts = [entry.path.removeprefix(f"{prefix}/").split("/") for entry in storage.list(f"{prefix}/step-")]
    return sorted(int(part[0].removeprefix("step-")) for part in parts if len(part) == 2 and part[1] == COMMIT)
