"""Which checkpoints stay, and the removal of the others and of what unfinished ones have left."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress

from model_core.storage import Storage
from model_core.training.checkpoint.commit import COMMIT, committed_steps, parts_of, read_commit, step_folder


def remove_outdated(storage: Storage, prefix: str, *, keep_last: int, keep_every_steps: int | None, damaged: Collection[int] = ()) -> None:
    """Leaves the `keep_last` newest checkpoints and every multiple of `keep_every_steps`, and no attempt older than the newest.

    Those known to be `damaged` do not count and go. Nothing newer than the newest commit is touched but them: it may be in
    the writing.
    """
    committed = committed_steps(storage, prefix)
    sound = [step for step in committed if step not in damaged]
    kept = set(sound[-keep_last:]) | {step for step in sound if keep_every_steps and step % keep_every_steps == 0}
    for step in committed:
        if step not in kept:
            remove_below(storage, step_folder(prefix, step))
    if sound:
        _remove_leftovers(storage, prefix, before=sound[-1], kept=kept)


def remove_below(storage: Storage, folder: str) -> None:
    """Removes all objects below `folder`: commits first, so that no reader trusts a folder that is being emptied."""
    paths = [entry.path for entry in storage.list(f"{folder}/")]
    for path in sorted(paths, key=lambda path: (not path.endswith(f"/{COMMIT}"), path)):
        storage.delete(path)
    local = storage.local_path(folder)
    for parent, _, _ in os.walk(local, topdown=False) if local else ():
        with suppress(OSError):  # not empty: somebody has just written there
            os.rmdir(parent)


def _remove_leftovers(storage: Storage, prefix: str, *, before: int, kept: Collection[int]) -> None:
    """Removes attempts that no commit names, of steps before `before`: their writers are gone."""
    attempts: dict[int, set[str]] = {}
    for entry in storage.list(f"{prefix}/step-"):
        parts = parts_of(prefix, entry.path)
        if parts is not None and parts[1] is not None and parts[0] < before:
            attempts.setdefault(parts[0], set()).add(parts[1])
    for step, names in attempts.items():
        if step in kept and len(names) == 1:
            continue
        folder = step_folder(prefix, step)
        named = {read_commit(storage, f"{folder}/{COMMIT}").attempt} if step in kept else set()
        for name in names - named:
            remove_below(storage, f"{folder}/{name}")
    for upload in storage.unfinished():
        parts = parts_of(prefix, upload.path)
        if parts is not None and parts[0] < before:
            storage.abort(upload)
