"""Runs that are killed, and runs on S3, give the very results of the undisturbed run on a disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from model_core.recipe import DIMENSIONS
from tests.integration.conftest import Darkroom

DEADLINE_SECONDS = 300


def contents(workspace: Path) -> dict[str, list[Any]]:
    """The files of every committed result, with their digests, by step and key."""
    manifests = [json.loads(path.read_bytes()) for path in workspace.glob("*/*/manifest.json")]
    return {f"{manifest['step']}/{manifest['key']}": manifest["files"] for manifest in manifests}


def trainings(workspace: Path) -> dict[str, dict[str, Any]]:
    """The statistics of the results of train_vae and train_mmdit."""
    paths = [path for step in ("train_vae", "train_mmdit") for path in sorted(workspace.glob(f"{step}/*/manifest.json"))]
    manifests = [json.loads(path.read_bytes()) for path in paths]
    return {f"{manifest['step']}-{manifest['stage']}": manifest["stats"] for manifest in manifests}


def kill_after_a_checkpoint(running: subprocess.Popen[str], step_folder: Path) -> None:
    """SIGKILL to the process that claims a step, as soon as the step has a committed checkpoint."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not list(step_folder.glob("*/checkpoints/*/COMMIT.json")):
        assert running.poll() is None, f"the run ended before {step_folder.name} had a checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    claim = next(step_folder.glob("*/claim.json"))
    os.kill(json.loads(claim.read_bytes())["pid"], signal.SIGKILL)


@pytest.fixture
def copy_without_training(darkroom: Darkroom, first: dict[str, Any], tmp_path: Path) -> Darkroom:
    """A folder whose workspace holds the data steps of the undisturbed run, and nothing of its training."""
    copy = Darkroom(tmp_path)
    for step in ("ingest_images", "render_text", "build_edits", "filter_images", "caption_images", "prepare_encoder"):
        shutil.copytree(darkroom.workspace / step, copy.workspace / step)
    return copy


def test_a_run_killed_in_both_trainings_resumes_to_bitwise_the_same_results(
    darkroom: Darkroom, first: dict[str, Any], copy_without_training: Darkroom
) -> None:
    said = ""
    for step in ("train_vae", "train_mmdit"):
        running = copy_without_training.start("run", "smoke", "--name", "killed")
        kill_after_a_checkpoint(running, copy_without_training.workspace / step)
        output, _ = running.communicate(timeout=DEADLINE_SECONDS)
        assert running.returncode == 1, output
        said += output
    said += copy_without_training("run", "smoke", "--name", "killed")
    assert said.count("resumed after step") >= 2
    disturbed, undisturbed = contents(copy_without_training.workspace), contents(darkroom.workspace)
    for name in disturbed:
        assert disturbed[name] == undisturbed[name], name
    trained = [name for name in disturbed if name.startswith(("train_", "align_", "distill_dmd", "register_model"))]
    assert len(trained) == 4 + len(DIMENSIONS) + 2 + 1 + 1


@pytest.mark.lab
def test_a_workspace_on_s3_has_the_same_keys_and_digests_as_one_on_a_disk(
    darkroom: Darkroom, first: dict[str, Any], lab_site: Path, tmp_path: Path
) -> None:
    here = Darkroom(tmp_path)
    told = json.loads(here("run", "smoke", "--name", "remote", "--site", "site.yaml", "--json"))
    remote, local = ({(step["step"], step["stage"]): step["key"] for step in run["steps"]} for run in (told, first))
    assert remote == local
    workspace = yaml.safe_load(lab_site.read_text())["workspace"]
    assert json.loads(here("verify", workspace, "--site", "site.yaml", "--json"))["findings"] == []


def test_training_on_two_ranks_gives_the_losses_of_one(darkroom: Darkroom, first: dict[str, Any], copy_without_training: Darkroom) -> None:
    for step in ("train_vae", "encode_latents"):  # latents that differ by rounding would be another data set, in another order
        shutil.copytree(darkroom.workspace / step, copy_without_training.workspace / step)
    site = {"workspace": "workspace", "launch": {"steps": {"train_mmdit": {"processes": 2}}}}
    (copy_without_training.here / "two.yaml").write_text(yaml.safe_dump(site))
    alone = [part for section in ("grpo", "dmd", "enhancer", "enhancer_grpo") for part in ("--set", f"{section}=null")]
    copy_without_training("run", "smoke", *alone, "--name", "two", "--site", "two.yaml")
    assert json.loads(copy_without_training("verify", "workspace", "--json"))["findings"] == []
    two, one = (trainings(where.workspace) for where in (copy_without_training, darkroom))
    assert {label: stats["ranks"] for label, stats in two.items()} == {"train_vae-None": 1, "train_mmdit-S1": 2, "train_mmdit-S6": 2}
    for label in ("train_mmdit-S1", "train_mmdit-S6"):
        assert two[label]["loss"] == pytest.approx(one[label]["loss"], abs=1e-5), label


def test_what_several_processes_cannot_do_is_refused_in_one_sentence(first: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("{}")
    recipe = Path(__file__).parents[2] / "pipelines/recipes/smoke.yaml"
    command = [sys.executable, "-m", "model_core.torchrun", "2", "ingest_images", "--recipe", str(recipe), "--site", "site.yaml"]
    done = subprocess.run(
        [*command, "--run", "r", "--output", "m.json"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 10, done.stderr
    assert (
        "launch profile of ingest_images: found 2 processes; allowed is 1, only train_vae, train_mmdit, align_grpo, distill_dmd take more"
        in done.stderr
    )
    assert "Traceback" not in done.stderr
