"""The recipe smoke, whole, through Kubeflow's local runner: every step real, and then nothing left to do."""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from pathlib import Path
from typing import Any

import pytest

from components.launch import run_step
from model_core.manifest import parse_manifest
from model_core.recipe import DIMENSIONS
from tests.integration.conftest import Darkroom

ROOT = Path(__file__).parents[2]
METRICS = {
    "vae/psnr",
    "vae/ssim",
    "judge/color",
    "judge/shape",
    "judge/position",
    "judge/text",
    "judge/mean",
    "edit/success",
    "edit/consistency",
}
NUM_STEPS = 25


@pytest.fixture(scope="module")
def second(darkroom: Darkroom, first: dict[str, Any]) -> tuple[dict[str, Any], float]:
    began = time.monotonic()
    told = json.loads(darkroom("run", "smoke", "--name", "second", "--json"))
    return told, time.monotonic() - began


def by_label(told: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {step["step"] + (f"-{step['stage']}" if step["stage"] else ""): step for step in told["steps"]}


def test_every_step_of_the_dag_is_done(first: dict[str, Any]) -> None:
    assert len(first["steps"]) == NUM_STEPS
    assert {step["status"] for step in first["steps"]} == {"done"}


def test_report_has_all_scores(first: dict[str, Any], workspace: Path) -> None:
    assert set(first["metrics"]) >= METRICS
    report = json.loads((workspace / "reports" / "first" / "report.json").read_text())
    assert set(report) >= {"run", "recipe", "recipe_digest", "steps", "metrics", "images", "warnings"}
    assert report["run"] == "first"
    assert "<html" in (workspace / "reports" / "first" / "report.html").read_text()


def test_second_run_reuses_every_step(second: tuple[dict[str, Any], float]) -> None:
    told, seconds = second
    steps = by_label(told)
    assert len(steps) == NUM_STEPS
    assert {label for label, step in steps.items() if not step["reused"]} <= {"publish_report"}
    assert seconds < 60 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def test_second_run_has_the_same_keys_and_a_report_of_its_own(
    first: dict[str, Any], second: tuple[dict[str, Any], float], workspace: Path
) -> None:
    keys = {label: step["key"] for label, step in by_label(first).items() if label != "publish_report"}
    assert keys == {label: step["key"] for label, step in by_label(second[0]).items() if label != "publish_report"}
    assert json.loads((workspace / "reports" / "second" / "report.json").read_text())["run"] == "second"


def test_another_learning_rate_of_the_last_stage_touches_only_what_depends_on_it(darkroom: Darkroom, first: dict[str, Any]) -> None:
    plan = json.loads(darkroom("run", "smoke", "--set", "mmdit.stages.S6.lr=3e-5", "--dry-run", "--json"))
    to_do = {(step["step"], step["stage"]) for step in plan if step["status"] != "reuse"}
    after = ("build_preferences", "align_grpo", "distill_dmd", "align_enhancer", "evaluate_model", "register_model", "publish_report")
    assert to_do == {("train_mmdit", "S6"), *((step, None) for step in after), *(("train_reward", name) for name in DIMENSIONS)}


def test_another_learning_rate_of_grpo_keeps_the_rewards(darkroom: Darkroom, first: dict[str, Any]) -> None:
    plan = json.loads(darkroom("run", "smoke", "--set", "grpo.lr=3e-5", "--dry-run", "--json"))
    to_do = {step["step"] for step in plan if step["status"] != "reuse"}
    assert to_do == {"align_grpo", "distill_dmd", "align_enhancer", "evaluate_model", "register_model", "publish_report"}


def test_a_longer_distillation_keeps_the_teacher(darkroom: Darkroom, first: dict[str, Any]) -> None:
    plan = json.loads(darkroom("run", "smoke", "--set", "dmd.iterations=6", "--dry-run", "--json"))
    to_do = {step["step"] for step in plan if step["status"] != "reuse"}
    assert to_do == {"distill_dmd", "align_enhancer", "register_model", "publish_report"}


def test_rewards_served_beside_the_step_train_the_very_same_model(first: dict[str, Any], workspace: Path, tmp_path: Path) -> None:
    steps = by_label(first)
    manifests = {label: workspace / step["step"] / step["key"] / "manifest.json" for label, step in steps.items()}
    names = {
        "vae": "train_vae",
        "encoder": "prepare_encoder",
        "captions": "caption_images",
        "images": "ingest_images",
        "edits": "build_edits",
    }
    inputs = {name: str(manifests[label]) for name, label in names.items()} | {"model": str(manifests["train_mmdit-S6"])}
    inputs |= {name: str(manifests[f"train_reward-{name}"]) for name in DIMENSIONS}
    site = {"workspace": str(tmp_path / "elsewhere"), "launch": {"steps": {"align_grpo": {"reward_service": True}}}}
    recipe = json.loads((workspace / "runs/first/run.json").read_text())["recipe"]
    output = tmp_path / "manifest.json"
    run_step("align_grpo", recipe=json.dumps(recipe), site=json.dumps(site), run="served", inputs=inputs, output=str(output))
    served, own = (parse_manifest(path.read_bytes(), str(path)) for path in (output, manifests["align_grpo"]))
    assert served.content_digest == own.content_digest


def test_all_results_are_what_their_manifests_promise(darkroom: Darkroom, first: dict[str, Any]) -> None:
    told = json.loads(darkroom("verify", "workspace", "--json"))
    assert told["num_manifests"] >= NUM_STEPS
    assert told["findings"] == []


def test_same_seed_draws_the_same_bytes(darkroom: Darkroom, first: dict[str, Any]) -> None:
    here = darkroom.here
    drawn = []
    for name in ("a.png", "b.png"):
        darkroom("sample", "first", "a red circle on the left with the text A7", "--seed", "1", "--out", name)
        drawn.append((here / name).read_bytes())
    assert drawn[0] == drawn[1]
    assert drawn[0].startswith(b"\x89PNG")
    darkroom("sample", "first", "a red circle on the left with the text A7", "--seed", "2", "--out", "c.png")
    assert (here / "c.png").read_bytes() != drawn[0]


def test_commands_of_the_readme_run(darkroom: Darkroom, first: dict[str, Any], tmp_path: Path) -> None:
    """As they stand there, but for the names of run and recipe, the folder of photographs, and pages that wait for Ctrl-C."""
    text = (ROOT / "README.md").read_text()
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE) for line in block.splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("darkroom ")]
    assert len(commands) >= 8
    for words in commands:
        if words[0] in ("label", "ui"):
            continue
        if words[:2] == ["run", "demo"]:
            words = [word for word in words if "file:///my/photos" not in word and word != "--set"]
            words = [word for word in words if "=" not in word]
            words = [*words, *(() if "--dry-run" in words else ("--dry-run",))]
        darkroom(*["first" if word == "RUN" else "smoke" if word == "demo" else word for word in words])
