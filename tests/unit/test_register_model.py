"""register_model: a small file of references, the same everywhere, and a request to the registry."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model_core.context import StepContext
from model_core.documents import UserError
from model_core.manifest import Code, FileEntry, Manifest, TrackedRun
from model_core.progress import Progress
from model_core.recipe import parse_recipe
from model_core.site import Site
from model_core.steps.register_model import run
from model_core.storage import open_storage
from model_core.tracking.spool import open_tracker, parse_lines
from model_core.training.checkpoint import CheckpointStore
from model_core.workspace import InputFolder

SCORES = {"judge/mean": 0.9, "edit/success": 0.75}


def made_by(step: str, workspace: Path, *, site: Site, stage: str | None = None, files: dict[str, bytes]) -> InputFolder:
    folder = workspace / step / "0123456789abcdef"
    entries = []
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        entries.append(FileEntry(path=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest()))
    manifest = Manifest(
        kind="evaluation" if step == "evaluate_model" else "model",
        step=step,
        stage=stage,
        key="0123456789abcdef",
        uri=folder.as_uri(),
        files=tuple(entries),
        parents=(),
        recipe_digest="0" * 64,
        code=Code(version="0", git_sha=None, image_digest=None),
        stats={},
        mlflow=TrackedRun(),
        created_at="2026-01-01T00:00:00+00:00",
    )
    return InputFolder(manifest, site=site)


def context_at(workspace: Path, scores: dict[str, Any] = SCORES) -> StepContext:
    site = Site(workspace=str(workspace))
    output = workspace / "register_model" / "fedcba9876543210"
    output.mkdir(parents=True)
    recipe = parse_recipe(
        {"name": "tiny", "mmdit": {"stages": {"S1": {}, "S6": {}}}, "registry": {"name": "painter", "alias": "staging"}}, "test"
    )
    return StepContext(
        recipe=recipe,
        site=site,
        stage=None,
        run="r1",
        key="fedcba9876543210",
        inputs={
            "model": made_by("train_mmdit", workspace, site=site, stage="S6", files={"mmdit/model.safetensors": b"weights"}),
            "vae": made_by("train_vae", workspace, site=site, files={"vae/model.safetensors": b"other weights"}),
            "encoder": made_by("prepare_encoder", workspace, site=site, files={"encoder/model.safetensors": b"words"}),
            "evaluation": made_by("evaluate_model", workspace, site=site, files={"scores.json": json.dumps(scores).encode()}),
        },
        output=output,
        scratch=workspace,
        checkpoints=CheckpointStore(open_storage(workspace.as_uri()), "checkpoints", say=lambda _: None, scratch=workspace),
        tracker=open_tracker(site.spool_folder, run="r1", step="register_model", stage=None, key="fedcba9876543210", experiment="darkroom"),
        progress=Progress("register_model"),
    )


def test_model_json_names_parts_settings_and_scores(tmp_path: Path) -> None:
    context = context_at(tmp_path)
    assert run(context) == {"name": "painter", "alias": "staging", **SCORES}
    document = json.loads((context.output / "model.json").read_bytes())
    assert (document["name"], document["alias"], document["scores"]) == ("painter", "staging", SCORES)
    assert document["sampling"]["steps"] == context.recipe.sampling.steps
    assert document["parts"]["mmdit"] == {
        "step": "train_mmdit",
        "stage": "S6",
        "key": "0123456789abcdef",
        "content_digest": context.inputs["model"].manifest.content_digest,
    }
    assert [document["parts"][part]["step"] for part in ("vae", "encoder")] == ["train_vae", "prepare_encoder"]


def test_model_json_is_the_same_bytes_in_another_workspace_and_holds_no_weights(tmp_path: Path) -> None:
    contexts = [context_at(tmp_path / name) for name in ("here", "there")]
    for context in contexts:
        run(context)
    assert [[file.name for file in context.output.iterdir()] for context in contexts] == [["model.json"], ["model.json"]]
    assert (contexts[0].output / "model.json").read_bytes() == (contexts[1].output / "model.json").read_bytes()


def test_version_is_asked_for_in_the_spool(tmp_path: Path) -> None:
    context = context_at(tmp_path)
    run(context)
    (event,) = [event for event in parse_lines(context.tracker.path.read_bytes()) if event["op"] == "register"]
    assert (event["name"], event["alias"]) == ("painter", "staging")
    assert event["tags"]["part/mmdit"] == "train_mmdit/0123456789abcdef"
    assert event["tags"]["score/judge/mean"] == "0.9"


def with_trained_extras(context: StepContext, judged: dict[str, Any]) -> StepContext:
    """The context with a student, judged so, and an enhancer."""
    workspace = Path(context.site.workspace)
    distilled = {"comparison": {"judge": {"student": judged, "teacher": {"mean": 0.9}}}}
    files = {"mmdit/model.safetensors": b"few steps", "distillation.json": json.dumps(distilled).encode()}
    student = made_by("distill_dmd", workspace, site=context.site, files=files)
    enhancer = made_by("train_enhancer", workspace, site=context.site, files={"enhancer/model.safetensors": b"words"})
    return replace(context, inputs={**context.inputs, "student": student, "enhancer": enhancer})


def test_student_and_enhancer_are_parts_and_the_students_scores_are_named_apart(tmp_path: Path) -> None:
    context = with_trained_extras(context_at(tmp_path), {"mean": 0.85})
    assert run(context) == {"name": "painter", "alias": "staging", **SCORES, "student/mean": 0.85}
    document = json.loads((context.output / "model.json").read_bytes())
    assert set(document["parts"]) == {"mmdit", "vae", "encoder", "student", "enhancer"}
    assert document["parts"]["student"]["step"] == "distill_dmd"
    assert document["parts"]["enhancer"]["content_digest"] == context.inputs["enhancer"].manifest.content_digest
    (event,) = [event for event in parse_lines(context.tracker.path.read_bytes()) if event["op"] == "register"]
    assert (event["tags"]["part/student"], event["tags"]["score/student/mean"]) == ("distill_dmd/0123456789abcdef", "0.85")


def test_student_whose_pictures_nobody_judged_has_no_scores(tmp_path: Path) -> None:
    context = context_at(tmp_path)
    student = made_by("distill_dmd", tmp_path, site=context.site, files={"mmdit/model.safetensors": b"few steps"})
    assert run(replace(context, inputs={**context.inputs, "student": student})) == {"name": "painter", "alias": "staging", **SCORES}


def test_students_score_that_is_no_number_is_refused(tmp_path: Path) -> None:
    context = with_trained_extras(context_at(tmp_path), {"mean": "good"})
    with pytest.raises(UserError, match=r"distillation.json: mean is 'good'; allowed are finite numbers"):
        run(context)
    assert list(context.output.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), "good", None, True])
def test_score_that_is_no_number_is_refused_before_anything_is_written(tmp_path: Path, value: Any) -> None:
    context = context_at(tmp_path, {"judge/mean": value})
    with pytest.raises(UserError, match=r"judge/mean is .*allowed are finite numbers"):
        run(context)
    assert list(context.output.iterdir()) == []


def test_step_needs_neither_torch_nor_mlflow() -> None:
    code = "import sys, model_core.steps.register_model; print(*[name for name in ('mlflow', 'torch') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split() == []
