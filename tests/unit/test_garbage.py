"""What `darkroom gc` finds and removes, and what it must never touch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from model_core import claim as claims
from model_core.claim import Owner, current_owner, take
from model_core.garbage import Orphan, find_orphans
from model_core.manifest import Code
from model_core.recipe import parse_recipe
from model_core.scratch import use_cache
from model_core.site import Site
from model_core.steps.registry import STEPS
from model_core.sweep import remove_orphans
from model_core.workspace import Address, StepResult, Workspace
from pipelines.cli import app

RECIPE = parse_recipe({"name": "tiny", "mmdit": {"stages": {"S1": {}}}}, "recipe")
DONE, OPEN = Address("ingest_images", None, "d" * 16), Address("train_vae", None, "0" * 16)
OLD_SECONDS = 2 * 3600.0
COMMITTED = "checkpoints/step-00000100"


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """One finished step, on a machine without temporary files of others."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    workspace = Workspace(Site(workspace=str(tmp_path / "workspace")))
    with workspace.attempt(DONE, "0") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "result.txt").write_text("result")
        result = StepResult({}, Code(version="0", git_sha=None, image_digest=None))
        workspace.commit(DONE, folder, spec=STEPS["ingest_images"], recipe=RECIPE, inputs={}, result=result, confirm=lambda: None)
    return workspace


def root(workspace: Workspace) -> Path:
    path = workspace.storage.local_path("x")
    assert path is not None
    return path.parent


def write(workspace: Workspace, path: str, *, age_seconds: float = OLD_SECONDS, content: bytes = b"left") -> Path:
    file = root(workspace) / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    os.utime(file, (time.time() - age_seconds,) * 2)
    return file


def write_claim(workspace: Workspace, address: Address, owner: Owner, **changes: float) -> Path:
    return write(workspace, f"{address.prefix}/claim.json", content=json.dumps(asdict(owner)).encode(), **changes)


def dead_owner() -> Owner:
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    return replace(current_owner("dead"), pid=gone.pid)


def find(workspace: Workspace, grace_seconds: float = 3600.0) -> dict[str, str]:
    """Kinds by where they lie, relative to the workspace."""
    return {orphan.uri.removeprefix(f"{workspace.uri}/"): orphan.kind for orphan in find_orphans(workspace, grace_seconds=grace_seconds)}


def sweep(workspace: Workspace, *, meanwhile: Callable[[], Any] = lambda: None) -> tuple[list[Orphan], list[str]]:
    said: list[str] = []
    found = [orphan for orphan in find_orphans(workspace, grace_seconds=3600.0) if orphan.kind != "resumable"]
    meanwhile()
    return remove_orphans(workspace, found, say=said.append), said


def files(workspace: Workspace) -> set[str]:
    paths = (path.relative_to(root(workspace)).as_posix() for path in root(workspace).rglob("*") if path.is_file())
    return {path for path in paths if path != ".staging/lock"}


RESULT = {f"{DONE.prefix}/deep/result.txt", f"{DONE.prefix}/manifest.json"}
ORPHANS = {
    "a file that no manifest names": (f"{DONE.prefix}/deep/other.txt", f"{DONE.prefix}/deep/other.txt", "leftover"),
    "a checkpoint of a finished step": (f"{DONE.prefix}/{COMMITTED}/COMMIT.json", f"{DONE.prefix}/{COMMITTED}", "checkpoint"),
    "an attempt at a finished step": (f"{DONE.prefix}/.attempt-1/a.txt", f"{DONE.prefix}/.attempt-1", "attempt"),
    "an attempt at an unfinished step": (f"{OPEN.prefix}/.attempt-1/deep/a.txt", f"{OPEN.prefix}/.attempt-1", "attempt"),
    "files without a manifest": (f"{OPEN.prefix}/vae/config.json", f"{OPEN.prefix}/vae/config.json", "leftover"),
    "a lock of a publisher that died": (f"{OPEN.prefix}/.publish.lock", f"{OPEN.prefix}/.publish.lock", "leftover"),
    "a checkpoint without its commit": (f"{OPEN.prefix}/{COMMITTED}/attempt-1/a.distcp", f"{OPEN.prefix}/{COMMITTED}", "checkpoint"),
    "scratch of a finished step": (f".scratch/steps/{DONE.prefix}/a.tar", f".scratch/steps/{DONE.prefix}", "scratch"),
    "scratch of an attempt": (f".scratch/output/{OPEN.prefix}/.attempt-1/a", f".scratch/output/{OPEN.prefix}", "scratch"),
    "a cached input": (f".scratch/inputs/{DONE.prefix}/deep/result.txt", f".scratch/inputs/{DONE.prefix}", "cache"),
    "a probe of a start that died": (".probe-77", ".probe-77", "probe"),
}


