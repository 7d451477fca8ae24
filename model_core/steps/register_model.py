"""register_model: names a trained model, its parts and its scores, and asks for a version in the model registry.

Takes the last stage's weights, the VAE, the condition encoder and the evaluation, and where they were made the few-step student
and the Prompt Enhancer; leaves `model.json`, which names the parts by step, key and content. No weights are copied. The
registry's version and alias are made by whoever drains the spool, once the step has finished, so a registry that is away does not
stop the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from model_core.context import StepContext
from model_core.documents import UserError
from model_core.workspace import InputFolder

PARTS = {"mmdit": "model", "vae": "vae", "encoder": "encoder"}  # name in model.json -> input
OPTIONAL_PARTS = ("student", "enhancer")  # both their names in model.json and the inputs
SCORES_FILE = "scores.json"  # of evaluate_model: {name: number}
DISTILLATION_FILE = "distillation.json"  # of distill_dmd


def run(context: StepContext) -> dict[str, Any]:
    """Writes `model.json`; returns the registered name, its alias and the scores."""
    registry = context.recipe.registry
    scores = read_scores(context.inputs["evaluation"])
    present = [part for part in OPTIONAL_PARTS if part in context.inputs]
    if "student" in present:
        scores |= {f"student/{name}": value for name, value in read_student_scores(context.inputs["student"]).items()}
    named = PARTS | {part: part for part in present}
    parts = {part: reference(context.inputs[name]) for part, name in named.items()}
    document = {
        "schema": 1,
        "name": registry.name,
        "alias": registry.alias,
        "parts": parts,
        "resolution_px": context.recipe.mmdit.stages[context.recipe.stages[-1]].resolution_px,
        "sampling": context.recipe.sampling.model_dump(mode="json"),
        "scores": scores,
    }
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    (context.output / "model.json").write_text(text, encoding="utf-8")
    tags = {f"part/{part}": f"{entry['step']}/{entry['key']}" for part, entry in parts.items()}
    tags |= {f"score/{name}": f"{value:.6g}" for name, value in scores.items()}
    context.tracker.register_model(registry.name, alias=registry.alias, tags=tags)
    context.progress.update(1, 1, f"{registry.name}@{registry.alias}")
    return {"name": registry.name, "alias": registry.alias, **scores}


def reference(part: InputFolder) -> dict[str, str | None]:
    """What finds a part again in any workspace and proves that it is the same: no uri, so that it is the same on a disk and on S3."""
    manifest = part.manifest
    return {"step": manifest.step, "stage": manifest.stage, "key": manifest.key, "content_digest": manifest.content_digest}


def read_scores(evaluation: InputFolder) -> dict[str, float]:
    """The evaluation's scores; raises UserError when one is not a finite number."""
    return _finite(evaluation.read_json(SCORES_FILE), f"{evaluation.manifest.uri}/{SCORES_FILE}")


def read_student_scores(student: InputFolder) -> dict[str, float]:
    """What the judge gave the student's pictures, where distill_dmd has asked it; raises UserError when one is not a finite number."""
    if DISTILLATION_FILE not in student.names():
        return {}
    judged = student.read_json(DISTILLATION_FILE).get("comparison", {}).get("judge", {}).get("student", {})
    return _finite(judged, f"{student.manifest.uri}/{DISTILLATION_FILE}")


def _finite(scores: Mapping[str, Any], where: str) -> dict[str, float]:
    for name, value in scores.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"register_model: {where}: {name} is {value!r}; allowed are finite numbers")
    return {name: float(value) for name, value in scores.items()}
