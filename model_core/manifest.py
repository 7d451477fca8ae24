"""What a step leaves behind: a small JSON that is all that passes between steps."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model_core.documents import UserError, canonical_digest, describe

SCHEMA = 1
FILE_NAME = "manifest.json"

ManifestKind = Literal["dataset", "model", "evaluation", "report"]
Sha256 = str


class Part(BaseModel):
    """A piece of a manifest: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(Part):
    """One file, named relative to the manifest's uri."""

    path: str
    bytes: int = Field(ge=0)
    sha256: Sha256 = Field(pattern=r"^[0-9a-f]{64}$")


class Parent(Part):
    """An input of the step: the name it was taken under, and the digest of its manifest's bytes."""

    name: str
    step: str
    key: str
    digest: Sha256


class Code(Part):
    """Which code ran; None where it cannot be known (no git checkout, no image)."""

    version: str
    git_sha: str | None
    image_digest: str | None


class TrackedRun(Part):
    """Where MLflow holds the step's run; None until the tracking server has answered."""

    run_id: str | None = None
    model_id: str | None = None
    dataset_digest: str | None = None


class Manifest(Part):
    """One finished step. It is written last and create-only, so a folder without it does not exist for readers."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_version: int = Field(SCHEMA, alias="schema")
    kind: ManifestKind
    step: str
    stage: str | None
    key: str = Field(pattern=r"^[0-9a-f]{16}$")
    uri: str
    files: tuple[FileEntry, ...]
    parents: tuple[Parent, ...]
    recipe_digest: Sha256
    code: Code
    stats: dict[str, Any]
    mlflow: TrackedRun
    created_at: str

    def to_bytes(self) -> bytes:
        """Canonical bytes: sorted keys, two spaces, a final newline."""
        return (json.dumps(self.model_dump(mode="json", by_alias=True), sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()

    @property
    def digest(self) -> Sha256:
        """sha256 (hex) of the manifest's bytes: names this very manifest."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def content_digest(self) -> Sha256:
        """sha256 (hex) of kind and files alone: equal wherever and whenever the same content was made.

        Keys of later steps are taken from it, so that a workspace on S3 and one on a disk have the same keys
        (docs/decisions/0001-keys-from-content.md).
        """
        return canonical_digest({"kind": self.kind, "files": [entry.model_dump() for entry in self.files]})

    @property
    def label(self) -> str:
        """Step and stage in one word, as in `train_mmdit-S1`."""
        return self.step if self.stage is None else f"{self.step}-{self.stage}"


def parse_manifest(data: bytes, where: str) -> Manifest:
    """A manifest from its bytes; raises UserError naming `where` when they are not one."""
    try:
        document = json.loads(data)
    except ValueError as error:
        raise UserError(f"{where}: not a manifest (not JSON)") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise UserError(f"{where}: found manifest schema {found!r}; allowed is {SCHEMA}")
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        raise UserError(describe(error, where)) from error


def file_entry(root: Path, path: Path) -> FileEntry:
    """The entry of a local file below `root`."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileEntry(path=path.relative_to(root).as_posix(), bytes=path.stat().st_size, sha256=digest)
