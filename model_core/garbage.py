"""What lies in a workspace and in its scratch folder that no result needs, found by one look (docs/reference/workspace.md).

Nothing is found that a living claim may need, or that was changed less than a grace time ago, unless the claim beside it is
of a process that is known to have ended on this host. `sweep` removes what was found.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from model_core.claim import FILE_NAME as CLAIM
from model_core.claim import is_gone, read_claim, watch
from model_core.manifest import FILE_NAME as MANIFEST
from model_core.manifest import parse_manifest
from model_core.publication import ATTEMPT_PREFIX, CHECKPOINTS
from model_core.scratch import is_used
from model_core.steps.registry import STEPS
from model_core.storage import NotFoundError, Stat, Storage, Unfinished
from model_core.workspace import Workspace

OBJECT = re.compile(rf"((?:{'|'.join(STEPS)})/[0-9a-f]{{16}})/(.+)")  # runs and reports have folders too, which are history
PROBE = re.compile(r"\.probe-\d+")  # what a start of a run writes to see whether it may, and removes again

Kind = Literal["claim", "attempt", "leftover", "checkpoint", "scratch", "cache", "write", "probe", "run", "resumable"]


@dataclass(frozen=True)
class Orphan:
    """Something to remove, or, of the kind `resumable`, to go on from: where it lies, why it is of no use, its size and age."""

    kind: Kind
    uri: str
    why: str
    bytes: int
    age_seconds: float
    objects: tuple[str, ...] = ()  # in the workspace, relative to its root
    folder: Path | None = None  # on this machine
    write: Unfinished | None = None
    step_folder: StepFolder | None = field(default=None, repr=False)  # whose claim guards it


@dataclass(frozen=True)
class StepFolder:
    """What one look has shown of `<step>/<key>`: its objects by their path in it, the names of its result, and its claim."""

    prefix: str
    objects: Mapping[str, Stat]
    named: frozenset[str] | None  # None: unfinished
    claim: Literal["none", "held", "gone", "silent"]
    claim_etag: str | None


def find_orphans(workspace: Workspace, *, grace_seconds: float) -> list[Orphan]:
    """All that is left over, with the resumable; in the order of their uris, those of one step together.

    Takes up to a minute longer when there is an old claim of another machine: it is watched. Writes nothing.
    """
    now = time.time()
    found = list(workspace.storage.list())
    folders = _look(workspace, found, now=now, grace_seconds=grace_seconds)
    orphans = [*_in_step_folders(workspace, folders, now), *_in_scratch(workspace, folders, now), *_unfinished_writes(workspace, now)]
    orphans += [
        Orphan(
            "probe",
            f"{workspace.uri}/{entry.path}",
            "of a run that died while it started",
            entry.size,
            now - entry.modified_at,
            (entry.path,),
        )
        for entry in found
        if PROBE.fullmatch(entry.path)
    ]
    return sorted((orphan for orphan in orphans if _may_go(orphan, folders, grace_seconds)), key=lambda orphan: orphan.uri)


def _may_go(orphan: Orphan, folders: Mapping[str, StepFolder], grace_seconds: float) -> bool:
    near = orphan.step_folder
    if near is None and orphan.write is not None and (match := OBJECT.fullmatch(orphan.write.path)):
        near = folders.get(match[1])
    if near is not None and near.claim == "held":
        return False
    return orphan.kind == "resumable" or orphan.age_seconds >= grace_seconds or (near is not None and near.claim == "gone")


def _look(workspace: Workspace, found: Sequence[Stat], *, now: float, grace_seconds: float) -> dict[str, StepFolder]:
    """The step folders by prefix, those without any object too."""
    objects: dict[str, dict[str, Stat]] = {}
    for entry in found:
        if match := OBJECT.fullmatch(entry.path):
            objects.setdefault(match[1], {})[match[2]] = entry
    for folder in _local_folders(workspace.storage):
        objects.setdefault(folder, {})
    states: dict[str, tuple[Literal["none", "held", "gone", "silent"], str | None]] = {}
    to_watch: dict[str, str] = {}
    for prefix, entries in objects.items():
        claim = read_claim(workspace.storage, f"{prefix}/{CLAIM}") if CLAIM in entries else None
        if claim is None:
            states[prefix] = ("none", None)
        elif claim[1] is not None and is_gone(claim[1]):
            states[prefix] = ("gone", claim[0])
        else:
            states[prefix] = ("held", claim[0])
            if now - entries[CLAIM].modified_at >= grace_seconds:
                to_watch[f"{prefix}/{CLAIM}"] = claim[0]
    for path in watch(workspace.storage, to_watch):
        states[path.removesuffix(f"/{CLAIM}")] = ("silent", to_watch[path])
    # Manifests are read after the claims: a step that ends in between is then finished, not a folder that nobody cares for.
    return {prefix: StepFolder(prefix, entries, _named(workspace.storage, prefix), *states[prefix]) for prefix, entries in objects.items()}


def _named(storage: Storage, prefix: str) -> frozenset[str] | None:
    path = f"{prefix}/{MANIFEST}"
    try:
        return frozenset(entry.path for entry in parse_manifest(storage.get(path), f"{storage.uri}/{path}").files)
    except NotFoundError:
        return None


def _local_folders(storage: Storage) -> Iterator[str]:
    """Step folders on a disk: one that a killed process has made and not used yet holds no object."""
    probe = storage.local_path("x")
    for folder in sorted(probe.parent.glob("*/*")) if probe is not None else ():
        prefix = folder.relative_to(folder.parents[1]).as_posix()
        if folder.is_dir() and OBJECT.fullmatch(f"{prefix}/x"):
            yield prefix


def _in_step_folders(workspace: Workspace, folders: Mapping[str, StepFolder], now: float) -> Iterator[Orphan]:
    for folder in folders.values():
        groups: dict[tuple[Kind, str, str], list[Stat]] = {}
        committed = _committed_attempts(workspace.storage, folder)
        for name, entry in folder.objects.items():
            if (group := _classify(folder, name, committed)) is not None:
                groups.setdefault(group, []).append(entry)
        for empty in _empty_folders(workspace.storage.local_path(folder.prefix)):
            if not any(empty.startswith(f"{name}/") for _, name, _ in groups):
                groups.setdefault(("leftover", empty, "an empty folder"), [])
        for (kind, name, why), entries in groups.items():
            yield Orphan(
                kind,
                "/".join(part for part in (workspace.uri, folder.prefix, name) if part),
                why,
                sum(entry.size for entry in entries),
                now
                - max((entry.modified_at for entry in entries), default=_changed(workspace.storage.local_path(f"{folder.prefix}/x"), now)),
                tuple(entry.path for entry in entries),
                step_folder=folder,
            )


def _classify(folder: StepFolder, name: str, committed: Mapping[str, str | None]) -> tuple[Kind, str, str] | None:
    """What an object of a step's folder is, what it goes together with, and why it is of no use; None for a result."""
    top, _, rest = name.partition("/")
    is_finished = folder.named is not None
    if name == MANIFEST or name in (folder.named or ()):
        return None
    if name == CLAIM:
        return "claim", name, "its process has ended" if folder.claim == "gone" else "its holder is silent"
    if top.startswith(ATTEMPT_PREFIX):
        return "attempt", top, "of an attempt that died"
    if top == CHECKPOINTS:
        step = f"{CHECKPOINTS}/{rest.partition('/')[0]}"
        if is_finished:
            return "checkpoint", step, "its step is finished"
        if step not in committed:
            return "checkpoint", step, "never committed"
        attempt = rest.split("/")[1]
        if attempt.startswith("attempt-") and committed[step] not in (attempt, None):
            return "checkpoint", f"{step}/{attempt}", "another attempt was committed"
        return "resumable", step, "its step can go on from here"
    return "leftover", name, "not named by the manifest" if is_finished else "published without a manifest"


