"""What a run will do, as far as it can be known before it starts: each step's key, and whether its result is there.

`darkroom run --dry-run` shows it. What a run costs, which `darkroom plan` tells, is pipelines.cost.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from model_core.manifest import Manifest
from model_core.outside import outside_fingerprint
from model_core.recipe import Recipe
from model_core.site import Site
from model_core.steps.registry import STEPS, step_spec
from model_core.workspace import Address, Workspace, step_key
from pipelines.training import Sections, training_pipeline


@dataclass(frozen=True)
class Task:
    """One node of the DAG: a step, its stage, and the tasks that its inputs come from, by input name."""

    name: str
    step: str
    stage: str | None
    inputs: dict[str, str]

    @property
    def label(self) -> str:
        """Step and stage in one word, as in run records."""
        return self.step if self.stage is None else f"{self.step}-{self.stage}"


@dataclass(frozen=True)
class PlannedStep:
    """What is known of a task: its key is None while an input of it has still to be made."""

    task: Task
    key: str | None
    status: Literal["reuse", "run", "after others"]

    def to_json(self) -> dict[str, str | None]:
        """The same for a script."""
        return {"step": self.task.step, "stage": self.task.stage, "key": self.key, "status": self.status}


def training_tasks(stages: Sequence[str], sections: Sections) -> list[Task]:
    """The nodes of the training DAG, each after those it takes from. Read from the compiled DAG, which is the only one."""
    spec = training_pipeline(stages, sections, image="python").pipeline_spec
    pending = {name: _task(name, node) for name, node in spec.root.dag.tasks.items()}
    ordered: dict[str, Task] = {}
    while pending:
        ready = [task for task in pending.values() if all(parent in ordered for parent in task.inputs.values())]
        for task in sorted(ready, key=lambda task: list(STEPS).index(task.step)):
            ordered[task.name] = pending.pop(task.name)
    return list(ordered.values())


def plan_run(recipe: Recipe, site: Site) -> list[PlannedStep]:
    """The steps of a run of `recipe` at `site`, in order, with what is known of each."""
    workspace = Workspace(site)
    found: dict[str, Manifest] = {}
    planned = []
    for task in training_tasks(recipe.stages, Sections.of(recipe)):
        spec = step_spec(task.step)
        if any(parent not in found for parent in task.inputs.values()):
            planned.append(PlannedStep(task, None, "after others"))
            continue
        inputs = {name: found[parent] for name, parent in task.inputs.items()}
        key = step_key(spec, recipe, stage=task.stage, inputs=inputs, sources=outside_fingerprint(spec, recipe, site))
        manifest = workspace.find(Address(task.step, task.stage, key))
        if manifest is not None:
            found[task.name] = manifest
        planned.append(PlannedStep(task, key, "run" if manifest is None else "reuse"))
    return planned


def _task(name: str, node: Any) -> Task:
    parameters = node.inputs.parameters
    stage = parameters["stage"].runtime_value.constant.string_value if "stage" in parameters else None
    inputs = {key: value.task_output_artifact.producer_task for key, value in node.inputs.artifacts.items()}
    component = node.component_ref.name.removeprefix("comp-").replace("-", "_")  # repeated ones end in _2, _3, ...
    step = next(step for step in STEPS if re.fullmatch(rf"{step}(_\d+)?", component))
    return Task(name, step, stage, inputs)
