"""The report of finished and of failed runs: complete, self-contained, escaped."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from model_core.data.folders import LocalFolder
from model_core.documents import UserError
from model_core.evaluation.report import render_page, write_report
from model_core.manifest import Code, Manifest, TrackedRun
from model_core.recipe import Recipe
from model_core.run_record import RunRecord, StepRecord, write_run, write_step
from model_core.site import parse_site
from model_core.steps import publish_report
from model_core.workspace import Workspace

HOSTILE = "<script>alert('x')</script> & \"quotes\""
KEY = "0123456789abcdef"
FUNNEL = [{"operator": "min_side", "in": 120, "out": 100, "reason": HOSTILE}]


def png(level: int = 9) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def documents() -> dict[str, dict[str, Any]]:
    """What the inputs of publish_report hold, by input and file."""
    shown = {"group": "plain", "text": HOSTILE, "seed": 0, "asked": {"color": "red", "text": "A7"}, "right": {"color": True, "text": False}}
    shown |= {"reading": {"color": "red", "text": HOSTILE}, "image": "samples/a.png", "shown": True}
    edit = {
        "operation": "style",
        "instruction": HOSTILE,
        "change": {},
        "sources": ["edits/s.png"],
        "result": "edits/r.png",
        "target": "edits/t.png",
    }
    edit |= {"success": True, "consistency": 0.5, "kept": {"shape": False}, "reading": {}, "shown": True}
    part = {"step": "train_vae", "stage": None, "key": KEY, "content_digest": "ab" * 32}
    return {
        "evaluation": {
            "scores.json": {"judge/mean": 0.91, "judge_check/text": 1.0, "edit/success": 0.5, "vae/psnr": 27.3, "vae/ssim": 0.9},
            "prompts.json": [shown, shown | {"image": "samples/hidden.png", "shown": False}],
            "edits.json": [edit],
            "reconstructions.json": [{"psnr": 27.3, "ssim": 0.9, "original": "rec/o.png", "decoded": "rec/d.png", "shown": True}],
            "warnings.json": [HOSTILE],
        },
        "registration": {"model.json": {"name": "darkroom", "alias": "candidate", "sampling": {"steps": 4}, "parts": {"vae": part}}},
        "model": {
            "history.json": [
                {"stage": "S1", "curves": [{"step": 20, "loss": 1.0}, {"step": 40, "loss": 0.5}], "validation": {"image": 0.4}}
            ]
        },
        "vae": {"curves.json": [{"step": 20, "loss": 0.2}]},
    }


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(parse_site({"workspace": str(tmp_path / "workspace")}, "site"))


def alignment() -> dict[str, Any]:
    """What an aligned model tells of itself."""
    pair, accuracy = {"before": 0.5, "after": 0.625}, {"value": 0.9712, "low": 0.94, "high": 0.99, "num": 200}
    comparison = {"reward": pair, "gain_in_spreads": 0.71, "p": 0.0001, "rewards": {HOSTILE: pair}, "judge": {"judge/text": pair}}
    shown = {"prompt": HOSTILE, "kind": "edit", "seed": 3, "reward": {"before": 0.5, "after": None}}
    shown |= {"pictures": {"before": "pictures/0-before.png", "after": "pictures/0-after.png", "source0": "pictures/0-source0.png"}}
    return {
        "points": [{"update": 0, "reward": 0.5, "gold": 0.4, "reward/a": 0.5}, {"update": 1, "reward": 0.625, "reward/a": 0.6}],
        "changes": [],
        "comparison": comparison,
        "guidance_mode": "conditional",
        "gold": "check_mean",
        "report_cards": {"alignment": {"accuracy": accuracy, "accuracy_3way": accuracy, "pairs": 222}},
        "shown": [shown],
    }


def distillation() -> dict[str, Any]:
    """What a student tells of itself."""
    names = ("teacher", "teacher_few", "teacher_as_dear", "student")
    judge = {name: {"judge/mean": 0.5 + place / 16} for place, name in enumerate(names)}
    shown = {"index": 0, "prompt": HOSTILE, "kind": "image", "seed": 3, "pictures": {name: f"students/0-{name}.png" for name in names}}
    return {
        "points": [{"iteration": 20, "critic_error/t0": 0.5, "student_grad_norm": 0.1, "picture_mean": 0.4}],
        "comparison": {"judge": judge, "share_of_teacher": 0.9512, "p": {"teacher_few": 0.25, "teacher_as_dear": 0.0001}},
        "sampler": {"steps": 4, "shift_mu": [0.5, 0.9]},
        "teacher": {"steps": 40, "evaluations_a_step": 2, "steps_as_dear": 2},
        "shown": [shown],
    }


def enhancement() -> dict[str, dict[str, Any]]:
    """What an aligned Prompt Enhancer tells of itself, and its card."""
    ways = ("own", "supervised", "aligned")
    figures = {way: {"judge/mean": 0.5 + place / 8} for place, way in enumerate(ways)}
    comparison = {"judge": figures, "rewards": {way: {HOSTILE: 0.25} for way in ways}}
    shown = {"request": HOSTILE, "prompt": f"fine {HOSTILE}", "thoughts": [], "seed": 1}
    shown |= {"pictures": {way: f"requests/0-{way}.png" for way in ways}}
    card = {"valid_json": 0.9934, "num": 128, "quoted_kept": 1.0, "restored": 0.8765, "examples": [{"request": HOSTILE, "prompt": "fine"}]}
    return {"enhancement.json": {"points": [], "comparison": comparison, "shown": [shown]}, "enhancer_card.json": card}


def publish(tmp_path: Path, output: Path, *, aligned: bool = False, student: bool = False, enhancer: str = "") -> None:
    inputs = {}
    given = documents()
    drawn: dict[str, dict[str, Any]] = {}
    if aligned:
        drawn["model"] = given["model"]["alignment.json"] = alignment()
    if student:
        drawn["student"] = distillation()
        given["student"] = {"distillation.json": distillation()}
    if enhancer:
        given["enhancer"] = enhancement()
        drawn["enhancer"] = given["enhancer"]["enhancement.json"]
        if enhancer == "supervised":
            del given["enhancer"]["enhancement.json"], drawn["enhancer"]
    for name, document in drawn.items():
        for place in document["shown"][0]["pictures"].values():
            path = tmp_path / "inputs" / name / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(77))
    for name, files in given.items():
        folder = tmp_path / "inputs" / name
        for place in ("samples/a.png", "edits/s.png", "edits/r.png", "edits/t.png", "rec/o.png", "rec/d.png"):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).write_bytes(png())
        for file, document in files.items():
            (folder / file).write_text(json.dumps(document))
        inputs[name] = LocalFolder(folder)
    output.mkdir(parents=True, exist_ok=True)
    publish_report.run(SimpleNamespace(inputs=inputs, output=output))  # type: ignore[arg-type]


def run_of(workspace: Workspace, steps: list[tuple[str, str | None, str]]) -> None:
    """A run named r whose steps have these names, stages and statuses; done ones are committed."""
    recipe = Recipe.model_validate({"name": "test", "mmdit": {"stages": {"S1": {}}}})
    write_run(workspace.storage, RunRecord("r", recipe.model_dump(mode="json"), recipe.digest(), "2026-01-02T03:04:05+00:00"))
    for index, (step, stage, status) in enumerate(steps):
        uri, error = f"{workspace.uri}/{step}/{KEY}", HOSTILE if status == "failed" else None
        write_step(workspace.storage, "r", StepRecord(step, stage, KEY, status, 61.5, index == 0, uri, f"2026-01-02T03:{index:02d}", error))  # type: ignore[arg-type]
        if status == "done":
            manifest = Manifest(
                kind="report", step=step, stage=stage, key=KEY, uri=uri, files=(), parents=(), recipe_digest=recipe.digest(),
                code=Code(version="0", git_sha=None, image_digest=None), stats={"warnings": [f"{HOSTILE} in {step}"]}, mlflow=TrackedRun(),
                created_at="2026-01-02T03:04:05+00:00",
            )  # fmt: skip
            workspace.storage.put(f"{step}/{KEY}/manifest.json", manifest.to_bytes())
        if step == "filter_images":
            workspace.storage.put(f"{step}/{KEY}/funnel.json", json.dumps(FUNNEL).encode())


def read(workspace: Workspace) -> tuple[str, dict[str, Any]]:
    storage = workspace.storage
    return storage.get("reports/r/report.html").decode(), json.loads(storage.get("reports/r/report.json"))


def test_a_finished_run_has_its_scores_pictures_and_steps(workspace, tmp_path):
    run_of(workspace, [("ingest_images", None, "done"), ("filter_images", "S1", "done"), ("publish_report", None, "done")])
    publish(tmp_path, workspace.storage.local_path(f"publish_report/{KEY}"))
    assert write_report("r", workspace) == f"{workspace.storage.uri}/reports/r/report.html"
    page, report = read(workspace)
    assert list(report) == ["run", "recipe", "recipe_digest", "steps", "metrics", "images", "warnings"]
    assert [list(step) for step in report["steps"]] == [["step", "stage", "key", "status", "seconds", "reused", "uri"]] * 3
    assert report["metrics"]["judge/mean"] == 0.91
    assert report["metrics"]["val_loss/image"] == 0.4
    assert report["images"] == [
        f"publish_report/{KEY}/{name}" for name in ("samples/a.png", "edits/s.png", "edits/r.png", "edits/t.png", "rec/o.png", "rec/d.png")
    ]
    assert all(workspace.storage.get(name) == png() for name in report["images"])
    assert len(report["warnings"]) == 3
    assert page.count("data:image/png;base64,") == 6
    for word in ("91 %", "27.3 dB", "finished", "1 min 01 s", "reused", "120 → 100", "<svg", "S1"):
        assert word in page, word


def test_an_aligned_model_shows_what_alignment_changed(workspace, tmp_path):
    run_of(workspace, [("publish_report", None, "done")])
    publish(tmp_path, workspace.storage.local_path(f"publish_report/{KEY}"), aligned=True)
    write_report("r", workspace)
    page, report = read(workspace)
    assert report["images"][-3:] == [f"publish_report/{KEY}/pictures/0-{name}.png" for name in ("before", "after", "source0")]
    for words in (
        "from 0.5000 to 0.6250",
        "+0.71 of its deviation",
        "p = 0.0001",
        "97 %",
        "94 % to 99 %",
        "check mean, never trained on",
        "judge/text",
    ):
        assert words in page, words
    assert HOSTILE not in page


def test_a_student_is_shown_beside_its_teacher(workspace, tmp_path):
    run_of(workspace, [("publish_report", None, "done")])
    publish(tmp_path, workspace.storage.local_path(f"publish_report/{KEY}"), student=True)
    write_report("r", workspace)
    page, report = read(workspace)
    assert report["images"][-1] == f"publish_report/{KEY}/students/0-student.png"
    assert report["metrics"]["student/judge/mean"] == 0.6875
    for words in ("In 4 steps", "the teacher asks 80 times", "95 %", "p = 0.2500", "0.0001 at the same cost", "gradient norm", "0.688"):
        assert words in page, words
    assert HOSTILE not in page


def test_an_enhancer_is_shown_by_what_its_prompts_draw_or_by_its_prompts(workspace, tmp_path):
    run_of(workspace, [("publish_report", None, "done")])
    publish(tmp_path, workspace.storage.local_path(f"publish_report/{KEY}"), enhancer="aligned")
    write_report("r", workspace)
    page, report = read(workspace)
    assert report["images"][-1] == f"publish_report/{KEY}/requests/0-aligned.png"
    for words in ("99 % of 128 held-out requests", "88 %", "0.750", "fine &lt;script&gt;"):
        assert words in page, words
    assert HOSTILE not in page
    publish(tmp_path / "supervised", tmp_path / "alone", enhancer="supervised")
    page = (tmp_path / "alone/report.html").read_text()
    assert "<td>fine</td>" in page
    assert "aligned</th>" not in page


def test_a_failed_run_says_what_failed_and_why(workspace):
    run_of(workspace, [("ingest_images", None, "done"), ("train_vae", None, "failed")])
    write_report("r", workspace)
    page, report = read(workspace)
    assert "train_vae failed after 1 min 01 s" in page
    assert "&lt;script&gt;" in page
    assert report["metrics"] == {}
    assert report["images"] == []
    assert f"train_vae failed: {HOSTILE}" in report["warnings"]


def test_nothing_in_the_page_is_code_or_comes_from_elsewhere(workspace, tmp_path):
    run_of(
        workspace,
        [("ingest_images", None, "done"), ("filter_images", "S1", "done"), ("train_vae", None, "failed"), ("publish_report", None, "done")],
    )
    publish(tmp_path, workspace.storage.local_path(f"publish_report/{KEY}"))
    write_report("r", workspace)
    page = read(workspace)[0]
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=\"(?!data:|#)|https?://|@import|url\(", page)


def test_the_step_leaves_equal_bytes_and_a_page_of_its_own(tmp_path):
    for name in ("first", "second"):
        publish(tmp_path, tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file())
    assert Path("report.html") in files
    assert Path("samples/hidden.png") not in files
    assert all((tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes() for file in files)


def test_a_large_picture_goes_into_the_page_as_jpeg(tmp_path):
    publish(tmp_path, tmp_path / "out")
    noise = Image.effect_noise((400, 400), 90).convert("RGB")
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    page = render_page(json.loads((tmp_path / "out" / "body.json").read_text()), read=lambda name: buffer.getvalue())
    assert "data:image/jpeg;base64," in page
    assert "data:image/png" not in page


def test_an_unknown_run_is_refused(workspace):
    with pytest.raises(UserError, match="nobody"):
        write_report("nobody", workspace)