@pytest.mark.parametrize(("path", "place", "kind"), ORPHANS.values(), ids=ORPHANS.keys())
def test_what_nobody_needs_is_found_and_removed(workspace: Workspace, path: str, place: str, kind: str) -> None:
    write(workspace, path)
    assert find(workspace) == {place: kind}
    removed, _ = sweep(workspace)
    assert [orphan.bytes for orphan in removed] == [4]
    assert files(workspace) == RESULT
    assert find(workspace) == {}


@pytest.mark.parametrize("path", [path for path, _, _ in ORPHANS.values()], ids=ORPHANS.keys())
def test_what_was_changed_lately_is_left_alone(workspace: Workspace, path: str) -> None:
    write(workspace, path, age_seconds=60)
    assert find(workspace) == {}


def test_history_and_results_are_no_garbage(workspace: Workspace) -> None:
    for path in ("runs/0123456789abcdef/run.json", "reports/0123456789abcdef/report.html", ".scratch/spool/r.jsonl", ".scratch/mlflow.db"):
        write(workspace, path)
    assert find(workspace) == {}


def test_a_staged_write_of_a_process_that_died_is_removed(workspace: Workspace) -> None:
    staged = root(workspace) / ".staging" / "0123456789abcdef"
    staged.write_bytes(b"half")
    assert find(workspace, grace_seconds=0) == {".staging/0123456789abcdef": "write"}
    remove_orphans(workspace, find_orphans(workspace, grace_seconds=0), say=print)
    assert not staged.exists()


def test_what_a_process_of_this_host_left_when_it_died_goes_at_once(workspace: Workspace) -> None:
    write_claim(workspace, OPEN, dead_owner(), age_seconds=0)
    write(workspace, f"{OPEN.prefix}/.attempt-1/a.txt", age_seconds=0)
    (root(workspace) / f".scratch/steps/{OPEN.prefix}").mkdir(parents=True)
    assert set(find(workspace).values()) == {"claim", "attempt", "scratch"}
    sweep(workspace)
    assert not (root(workspace) / OPEN.step).exists()
    assert files(workspace) == RESULT


def test_nothing_of_a_living_claim_is_touched(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.05)
    claim = take(workspace.storage, f"{OPEN.prefix}/claim.json", etag=None, on_lost=lambda: None)
    assert claim is not None
    with claim:
        for path in (".attempt-1/a.txt", "vae/config.json", f"{COMMITTED}/attempt-1/a.distcp"):
            write(workspace, f"{OPEN.prefix}/{path}")
        write(workspace, f".scratch/steps/{OPEN.prefix}/a.tar")
        write(workspace, f".scratch/output/{OPEN.prefix}/a")
        assert find(workspace, grace_seconds=0) == {}


def test_a_claim_of_another_machine_is_dead_only_when_it_stays_silent(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "STALE_SECONDS", 0.2)
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.05)
    write_claim(workspace, OPEN, replace(current_owner("theirs"), host="another/boot/namespace"), age_seconds=60)
    assert find(workspace) == {}
    began = time.monotonic()
    assert find(workspace, grace_seconds=30) == {f"{OPEN.prefix}/claim.json": "claim"}
    assert time.monotonic() - began >= 0.2


def test_committed_checkpoints_of_an_unfinished_step_are_resumable(workspace: Workspace) -> None:
    write(workspace, f"{OPEN.prefix}/{COMMITTED}/COMMIT.json", content=b'{"attempt": "attempt-2"}')
    write(workspace, f"{OPEN.prefix}/{COMMITTED}/attempt-1/a.distcp")
    write(workspace, f"{OPEN.prefix}/{COMMITTED}/attempt-2/a.distcp")
    assert find(workspace) == {f"{OPEN.prefix}/{COMMITTED}": "resumable", f"{OPEN.prefix}/{COMMITTED}/attempt-1": "checkpoint"}
    sweep(workspace)
    assert files(workspace) - RESULT == {f"{OPEN.prefix}/{COMMITTED}/COMMIT.json", f"{OPEN.prefix}/{COMMITTED}/attempt-2/a.distcp"}


