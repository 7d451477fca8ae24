"""Keys and commits: same key same place, one result, nothing half-written is ever read."""

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model_core.claim import ClaimLostError, acquire
from model_core.documents import UserError
from model_core.manifest import Code, Manifest, TrackedRun, parse_manifest
from model_core.recipe import parse_recipe
from model_core.site import Site, load_site, parse_site
from model_core.steps.registry import STEPS
from model_core.workspace import Address, InputFolder, StepResult, Workspace, check_inputs, step_key

RECIPE = parse_recipe({"name": "tiny", "mmdit": {"stages": {"S1": {}, "S2": {}}}}, "recipe")
CODE = Code(version="0", git_sha=None, image_digest=None)


def commit(workspace: Workspace, content: str = "hello", step: str = "ingest_images") -> Manifest:
    address = Address(step, None, step_key(STEPS["ingest_images"], RECIPE, stage=None, inputs={}, sources=content))
    return commit_files(workspace, address, {"deep/a.txt": content})


def commit_files(workspace: Workspace, address: Address, files: dict[str, str], *, attempt: str = "0", confirm=lambda: None) -> Manifest:
    with workspace.attempt(address, attempt) as folder:
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content)
        result = StepResult({"rows": 1}, CODE)
        return workspace.commit(address, folder, spec=STEPS["ingest_images"], recipe=RECIPE, inputs={}, result=result, confirm=confirm)


def test_a_committed_step_is_found_and_its_files_read_back(tmp_path):
    site = Site(workspace=str(tmp_path))
    manifest = commit(Workspace(site))
    found = Workspace(site).find(Address(manifest.step, None, manifest.key))
    assert found == manifest
    assert InputFolder(manifest, site=site).path("deep/a.txt").read_text() == "hello"
    assert InputFolder(manifest, site=site).folder("deep").name == "deep"


def test_what_an_attempt_that_died_has_left_is_cleared_but_for_its_checkpoints(tmp_path):
    workspace = Workspace(Site(workspace=str(tmp_path)))
    address = Address("train_vae", None, "0" * 16)
    folder = tmp_path / address.prefix
    for name in (".attempt-dead/half.bin", "half/published.bin", "half.bin", "checkpoints/step-00000004/state.pt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"left")
    assert workspace.find(address) is None
    commit_files(workspace, address, {"half.bin": "whole"})
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "checkpoints/step-00000004/state.pt",
        "half.bin",
        "manifest.json",
    ]
    assert (folder / "half.bin").read_text() == "whole"


def test_a_failed_attempt_leaves_nothing(tmp_path):
    workspace, address = Workspace(Site(workspace=str(tmp_path))), Address("train_vae", None, "0" * 16)
    with pytest.raises(IsADirectoryError):
        commit_files(workspace, address, {"half.bin": "half", "deep/a.txt": "", "deep": "no file can have this name"})
    assert list((tmp_path / address.prefix).rglob("*")) == []


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_an_input_whose_file_is_not_what_its_manifest_promises_is_refused(tmp_path, damage):
    site = Site(workspace=str(tmp_path))
    manifest = commit(Workspace(site))
    file = InputFolder(manifest, site=site).path("deep/a.txt")
    file.write_text("hellO") if damage == "changed" else file.unlink()
    with pytest.raises(UserError, match=f"deep/a.txt: {damage}"):
        InputFolder(manifest, site=site).path("deep/a.txt")


def test_of_two_commits_of_a_key_the_first_stands(tmp_path):
    workspace = Workspace(Site(workspace=str(tmp_path)))
    first = commit(workspace)
    assert commit(workspace) == first


def test_nothing_is_published_by_one_that_holds_the_claim_no_longer(tmp_path):
    workspace, address = Workspace(Site(workspace=str(tmp_path))), Address("ingest_images", None, "0" * 16)

    def confirm():
        raise ClaimLostError("taken over")

    with pytest.raises(ClaimLostError):
        commit_files(workspace, address, {"a.txt": "a"}, confirm=confirm)
    assert list((tmp_path / address.prefix).rglob("*")) == []


# Two attempts at one step: this one is stopped at a moment of its commit, and goes on later.
STOPPED = """
import os, signal, sys
import model_core.workspace
from model_core import claim
from tests.unit.test_workspace import ADDRESS, Site, Workspace, commit_files

claim.HEARTBEAT_SECONDS = 100.0  # it notices by the commit alone
workspace = Workspace(Site(workspace=sys.argv[1]))
held = claim.take(workspace.storage, f"{ADDRESS.prefix}/claim.json", etag=None, on_lost=lambda: None)
publish = model_core.workspace.publish

def stop():
    os.kill(os.getpid(), signal.SIGSTOP)

def stopped_before(*arguments, **named):
    stop()
    return publish(*arguments, **named)

def confirm():
    held.confirm()
    if sys.argv[2] == "within":
        stop()

if sys.argv[2] == "before":
    model_core.workspace.publish = stopped_before
with held:
    manifest = commit_files(workspace, ADDRESS, {"a.txt": "stopped", "only-stopped.txt": ""}, attempt="stopped", confirm=confirm)
    print(manifest.files[0].sha256)
"""
ADDRESS = Address("ingest_images", None, "0" * 16)


