"""Keys, claims, commits: same key same place, one writer, nothing half-written is ever read."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest

from model_core.claim import STALE_SECONDS, acquire, current_owner, is_stale
from model_core.manifest import Code, Manifest, TrackedRun, parse_manifest
from model_core.recipe import UserError, parse_recipe
from model_core.site import Site, load_site, parse_site
from model_core.steps.registry import STEPS
from model_core.storage import open_storage
from model_core.workspace import Address, InputFolder, StepResult, Workspace, check_inputs, step_key

RECIPE = parse_recipe({"name": "tiny", "mmdit": {"stages": {"S1": {}, "S2": {}}}}, "recipe")
CODE = Code(version="0", git_sha=None, image_digest=None)


def commit(workspace: Workspace, content: str = "hello", step: str = "ingest_images") -> Manifest:
    address = Address(step, None, step_key(STEPS["ingest_images"], RECIPE, stage=None, inputs={}, sources=content))
    folder = workspace.output_folder(address)
    (folder / "deep").mkdir()
    (folder / "deep" / "a.txt").write_text(content)
    return workspace.commit(address, folder, spec=STEPS["ingest_images"], recipe=RECIPE, inputs={}, result=StepResult({"rows": 1}, CODE))


def test_a_committed_step_is_found_and_its_files_read_back(tmp_path):
    site = Site(workspace=str(tmp_path))
    manifest = commit(Workspace(site))
    found = Workspace(site).find(Address(manifest.step, None, manifest.key))
    assert found == manifest
    assert InputFolder(manifest, site=site).path("deep/a.txt").read_text() == "hello"
    assert InputFolder(manifest, site=site).folder("deep").name == "deep"


def test_a_folder_without_a_manifest_does_not_exist_and_is_cleared_but_for_its_checkpoints(tmp_path):
    workspace = Workspace(Site(workspace=str(tmp_path)))
    address = Address("train_vae", None, "0" * 16)
    folder = workspace.output_folder(address)
    (folder / "half.bin").write_bytes(b"half")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "state.pt").write_bytes(b"state")
    assert workspace.find(address) is None
    assert sorted(path.name for path in workspace.output_folder(address).iterdir()) == ["checkpoints"]


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


def _acquire(storage, **changes):
    arguments = {"finished": lambda: False, "on_lost": lambda: None, "say": lambda _: None} | changes
    return acquire(storage, "step/key/claim.json", **arguments)


def test_of_eight_that_want_a_claim_one_gets_it_at_a_time(tmp_path):
    storage = open_storage(tmp_path.as_uri())
    holders, most = [], []

    def work() -> None:
        claim = _acquire(storage)
        with claim:
            holders.append(1)
            most.append(len(holders))
            time.sleep(0.01)
            holders.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]


def test_a_claim_of_a_process_that_died_is_taken_over_at_once(tmp_path):
    storage = open_storage(tmp_path.as_uri())
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    storage.put("step/key/claim.json", json.dumps(asdict(replace(current_owner(), pid=gone.pid))).encode())
    began = time.monotonic()
    with _acquire(storage):
        assert time.monotonic() - began < 1
        assert json.loads(storage.get("step/key/claim.json"))["pid"] == os.getpid()


def test_a_claim_elsewhere_is_stale_only_when_its_heartbeat_stops():
    owner = replace(current_owner(), host="another/boot")
    assert not is_stale(owner, now=owner.heartbeat + STALE_SECONDS - 1)
    assert is_stale(owner, now=owner.heartbeat + STALE_SECONDS + 1)


def test_waiting_for_a_claim_ends_when_somebody_else_has_finished(tmp_path):
    storage = open_storage(tmp_path.as_uri())
    storage.put("step/key/claim.json", json.dumps(asdict(replace(current_owner(), host="another/boot"))).encode())
    answers = iter([False, False, True])
    said = []
    assert _acquire(storage, finished=lambda: next(answers), say=said.append) is None
    assert "waiting for process" in said[0]