def _committed_attempts(storage: Storage, folder: StepFolder) -> dict[str, str | None]:
    """The attempt that the commit of each checkpoint names; None when it cannot be read: then none of its files is touched."""
    committed: dict[str, str | None] = {}
    for name in folder.objects if folder.named is None else ():
        if name.startswith(f"{CHECKPOINTS}/") and name.endswith("/COMMIT.json"):
            try:
                document = json.loads(storage.get(f"{folder.prefix}/{name}"))
            except (NotFoundError, ValueError):
                document = None
            committed[name.removesuffix("/COMMIT.json")] = document.get("attempt") if isinstance(document, dict) else None
    return committed


def _empty_folders(top: Path | None) -> list[str]:
    """Folders of a disk in which no file lies, at any depth, relative to `top`; "" is `top` itself. Only the topmost of each."""
    if top is None or not top.is_dir():
        return []
    if not any(path.is_file() for path in top.rglob("*")):
        return [""]
    empty = [path for path in sorted(top.rglob("*")) if path.is_dir() and not any(inner.is_file() for inner in path.rglob("*"))]
    return [path.relative_to(top).as_posix() for path in empty if path.parent not in empty]


def _in_scratch(workspace: Workspace, folders: Mapping[str, StepFolder], now: float) -> Iterator[Orphan]:
    for kind in ("inputs", "output", "steps"):
        for path in sorted((workspace.site.scratch_folder / kind).glob("*/*")):
            prefix = path.relative_to(path.parents[1]).as_posix()
            files = [file for file in path.rglob("*") if file.is_file()]
            size, age = (
                sum(file.stat().st_size for file in files),
                now - max((file.stat().st_mtime for file in files), default=path.stat().st_mtime),
            )
            if kind == "inputs":
                if not is_used(path):
                    yield Orphan("cache", path.as_uri(), "of an input that no process reads", size, age, folder=path)
                continue
            folder = folders.get(prefix) or StepFolder(prefix, {}, None, "none", None)
            if kind == "steps" and folder.named is None and files:
                yield Orphan("resumable", path.as_uri(), "its step can go on with it", size, age, folder=path, step_folder=folder)
            else:
                why = "its step is finished" if folder.named is not None else "of an attempt that died"
                yield Orphan("scratch", path.as_uri(), why, size, age, folder=path, step_folder=folder)


def _unfinished_writes(workspace: Workspace, now: float) -> Iterator[Orphan]:
    for write in workspace.storage.unfinished():
        uri = f"{workspace.uri}/{write.path}"
        yield Orphan("write", uri, "begun and never ended", write.size or 0, now - write.started_at, write=write)


def _changed(path: Path | None, now: float) -> float:
    return path.parent.stat().st_mtime if path is not None and path.parent.is_dir() else now
