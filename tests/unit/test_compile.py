"""The DAG: its wiring, its shape, and its compiled form."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from kfp import components

from model_core.recipe import DIMENSIONS
from model_core.steps.registry import STEPS
from pipelines.compile import compile_training
from pipelines.plan import training_tasks
from pipelines.training import Sections

EVERY, NONE = Sections(True, True, True, True), Sections(False, False, False, False)
GOLDEN = Path(__file__).parents[1] / "golden" / "training-S1-S2.yaml"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    compile_training(["S1", "S2"], EVERY, image="registry.example/darkroom@sha256:" + 64 * "0", output=path)
    return path


def test_compiled_dag_is_the_golden_file(compiled: Path) -> None:
    """`make golden` writes the file anew: review the diff, since each change makes a new pipeline version."""
    if os.environ.get("DARKROOM_REFRESH_GOLDEN"):
        GOLDEN.write_bytes(compiled.read_bytes())
    assert compiled.read_text() == GOLDEN.read_text()


def test_compiling_again_gives_the_same_bytes(compiled: Path, tmp_path: Path) -> None:
    compile_training(["S1", "S2"], EVERY, image="registry.example/darkroom@sha256:" + 64 * "0", output=tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_bytes() == compiled.read_bytes()


def test_kubeflow_loads_the_compiled_dag(compiled: Path) -> None:
    loaded = components.load_component_from_file(str(compiled))
    assert set(loaded.component_spec.inputs) == {"recipe", "site", "run"}


def test_recipe_and_site_travel_as_text_so_that_nothing_reorders_the_curriculum(compiled: Path) -> None:
    """A protobuf Struct, which carries Kubeflow's mappings, iterates in another order in every process."""
    parameters = yaml.safe_load(compiled.read_text())["root"]["inputDefinitions"]["parameters"]
    assert {name: parameters[name]["parameterType"] for name in parameters} == {"recipe": "STRING", "site": "STRING", "run": "STRING"}


def test_six_stages_stay_within_the_size_budget(tmp_path: Path) -> None:
    compile_training([f"S{number}" for number in range(1, 7)], EVERY, image="image", output=tmp_path / "six.yaml")
    assert (tmp_path / "six.yaml").stat().st_size < 200_000


def test_every_task_has_the_image_and_is_never_cached_by_kubeflow(compiled: Path) -> None:
    document = yaml.safe_load(compiled.read_text())
    images = {executor["container"]["image"] for executor in document["deploymentSpec"]["executors"].values()}
    assert images == {"registry.example/darkroom@sha256:" + 64 * "0"}
    assert all("enableCache" not in task["cachingOptions"] for task in document["root"]["dag"]["tasks"].values())


def test_every_step_gets_exactly_the_inputs_that_its_spec_names() -> None:
    for task in training_tasks(["S1", "S2"], EVERY):
        spec = STEPS[task.step]
        follows = task.step in ("filter_images", "train_mmdit") and task.stage == "S2"
        given = {
            "build_preferences": {"earlier"},
            "align_grpo": set(DIMENSIONS),
            "distill_dmd": {"base"},
            "align_enhancer": set(DIMENSIONS),
            "register_model": {"student", "enhancer"},
            "publish_report": {"student", "enhancer"},
        }.get(task.step, {"previous"} if follows else set())
        assert set(task.inputs) == set(spec.inputs) | given, task.label
        assert (task.stage is not None) == spec.staged


def test_inputs_come_from_the_steps_that_make_them() -> None:
    tasks = training_tasks(["S1", "S2", "S6"], EVERY)
    label = {task.name: task.label for task in tasks}
    made_by = {task.label: {name: label[parent] for name, parent in task.inputs.items()} for task in tasks}
    assert made_by["filter_images-S6"]["previous"] == "filter_images-S2"
    assert made_by["caption_images"]["kept"] == "filter_images-S1"
    assert made_by["train_vae"]["kept"] == "filter_images-S1"
    assert made_by["encode_latents-S2"] == {
        "kept": "filter_images-S2",
        "captions": "caption_images",
        "vae": "train_vae",
        "encoder": "prepare_encoder",
        "images": "ingest_images",
        "text_images": "render_text",
        "edits": "build_edits",
    }
    assert made_by["train_mmdit-S6"] == {"latents": "encode_latents-S6", "encoder": "prepare_encoder", "previous": "train_mmdit-S2"}
    assert made_by["build_preferences"]["model"] == "train_mmdit-S6"
    assert made_by["build_preferences"]["earlier"] == "train_mmdit-S2"
    assert made_by["align_grpo"]["portrait"] == "train_reward-portrait"
    assert made_by["evaluate_model"]["model"] == made_by["register_model"]["model"] == "align_grpo"
    assert made_by["distill_dmd"] | {"model": "align_grpo", "base": "train_mmdit-S6"} == made_by["distill_dmd"]
    assert made_by["align_enhancer"]["enhancer"] == "train_enhancer"
    assert made_by["align_enhancer"]["generator"] == made_by["register_model"]["student"] == "distill_dmd"
    assert made_by["align_enhancer"]["alignment"] == "train_reward-alignment"
    assert made_by["register_model"]["enhancer"] == made_by["publish_report"]["enhancer"] == "align_enhancer"
    assert made_by["register_model"]["evaluation"] == "evaluate_model"
    assert made_by["publish_report"]["registration"] == "register_model"


def test_tasks_are_listed_after_those_they_take_from() -> None:
    seen: set[str] = set()
    for task in training_tasks(["S1", "S2", "S3"], EVERY):
        assert set(task.inputs.values()) <= seen
        seen.add(task.name)


def test_without_alignment_the_last_stage_is_what_is_evaluated_and_registered() -> None:
    tasks = training_tasks(["S1", "S6"], NONE)
    label = {task.name: task.label for task in tasks}
    assert not {"build_preferences", "train_reward", "align_grpo"} & {task.step for task in tasks}
    assert {task.step: label[task.inputs["model"]] for task in tasks if "model" in task.inputs} == {
        "evaluate_model": "train_mmdit-S6",
        "register_model": "train_mmdit-S6",
        "publish_report": "train_mmdit-S6",
    }


def test_a_student_may_be_distilled_of_a_model_that_was_not_aligned() -> None:
    tasks = training_tasks(["S1", "S6"], Sections(grpo=False, dmd=True, enhancer=True, enhancer_grpo=False))
    label = {task.name: task.label for task in tasks}
    made_by = {task.label: {name: label[parent] for name, parent in task.inputs.items()} for task in tasks}
    assert made_by["distill_dmd"]["model"] == "train_mmdit-S6"
    assert "base" not in made_by["distill_dmd"]
    assert made_by["register_model"]["enhancer"] == "train_enhancer"
    assert "align_enhancer" not in made_by