@pytest.fixture
def stopped_at(tmp_path):
    """Starts the process above and waits until it has stopped."""
    started = []

    def start(moment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", STOPPED, str(tmp_path), moment]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        deadline = time.monotonic() + 30
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.timeout(60)
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at /proc")
def test_a_process_that_was_stopped_before_its_commit_does_not_touch_the_new_owners_result(tmp_path, stopped_at, monkeypatch):
    stopped = stopped_at("before")
    monkeypatch.setattr("model_core.claim.STALE_SECONDS", 0.3)
    monkeypatch.setattr("model_core.claim.POLL_SECONDS", 0.05)
    workspace = Workspace(Site(workspace=str(tmp_path)))
    claim = acquire(workspace.storage, f"{ADDRESS.prefix}/claim.json", finished=lambda: False, on_lost=lambda: None, say=lambda _: None)
    with claim:
        manifest = commit_files(workspace, ADDRESS, {"a.txt": "new owner"}, attempt=claim.attempt, confirm=claim.confirm)
    stopped.send_signal(signal.SIGCONT)
    _, errors = stopped.communicate(timeout=30)
    assert "ClaimLostError" in errors
    assert workspace.find(ADDRESS) == manifest
    assert sorted(path.name for path in (tmp_path / ADDRESS.prefix).iterdir()) == ["a.txt", "manifest.json"]
    assert (tmp_path / ADDRESS.prefix / "a.txt").read_text() == "new owner"


@pytest.mark.timeout(60)
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at /proc")
def test_a_process_that_was_stopped_within_its_commit_makes_the_next_one_wait_and_take_its_result(tmp_path, stopped_at):
    stopped = stopped_at("within")
    workspace = Workspace(Site(workspace=str(tmp_path)))
    with ThreadPoolExecutor() as pool:
        other = pool.submit(commit_files, workspace, ADDRESS, {"a.txt": "other", "only-other.txt": ""}, attempt="other")
        time.sleep(0.5)
        assert not other.done()
        stopped.send_signal(signal.SIGCONT)
        manifest = other.result(timeout=30)
    told, _ = stopped.communicate(timeout=30)
    assert told.strip() == manifest.files[0].sha256
    assert [entry.path for entry in manifest.files] == ["a.txt", "only-stopped.txt"]
    assert sorted(path.name for path in (tmp_path / ADDRESS.prefix).iterdir()) == ["a.txt", "manifest.json", "only-stopped.txt"]


def test_a_workspace_with_a_space_in_its_name_keeps_its_scratch_inside(tmp_path):
    assert Site(workspace=str(tmp_path / "my runs")).scratch_folder == tmp_path / "my runs" / ".scratch"


def test_content_digests_do_not_see_where_or_when_the_content_was_made(tmp_path):
    first, second = (commit(Workspace(Site(workspace=str(tmp_path / name)))) for name in ("a", "b"))
    assert first.content_digest == second.content_digest
    assert first.digest != second.digest
    assert replace_stats(first).content_digest == first.content_digest


def replace_stats(manifest: Manifest) -> Manifest:
    return manifest.model_copy(update={"stats": {"seconds": 3}, "mlflow": TrackedRun(run_id="x")})


def test_a_manifest_survives_its_bytes(tmp_path):
    manifest = commit(Workspace(Site(workspace=str(tmp_path))))
    assert parse_manifest(manifest.to_bytes(), "here") == manifest
    with pytest.raises(UserError, match="here: found manifest schema 7"):
        parse_manifest(json.dumps({"schema": 7}).encode(), "here")


def test_keys_see_the_sections_a_step_reads_and_no_others(tmp_path):
    spec = STEPS["filter_images"]

    def key(recipe, stage="S1") -> str:
        return step_key(spec, recipe, stage=stage, inputs={})

    changed = {"name": "tiny", "mmdit": {"stages": {"S1": {"filter": {"min_side_px": 32}}, "S2": {}}}}
    assert key(parse_recipe(changed, "r")) != key(RECIPE)
    assert key(parse_recipe(changed, "r"), "S2") == key(RECIPE, "S2")
    assert key(RECIPE, "S2") != key(RECIPE, "S1")
    other = {"name": "other", "vae": {"steps": 7}, "mmdit": {"stages": {"S1": {"lr": 3e-3}, "S2": {}}}}
    assert key(parse_recipe(other, "r")) == key(RECIPE)
    assert step_key(spec, RECIPE, stage="S1", inputs={"images": commit(Workspace(Site(workspace=str(tmp_path))))}) != key(RECIPE)


def test_every_step_reads_sections_that_exist():
    for spec in STEPS.values():
        assert step_key(spec, RECIPE, stage="S1" if spec.staged else None, inputs={})


def test_wrong_stages_and_inputs_are_refused(tmp_path):
    some = commit(Workspace(Site(workspace=str(tmp_path))))
    for stage, names, sentence in (
        ("S9", (), "allowed are S1, S2"),
        ("S1", (), "input images is missing"),
        ("S1", ("images", "text_images", "edits", "cats"), "an input cats"),
    ):
        with pytest.raises(UserError, match=sentence):
            check_inputs(STEPS["filter_images"], recipe=RECIPE, stage=stage, inputs=dict.fromkeys(names, some))


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ({"workspce": "x"}, "workspce is not a known key"),
        ({"workspace": "ftp://x"}, "allowed are a folder, file:///FOLDER and s3://BUCKET/PREFIX"),
        ({"tracking": {"uri": "localhost:5000"}}, "allowed are http://"),
        ({"launch": {"default": {"threads": 0}}}, "launch.default.threads: found 0"),
        ({"s3": {"endpoint": "x"}}, "s3.endpoint is not a known key"),
        ({"workspace": ""}, "workspace"),
    ],
)
def test_a_wrong_site_is_one_sentence_that_names_the_field(document, sentence):
    with pytest.raises(UserError) as error:
        parse_site(document, "site s.yaml")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_site_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="none.yaml"):
        load_site(tmp_path / "none.yaml")
