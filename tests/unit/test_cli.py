"""What each command does when all is well, on results made by hand."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from components.launch.local import LINE_MARK
from model_core.manifest import Code
from model_core.recipe import Recipe
from model_core.run_record import RunRecord, StepRecord, write_run, write_step
from model_core.site import Site
from model_core.steps.registry import STEPS
from model_core.workspace import Address, StepResult, Workspace
from pipelines.cli import app
from pipelines.documents import find_recipe, find_site
from pipelines.output import StepLines
from pipelines.run import run_name

COMMANDS = ("run", "plan", "compile", "sample", "export", "report", "label", "ui", "verify", "gc", "doctor")
KEY = "0123456789abcdef"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recipe() -> Recipe:
    return find_recipe("smoke")


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


def commit_result(
    site: Site,
    recipe: Recipe,
    files: dict[str, bytes],
    *,
    step: str = "ingest_images",
    stage: str | None = None,
    warnings: list[str] | None = None,
) -> Path:
    workspace, address = Workspace(site), Address(step, stage, KEY)
    result = StepResult(stats={"warnings": warnings or []}, code=Code(version="0", git_sha=None, image_digest=None))
    with workspace.attempt(address, "0") as folder:
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        workspace.commit(address, folder, spec=STEPS[step], recipe=recipe, inputs={}, result=result, confirm=lambda: None)
        return folder.parent


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_shows_an_example(command: str) -> None:
    assert f"Example: darkroom {command}" in invoke(command, "--help")


def test_all_commands_are_listed() -> None:
    listed = invoke("--help")
    assert all(command in listed for command in COMMANDS)


def test_installed_command_starts(here: Path) -> None:
    done = subprocess.run([str(Path(sys.executable).parent / "darkroom"), "run", "nope"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("darkroom: recipe 'nope'")


@pytest.mark.parametrize("name", ["smoke", "demo", "finetune", "qwen_image_2"])
def test_built_in_recipes_are_found_by_name(name: str) -> None:
    assert find_recipe(name).name == name


def test_site_is_absolute_so_that_steps_find_it_from_anywhere(here: Path) -> None:
    site = find_site("local")
    assert site.workspace == (here / "workspace").as_uri()
    assert Path(site.scratch or "").is_absolute()


def test_run_is_named_by_recipe_and_time(recipe: Recipe) -> None:
    assert run_name(recipe, datetime(2026, 11, 21, 9, 30, 5, tzinfo=UTC)) == "smoke-20261121-093005"


def test_dry_run_tells_each_step_and_writes_nothing(here: Path) -> None:
    plan = json.loads(invoke("run", "smoke", "--dry-run", "--json"))
    assert [entry["status"] for entry in plan] == ["run", *["after others"] * (len(plan) - 1)]
    assert plan[0]["step"] == "ingest_images"
    assert len(plan[0]["key"]) == 16
    assert not (here / "workspace").exists()


def test_dry_run_of_another_learning_rate_keeps_the_keys_of_other_steps(here: Path) -> None:
    first = json.loads(invoke("run", "smoke", "--dry-run", "--json"))
    second = json.loads(invoke("run", "smoke", "--dry-run", "--json", "--set", "mmdit.stages.S6.lr=3e-5"))
    assert first[0]["key"] == second[0]["key"]


def test_compile_writes_the_dag(here: Path) -> None:
    assert "wrote build/pipeline.yaml" in invoke("compile", "smoke", "-o", "build/pipeline.yaml")
    assert "exec-train-mmdit-2" in Path("build/pipeline.yaml").read_text()
    assert [path.name for path in Path("build").iterdir()] == ["pipeline.yaml"]


def test_compile_writes_the_dag_of_the_papers_recipe(here: Path) -> None:
    invoke("compile", "qwen_image_2", "-o", "pipeline.yaml")
    assert all(name in Path("pipeline.yaml").read_text() for name in ("S4x1024", "S6x2048"))


def test_verify_reads_every_file_again(here: Path, recipe: Recipe) -> None:
    folder = commit_result(find_site("local"), recipe, {"shards/part.bin": b"content"})
    assert "1 manifests, 1 files" in invoke("verify", "workspace")
    assert "1 manifests, 1 files" in invoke("verify", str(folder))
    assert "1 manifests, 1 files" in invoke("verify", (folder / "manifest.json").as_uri())


@pytest.mark.parametrize(("damage", "problem"), [(lambda path: path.write_bytes(b"contenT"), "changed"), (Path.unlink, "missing")])
def test_verify_finds_damage_and_fails(damage: object, problem: str, here: Path, recipe: Recipe) -> None:
    folder = commit_result(find_site("local"), recipe, {"shards/part.bin": b"content"})
    damage(folder / "shards" / "part.bin")  # type: ignore[operator]
    result = CliRunner().invoke(app, ["verify", "workspace"])
    assert result.exit_code == 1
    assert f"{problem}: {folder.as_uri()}/shards/part.bin" in result.stderr


def write_finished_run(site: Site, recipe: Recipe, name: str, started_at: str) -> None:
    storage = Workspace(site).storage
    write_run(storage, RunRecord(name, recipe.model_dump(mode="json"), recipe.digest(), started_at))
    for number, (step, stage, is_reused) in enumerate(
        (("train_vae", None, False), ("train_mmdit", "S1", True), ("publish_report", None, False))
    ):
        uri = f"{storage.uri}/{step}/{KEY}"
        write_step(storage, name, StepRecord(step, stage, KEY, "done", 12.5, is_reused, uri, f"{started_at}.{number}"))


@pytest.fixture
def finished(here: Path, recipe: Recipe) -> Site:
    site = find_site("local")
    model = {"name": "darkroom", "alias": "candidate", "sampling": {}, "parts": {}}
    body = {
        "scores": {"vae/psnr": 27.123456, "judge/mean": 0.9},
        "prompts": [],
        "edits": [],
        "reconstructions": [],
        "warnings": [],
        "curves": [],
    }
    commit_result(site, recipe, {}, step="train_vae", warnings=["few pictures"])
    commit_result(site, recipe, {}, step="train_mmdit", stage="S1")
    commit_result(site, recipe, {"body.json": json.dumps(body | {"model": model}).encode()}, step="publish_report")
    write_finished_run(site, recipe, "b-older", "2026-01-01T00:00:00")
    write_finished_run(site, recipe, "a-newer", "2026-01-02T00:00:00")
    return site


def test_report_shows_the_newest_run_and_what_to_do_next(finished: Site) -> None:
    shown = invoke("report")
    expected = (
        "a-newer",
        "train_vae",
        "reused",
        "27.12",
        "few pictures",
        "reports/a-newer/report.html",
        "darkroom sample a-newer",
        "darkroom ui",
    )
    assert [words for words in expected if words not in shown] == []


def test_report_for_scripts_has_steps_and_scores(finished: Site) -> None:
    told = json.loads(invoke("report", "b-older", "--json"))
    assert told["metrics"]["vae/psnr"] == 27.123456
    assert [step["step"] for step in told["steps"]] == ["train_vae", "train_mmdit", "publish_report"]
    assert told["report"].endswith("reports/b-older/report.html")
    assert Path(told["report"].removeprefix("file://")).exists()


def test_doctor_finds_this_machine_well(here: Path) -> None:
    checks = {check["name"]: check for check in json.loads(invoke("doctor", "--json"))}
    assert set(checks) == {"python", "packages", "cores", "disk", "fonts", "workspace", "tracking"}


def test_doctor_says_how_to_mend_what_is_wrong(here: Path) -> None:
    Path("site.yaml").write_text("tracking: {uri: 'http://127.0.0.1:9'}\nworkspace: ./site.yaml/w\n")
    result = CliRunner().invoke(app, ["doctor", "--site", "site.yaml"])
    assert result.exit_code == 1
    assert "does not answer" in result.stdout
    assert result.stdout.count("to mend:") == 2


def test_only_the_lines_of_steps_are_shown_numbered_by_step() -> None:
    shown: list[str] = []
    lines = StepLines(12, shown.append)
    with redirect_stdout(lines):
        print("10:00:00.000 - INFO - Executing task 'train-vae'")
        for label, text in (("ingest_images", "starts"), ("train_vae", "1/2"), ("ingest_images", "late")):
            print("    ", end="")
            print(f"{LINE_MARK}{label}{LINE_MARK}{text}\n", end="")
    assert shown == ["[ 1/12] starts", "[ 2/12] 1/2", "[ 1/12] late"]
    assert list(lines.other) == ["10:00:00.000 - INFO - Executing task 'train-vae'"]
    assert isinstance(lines, io.TextIOBase)
