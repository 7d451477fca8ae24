"""Whether results are still what their manifests promise: every named file is read again, and hashed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from model_core.documents import UserError
from model_core.manifest import FILE_NAME, Manifest, parse_manifest
from model_core.site import Site
from model_core.storage import NotFoundError, Storage, open_storage
from model_core.workspace import Workspace, matches

LEDGER = "ledger.json"


@dataclass(frozen=True)
class Finding:
    """One file that is not what it should be: its uri, and "missing", "changed" or what is wrong with what it says."""

    uri: str
    problem: str


@dataclass(frozen=True)
class Verification:
    """How much was read, and what was wrong with it."""

    num_manifests: int
    num_files: int
    num_bytes: int
    num_ledgers: int
    findings: tuple[Finding, ...]


def verify(place: str, site: Site) -> Verification:
    """Reads every file that a manifest names, or all manifests of a workspace; `place` is a path or a uri of either.

    Raises UserError when there is no manifest at `place`.
    """
    manifests = list(find_manifests(place, site))
    findings = [finding for manifest in manifests for finding in (*check_files(manifest, site), *check_ledger(manifest, site))]
    entries = [entry for manifest in manifests for entry in manifest.files]
    ledgers = sum(LEDGER in (entry.path for entry in manifest.files) for manifest in manifests)
    return Verification(len(manifests), len(entries), sum(entry.bytes for entry in entries), ledgers, tuple(findings))


def find_manifests(place: str, site: Site) -> Iterator[Manifest]:
    """The manifest at `place` (its file or its folder), else those of the workspace there."""
    uri = place if "://" in place else Path(place).expanduser().resolve().as_uri()
    folder, _, last = uri.rstrip("/").rpartition("/")
    storage, path = (open_storage(folder, site.s3), last) if last == FILE_NAME else (open_storage(uri, site.s3), FILE_NAME)
    try:
        yield parse_manifest(storage.get(path), f"{storage.uri}/{path}")
        return
    except NotFoundError:
        found = [manifest for _, manifest in Workspace(site.model_copy(update={"workspace": storage.uri})).manifests()]
    if not found:
        raise UserError(f"verify {place}: found no manifest; allowed are a manifest.json, the folder of one, and a workspace with results")
    yield from found


def check_files(manifest: Manifest, site: Site) -> Iterator[Finding]:
    """What is wrong with the files of one manifest."""
    storage = open_storage(manifest.uri, site.s3)
    for entry in manifest.files:
        with tempfile.TemporaryDirectory() as folder:
            local = _local_copy(storage, entry.path, Path(folder, "file"))
            if local is None:
                yield Finding(f"{manifest.uri}/{entry.path}", "missing")
            elif not matches(local, entry):
                yield Finding(f"{manifest.uri}/{entry.path}", "changed")


def check_ledger(manifest: Manifest, site: Site) -> Iterator[Finding]:
    """What is wrong with the ledger of a training: samples that were lost, or met twice in an epoch."""
    if LEDGER in (entry.path for entry in manifest.files):
        from model_core.training.audit import audit  # torch, for which nobody waits who has no ledger to check

        try:
            problems = audit(manifest, site)
        except UserError as error:  # the ledger itself, or what it must be held against, is missing or changed
            problems = [f"cannot be checked: {error}"]
        yield from (Finding(f"{manifest.uri}/{LEDGER}", problem) for problem in problems)


def _local_copy(storage: Storage, path: str, scratch: Path) -> Path | None:
    local = storage.local_path(path)
    if local is not None:
        return local if local.is_file() else None
    try:
        storage.download(path, scratch)
    except NotFoundError:
        return None
    return scratch
