"""Removes what `garbage` has found. A step's folder is changed under its claim only, so that no step starts in the middle of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path

from model_core.claim import FILE_NAME as CLAIM
from model_core.claim import Claim, ClaimLostError, take
from model_core.garbage import Orphan, StepFolder
from model_core.publication import alone, is_finished, remove_tree
from model_core.scratch import remove_cache
from model_core.storage import Storage
from model_core.workspace import Workspace


def remove_orphans(workspace: Workspace, orphans: Sequence[Orphan], *, say: Callable[[str], None]) -> list[Orphan]:
    """Removes what it is given, and returns what is gone; of what somebody needs again by now, it says so and leaves it."""
    removed = [orphan for orphan in orphans if orphan.step_folder is None and _remove_unguarded(workspace.storage, orphan, say)]
    guarded = sorted((orphan for orphan in orphans if orphan.step_folder is not None), key=_prefix)
    for _, group in groupby(guarded, key=_prefix):
        removed += _remove_guarded(workspace.storage, list(group), say)
    return [orphan for orphan in orphans if orphan in removed]


def _prefix(orphan: Orphan) -> str:
    assert orphan.step_folder is not None
    return orphan.step_folder.prefix


def _remove_unguarded(storage: Storage, orphan: Orphan, say: Callable[[str], None]) -> bool:
    if orphan.folder is not None and not remove_cache(orphan.folder):
        say(f"kept {orphan.uri}: a process has begun to read it")
        return False
    if orphan.write is not None:
        storage.abort(orphan.write)
    for path in orphan.objects:
        storage.delete(path)
    return True


def _remove_guarded(storage: Storage, orphans: list[Orphan], say: Callable[[str], None]) -> list[Orphan]:
    """All of one step's folder and of its scratch, or nothing."""
    folder = orphans[0].step_folder
    assert folder is not None
    kept = f"kept {storage.uri}/{folder.prefix}: its step has begun again"
    # Losing the claim is noticed by the next confirm, before anything more is removed.
    claim = take(storage, f"{folder.prefix}/{CLAIM}", etag=folder.claim_etag, on_lost=lambda: None)
    if claim is None:
        say(kept)
        return []
    try:
        with claim:
            if is_finished(storage, folder.prefix) != (folder.named is not None):
                say(kept)
                return []
            if not _empty(storage, folder, orphans, claim):
                say(kept)
                return []
    except ClaimLostError:
        say(kept)
        return []
    return orphans


def _empty(storage: Storage, folder: StepFolder, orphans: Iterable[Orphan], claim: Claim) -> bool:
    objects = [path for orphan in orphans for path in orphan.objects if path != f"{folder.prefix}/{CLAIM}"]
    near = storage.local_path(folder.prefix)
    if near is None:
        for path in objects:
            claim.confirm()  # before each, for a bucket knows no lock: see docs/reference/workspace.md
            storage.delete(path)
    else:
        with alone(near, wait=False) as nobody_publishes:
            if not nobody_publishes:
                return False
            claim.confirm()
            for path in objects:
                storage.delete(path)
            _remove_empty_folders(near)
    for orphan in orphans:
        if orphan.folder is not None:
            remove_tree(orphan.folder)
    return True


def _remove_empty_folders(top: Path) -> None:
    for path in sorted(top.rglob("*"), reverse=True):  # inner ones first
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
