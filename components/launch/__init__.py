"""Starts a step's processes where the site says, and follows them.

Everything passes through files and the command line of `python -m model_core`, so that what runs in a pod, under a
launcher or on a laptop is the same program. Standard library only: a step's pod must not pay for imports it does not use.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from components.launch.local import INFRASTRUCTURE, RUN_FOLDER, Outcome, run_process
from components.launch.rewards import ServiceEnded, reward_service

CONFIGURATION, FAILED = 10, 30  # exit codes of `python -m model_core`
MEANINGS = {
    CONFIGURATION: "refused its configuration; running it again changes nothing",
    INFRASTRUCTURE: "lost its machine, storage or network; running it again goes on from its newest checkpoint",
    FAILED: "failed",
}
FAILURE_FILE = "failure.json"

Scheduler = Callable[[list[str], str, Mapping[str, str]], Outcome]  # takes the command, the step's label, and variables to add
SCHEDULERS: dict[str, Scheduler] = {"local_cwd": run_process}


class StepError(RuntimeError):
    """A step's processes ended without a result; `code` is the exit code, the text says what that means."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class MetricSink(Protocol):
    """A Kubeflow Metrics artifact, or anything else that takes named numbers."""

    def log_metric(self, metric: str, value: float) -> None:
        """Keeps one number."""


def run_step(
    step: str,
    *,
    recipe: str,
    site: str,
    run: str,
    inputs: Mapping[str, str | None],
    output: str,
    stage: str | None = None,
    metrics: MetricSink | None = None,
    page: str | None = None,
) -> None:
    """Runs one step to its end: afterwards its manifest lies at `output`.

    `recipe` and `site` are documents as JSON text. `inputs` are paths of manifests by name; None stands for an optional
    one that is absent. The numbers among the result's statistics go to `metrics`, its report.html to the file `page`.
    Raises StepError when the step fails.
    """
    label = step if stage is None else f"{step}-{stage}"
    with tempfile.TemporaryDirectory(prefix=f"darkroom-{label}-") as folder:
        recipe_path, site_path = Path(folder, "recipe.yaml"), Path(folder, "site.yaml")
        recipe_path.write_text(recipe, encoding="utf-8")  # JSON is YAML
        site_path.write_text(site, encoding="utf-8")
        launch = profile(json.loads(site), step)
        num = launch.get("processes", 1)
        program = ["model_core"] if num == 1 else ["model_core.torchrun", str(num)]
        given = ["--recipe", str(recipe_path), "--site", str(site_path)]
        for name, path in inputs.items():
            given += [] if path is None else ["--input", f"{name}={path}"]
        argv = [sys.executable, "-m", *program, step, *given, "--run", run, *([] if stage is None else ["--stage", stage])]
        start = scheduler(json.loads(site), step)
        beside: AbstractContextManager[Mapping[str, str]] = nullcontext({})
        if launch.get("reward_service"):
            beside = reward_service(given, folder=Path(folder))
        try:
            with beside as environment:
                outcome = start([*argv, "--output", output], label, environment)
        except ServiceEnded as error:
            label, outcome = f"{label}: the reward service", error.outcome
    if outcome.code != 0:
        what = f"{label} {meaning(outcome)}"
        _tell_run(code=outcome.code, what=what, reason=outcome.tail[-1] if outcome.tail else "it said nothing")
        raise StepError("\n".join([f"{what}. Its last lines:", *outcome.tail]), outcome.code)
    if metrics is not None:
        for name, value in json.loads(Path(output).read_bytes())["stats"].items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                metrics.log_metric(name, float(value))
    if page is not None:
        _copy_page(json.loads(site), output, page)


def profile(site: Mapping[str, Any], step: str) -> Mapping[str, Any]:
    """The launch profile of a step at the site."""
    launch = site.get("launch", {})
    found: Mapping[str, Any] = launch.get("steps", {}).get(step) or launch.get("default", {})
    return found


def scheduler(site: Mapping[str, Any], step: str) -> Scheduler:
    """What starts this step's processes, as its launch profile at the site says; raises StepError for an unknown one."""
    name = profile(site, step).get("scheduler", "local_cwd")
    if name not in SCHEDULERS:
        raise StepError(
            f"{step}: found scheduler {name!r} in the site's launch profile; allowed are {', '.join(SCHEDULERS)}", CONFIGURATION
        )
    return SCHEDULERS[name]


def meaning(outcome: Outcome) -> str:
    """How a step ended that left no result, and what that means for a second try."""
    if outcome.abandoned:
        return "was stopped because `darkroom run` is gone"
    if outcome.code < 0:
        return f"was killed by signal {-outcome.code}" + (" (the machine may have run out of memory)" if outcome.code == -9 else "")
    return f"{MEANINGS.get(outcome.code, 'failed')} (exit code {outcome.code})"


def _tell_run(**failure: Any) -> None:
    folder = os.environ.get(RUN_FOLDER)
    if folder and Path(folder).is_dir():
        Path(folder, FAILURE_FILE).write_text(json.dumps(failure), encoding="utf-8")


def _copy_page(site: dict[str, Any], output: str, page: str) -> None:
    from model_core.manifest import parse_manifest
    from model_core.site import parse_site
    from model_core.workspace import InputFolder

    result = InputFolder(parse_manifest(Path(output).read_bytes(), output), site=parse_site(site, "site"))
    Path(page).write_bytes(result.path("report.html").read_bytes())
