"""`darkroom gc`: what killed runs have left in a workspace, in its scratch folder and among this machine's temporary files."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from components.launch.local import RUN_FOLDER_PREFIX, is_alive
from model_core.documents import UserError
from model_core.garbage import Orphan, find_orphans
from model_core.publication import remove_tree
from model_core.site import Site
from model_core.sweep import remove_orphans
from model_core.workspace import Workspace


@dataclass(frozen=True)
class Collected:
    """What was found to be of no use (and is gone, unless it was a dry run), and what unfinished steps can go on from."""

    orphans: Sequence[Orphan]
    resumable: Sequence[Orphan]
    dry_run: bool

    @property
    def num_bytes(self) -> int:
        """Of the orphans."""
        return sum(orphan.bytes for orphan in self.orphans)


def collect(
    place: str | None,
    site: Site,
    *,
    grace_seconds: float,
    unfinished_older_than_seconds: float | None,
    dry_run: bool,
    say: Callable[[str], None],
) -> Collected:
    """Finds what is of no use in the site's workspace, or in the one at `place` (a path or a uri), and removes it.

    `say` is told what was kept because somebody needs it again. Raises UserError when there is no workspace.
    """
    if place is not None:
        site = site.model_copy(update={"workspace": place if "://" in place else str(Path(place).expanduser().resolve()), "scratch": None})
    workspace = Workspace(site)
    root = workspace.storage.local_path("x")
    if root is not None and not root.parent.is_dir():
        raise UserError(f"gc: found no workspace at {workspace.uri}; allowed are the folder and the s3:// uri of one")
    found = find_orphans(workspace, grace_seconds=grace_seconds)
    too_old = float("inf") if unfinished_older_than_seconds is None else unfinished_older_than_seconds
    orphans = [orphan for orphan in found if orphan.kind != "resumable" or orphan.age_seconds >= too_old]
    resumable = [orphan for orphan in found if orphan not in orphans]
    runs = list(_dead_runs(grace_seconds))
    if not dry_run:
        orphans = remove_orphans(workspace, orphans, say=say)
        for run in runs:
            assert run.folder is not None
            remove_tree(run.folder)
    return Collected([*orphans, *runs], resumable, dry_run)


def to_json(collected: Collected) -> dict[str, Any]:
    """The same for a script."""
    return {
        "dry_run": collected.dry_run,
        "bytes": collected.num_bytes,
        "orphans": [_entry(orphan) for orphan in collected.orphans],
        "resumable": [_entry(orphan) for orphan in collected.resumable],
    }


def garbage_table(collected: Collected) -> Group:
    """What was found, and the total."""
    table = Table("", "where", "why", Column("bytes", justify="right"), Column("age", justify="right"))
    for orphan in (*collected.orphans, *collected.resumable):
        style = "cyan" if orphan in collected.resumable else "yellow"
        table.add_row(Text(orphan.kind, style=style), Text(orphan.uri), orphan.why, f"{orphan.bytes:,}", _age(orphan.age_seconds))
    verb = "would be removed" if collected.dry_run else "removed"
    total = f"{len(collected.orphans)} {verb}, {collected.num_bytes:,} bytes; {len(collected.resumable)} resumable stay"
    return Group(*([table] if collected.orphans or collected.resumable else []), Text(total))


def _dead_runs(grace_seconds: float) -> Iterator[Orphan]:
    """The temporary folders of this user's runs that were killed."""
    now = time.time()
    for folder in sorted(Path(tempfile.gettempdir()).glob(f"{RUN_FOLDER_PREFIX}*")):
        if folder.stat().st_uid != os.getuid() or is_alive(folder):
            continue
        files = [file for file in folder.rglob("*") if file.is_file()]
        age = now - max(file.stat().st_mtime for file in (folder, *files))
        if age >= grace_seconds:
            yield Orphan("run", folder.as_uri(), "of a run that died", sum(file.stat().st_size for file in files), age, folder=folder)


def _entry(orphan: Orphan) -> dict[str, Any]:
    return {
        "kind": orphan.kind,
        "uri": orphan.uri,
        "why": orphan.why,
        "bytes": orphan.bytes,
        "age_seconds": round(orphan.age_seconds, 1),
        "objects": list(orphan.objects),
    }


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{max(seconds, 0):.0f} s"
