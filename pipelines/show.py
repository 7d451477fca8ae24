"""Runs, plans and checks as tables for people, and as plain values for scripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from model_core.documents import UserError
from model_core.evaluation.report import write_report
from model_core.run_record import StepRecord, read_run, read_steps, run_names
from model_core.site import Site
from model_core.workspace import Workspace
from pipelines.documents import DEFAULT_SITE

if TYPE_CHECKING:  # they bring kfp along, which a look at a finished run need not wait for
    from pipelines.doctor import Check
    from pipelines.plan import PlannedStep

STYLES = {"done": "green", "reused": "cyan", "reuse": "cyan", "failed": "red", "run": "yellow"}


def newest_run(site: Site) -> str:
    """The name of the run that began last; raises UserError when there is none."""
    storage = Workspace(site).storage
    runs = [read_run(storage, name) for name in run_names(storage)]
    if not runs:
        raise UserError(f"report: {storage.uri} holds no run yet; `darkroom run smoke` makes one in two minutes")
    return max(runs, key=lambda record: record.started_at).run


def card(run: str, site: Site, *, site_name: str, as_json: bool) -> RenderableType | dict[str, Any]:
    """A run's steps, its scores, its report (written anew) and what to do next; raises UserError for a run that is not there."""
    workspace = Workspace(site)
    uri = write_report(run, workspace)
    report = json.loads(workspace.storage.get(f"reports/{run}/report.json"))
    steps = read_steps(workspace.storage, run)
    if as_json:
        told = {"run": run, "recipe": report["recipe"], "report": uri}
        return {**told, "steps": [asdict(step) for step in steps], "metrics": report["metrics"], "warnings": report["warnings"]}
    parts: list[RenderableType] = [Text(f"\n{run}", style="bold"), step_table(steps)]
    option = "" if site_name == DEFAULT_SITE else f" --site {site_name}"
    prompt = "a red circle on the left with the text A7" if "judge/mean" in report["metrics"] else "words as in your captions"
    after = [
        f"report   {uri}",
        f'draw     darkroom sample {run}{option} "{prompt}" --seed 1',
        f"history  darkroom ui{option}",
    ]
    warnings = [Text(f"warning  {warning}", style="yellow") for warning in report["warnings"]]
    scores = [metric_table(report["metrics"])] if report["metrics"] else []
    return Group(*parts, *scores, *warnings, Text("\n".join(after if scores else after[:1])))


def step_table(steps: Sequence[StepRecord]) -> Table:
    """Steps in the order in which they began."""
    table = Table("step", "stage", "status", Column("seconds", justify="right"), "key")
    for step in steps:
        status = "reused" if step.reused else step.status
        table.add_row(step.step, step.stage or "", Text(status, style=STYLES.get(status, "")), f"{step.seconds:.1f}", step.key)
    own = sum(step.seconds for step in steps if not step.reused)
    table.caption = f"{own:.0f} s of work in {sum(not step.reused for step in steps)} steps, {sum(step.reused for step in steps)} reused"
    return table


def metric_table(metrics: dict[str, float]) -> Table:
    """Scores by name."""
    table = Table("score", Column("value", justify="right"))
    for name, value in sorted(metrics.items()):
        table.add_row(name, f"{value:.4g}")
    return table


def plan_table(plan: Sequence[PlannedStep]) -> Table:
    """What a run would do."""
    table = Table("step", "stage", "would", "key")
    for step in plan:
        table.add_row(
            step.task.step, step.task.stage or "", Text(step.status, style=STYLES.get(step.status, "")), step.key or "known later"
        )
    return table


def check_table(checks: Sequence[Check]) -> Table:
    """What was examined; how to mend it stands beside what is not well."""
    table = Table("", "check", "found")
    for check in checks:
        found = check.found if check.is_well else f"{check.found}\nto mend: {check.mend}"
        table.add_row(Text("ok", style="green") if check.is_well else Text("no", style="red"), check.name, Text(found))
    return table