def test_an_empty_folder_of_a_step_that_never_began_is_removed(workspace: Workspace) -> None:
    folder = root(workspace) / OPEN.prefix
    folder.mkdir(parents=True)
    os.utime(folder, (time.time() - OLD_SECONDS,) * 2)
    assert find(workspace) == {OPEN.prefix: "leftover"}
    sweep(workspace)
    assert not folder.exists()


def test_a_step_that_has_begun_meanwhile_keeps_its_folder(workspace: Workspace) -> None:
    left = write(workspace, f"{OPEN.prefix}/.attempt-1/a.txt")
    removed, said = sweep(
        workspace, meanwhile=lambda: take(workspace.storage, f"{OPEN.prefix}/claim.json", etag=None, on_lost=lambda: None)
    )
    assert removed == []
    assert said == [f"kept {workspace.uri}/{OPEN.prefix}: its step has begun again"]
    assert left.exists()


def test_a_step_that_was_finished_meanwhile_keeps_its_result(workspace: Workspace) -> None:
    left = write(workspace, f"{OPEN.prefix}/vae/config.json")
    removed, _ = sweep(workspace, meanwhile=lambda: write(workspace, f"{OPEN.prefix}/manifest.json"))
    assert removed == []
    assert left.exists()


def test_a_cached_input_that_a_process_reads_is_left_alone(workspace: Workspace) -> None:
    file = write(workspace, f".scratch/inputs/{DONE.prefix}/a.bin")
    removed, said = sweep(workspace, meanwhile=lambda: use_cache(file.parent))
    assert (removed, len(said)) == ([], 1)
    assert find(workspace) == {}
    assert file.exists()


def gc(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["gc", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads(result.stdout)


def test_a_dry_run_shows_what_a_real_one_removes_and_removes_nothing(workspace: Workspace) -> None:
    write(workspace, f"{DONE.prefix}/deep/other.txt")
    before = files(workspace)
    shown = gc(str(root(workspace)), "--dry-run")
    assert files(workspace) == before
    removed = gc(str(root(workspace)))
    assert files(workspace) == RESULT
    assert (shown["dry_run"], removed["dry_run"]) == (True, False)
    assert [entry["uri"] for entry in shown["orphans"]] == [entry["uri"] for entry in removed["orphans"]]
    assert (removed["bytes"], removed["orphans"][0]["objects"]) == (4, [f"{DONE.prefix}/deep/other.txt"])


def test_what_an_unfinished_step_could_go_on_from_goes_only_when_asked_for_by_age(workspace: Workspace) -> None:
    write(workspace, f"{OPEN.prefix}/{COMMITTED}/COMMIT.json")
    for arguments in ((), ("--unfinished-older-than", "1")):
        told = gc(str(root(workspace)), *arguments)
        assert (len(told["orphans"]), len(told["resumable"])) == (0, 1)
    assert len(gc(str(root(workspace)), "--unfinished-older-than", "0.05")["orphans"]) == 1
    assert files(workspace) == RESULT


def test_a_run_that_was_killed_leaves_no_temporary_folder_behind(workspace: Workspace) -> None:
    folder = Path(tempfile.gettempdir()) / "darkroom-run-x"
    folder.mkdir()
    (folder / "alive.lock").touch()
    assert [entry["kind"] for entry in gc(str(root(workspace)), "--grace-minutes", "0")["orphans"]] == ["run"]
    assert not folder.exists()


def test_a_table_names_what_why_and_how_much(workspace: Workspace) -> None:
    write(workspace, f"{DONE.prefix}/deep/other.txt")
    shown = CliRunner().invoke(app, ["gc", str(root(workspace)), "--dry-run"]).stdout
    assert all(word in shown for word in ("not", "named", "manifest"))  # in however many lines, by the terminal's width
    assert "1 would be removed, 4 bytes; 0 resumable stay" in shown


def test_a_workspace_that_is_not_there_is_a_mistake_of_the_user(workspace: Workspace) -> None:
    result = CliRunner().invoke(app, ["gc", str(root(workspace) / "none")])
    assert "gc: found no workspace at" in str(result.exception)
    assert not (root(workspace) / "none").exists()
