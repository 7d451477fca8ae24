"""publish_report: what a run has made, in one folder that needs nothing else.

Takes the last stage's weights, the VAE, the evaluation and the registration; leaves `body.json`, the pictures it shows and
`report.html`, a page of them. When a run ends, `model_core.evaluation.report.write_report` puts the body together with the
run's steps.
"""

from __future__ import annotations

import json
import shutil
from typing import Any

from model_core.context import StepContext
from model_core.evaluation.report import BODY, PAGE, SECTIONS, pictures_of, render_page

KEPT_PARTS = ("content_digest", "key", "stage", "step")  # of each part of the registered model


def run(context: StepContext) -> dict[str, Any]:
    """Collects the body of the report; returns how many pictures it shows."""
    inputs, evaluation = context.inputs, context.inputs["evaluation"]
    registered = inputs["registration"].read_json("model.json")
    history = inputs["model"].read_json("history.json")
    losses = history[-1]["validation"] if history else {}
    body = {
        "scores": evaluation.read_json("scores.json") | {f"val_loss/{kind}": round(value, 5) for kind, value in losses.items()},
        "prompts": [entry for entry in evaluation.read_json("prompts.json") if entry["shown"]],
        "edits": [entry for entry in evaluation.read_json("edits.json") if entry["shown"]],
        "reconstructions": [entry for entry in evaluation.read_json("reconstructions.json") if entry["shown"]],
        "warnings": evaluation.read_json("warnings.json"),
        "curves": [{"title": "VAE", "points": inputs["vae"].read_json("curves.json")}]
        + [{"title": f"Transformer, {entry['stage']}", "points": entry["curves"]} for entry in history],
        "model": {
            "name": registered["name"],
            "alias": registered["alias"],
            "sampling": registered["sampling"],
            "parts": {name: {key: part[key] for key in KEPT_PARTS} for name, part in registered["parts"].items()},
        },
    }
    drawn_by = [inputs[name] for name in ("model", "student", "enhancer") if name in inputs]
    for section, file_name in SECTIONS.items():
        for folder in drawn_by:
            if file_name in folder.names():
                body[section] = folder.read_json(file_name)
    if "student" in inputs:
        body["scores"] |= {f"student/{name}": value for name, value in body["distillation"]["comparison"]["judge"]["student"].items()}
    pictures = pictures_of(body)
    for name in pictures:
        target = context.output / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(next(folder for folder in [*drawn_by, evaluation] if name in folder.names()).path(name), target)
    (context.output / BODY).write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page = render_page(body, read=lambda name: (context.output / name).read_bytes())
    (context.output / PAGE).write_text(page, encoding="utf-8")
    return {"pictures": len(pictures), "scores": len(body["scores"])}
