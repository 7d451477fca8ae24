"""One step of one run: found done, or claimed, done, committed and told of; by one process or by several ranks together."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from model_core.claim import FILE_NAME as CLAIM
from model_core.claim import ClaimLostError, acquire
from model_core.code_version import code_version
from model_core.context import StepContext
from model_core.documents import UserError
from model_core.manifest import Manifest, TrackedRun
from model_core.outside import outside_fingerprint
from model_core.progress import Progress
from model_core.publication import CHECKPOINTS
from model_core.recipe import Recipe, section
from model_core.run_record import StepRecord, write_step
from model_core.site import Site
from model_core.steps.registry import StepSpec
from model_core.tracking.spool import Tracker, open_tracker
from model_core.training.checkpoint import CheckpointStore
from model_core.training.distributed import Ranks
from model_core.training.stopping import Stopped
from model_core.workspace import Address, InputFolder, StepResult, Workspace, step_key

LOST_CLAIM = 20  # exit code: infrastructure, run it again


@dataclass(frozen=True, kw_only=True)
class Task:
    """A step of a run: what it reads, and where its result lies."""

    spec: StepSpec
    recipe: Recipe
    run: str
    inputs: dict[str, Manifest]
    workspace: Workspace
    address: Address

    @property
    def uri(self) -> str:
        """Where the result lies."""
        return f"{self.workspace.uri}/{self.address.prefix}"

    @property
    def label(self) -> str:
        """Step and stage in one word, as in `train_mmdit-S1`."""
        return self.spec.name if self.address.stage is None else f"{self.spec.name}-{self.address.stage}"

    @property
    def sections(self) -> list[str]:
        """Dotted paths of the recipe that the step reads."""
        return [path.format(stage=self.address.stage) for path in self.spec.sections]


def make_task(spec: StepSpec, recipe: Recipe, site: Site, *, run: str, stage: str | None, inputs: dict[str, Manifest]) -> Task:
    """The task with its key worked out; a step that reads sources or votes looks at what they hold now."""
    sources = outside_fingerprint(spec, recipe, site)
    address = Address(spec.name, stage, step_key(spec, recipe, stage=stage, inputs=inputs, sources=sources))
    return Task(spec=spec, recipe=recipe, run=run, inputs=inputs, workspace=Workspace(site), address=address)


def do_task(task: Task, *, output: Path, ranks: Ranks) -> Manifest:
    """Does the step, or finds it done, and copies its manifest to `output`. Keeps the run's record up to date.

    Of several ranks the first calls this: it claims, reports and commits. The others call `follow_task`.
    """
    began, started_at = time.monotonic(), datetime.now(UTC).isoformat()
    progress, tracker = Progress(task.label), _tracker(task)

    def record(status: str, *, reused: bool = False, error: str | None = None) -> None:
        seconds = round(time.monotonic() - began, 3)
        address = task.address
        entry = StepRecord(address.step, address.stage, address.key, status, seconds, reused, task.uri, started_at, error)  # type: ignore[arg-type]
        write_step(task.workspace.storage, task.run, entry)

    record("running")
    try:
        manifest = task.workspace.find(task.address)
        reused = manifest is not None
        if manifest is None:
            manifest = _claim_and_work(task, tracker=tracker, progress=progress, ranks=ranks)
        else:
            ranks.from_first(False)
        tracker.params({path: section(task.recipe, path) for path in task.sections})
        _report(tracker, manifest, inputs=task.inputs, reused=reused)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(manifest.to_bytes())
    except ClaimLostError:
        _stop_without_claim(task.label)  # without a word in the run's record, where the new owner writes
    except BaseException as error:
        record("failed", error=f"{type(error).__name__}: {error}" if not isinstance(error, UserError) else str(error))
        tracker.end("KILLED" if isinstance(error, Stopped) else "FAILED")
        raise
    record("done", reused=reused)
    tracker.end("FINISHED")
    progress.say(f"{'reused' if reused else 'done'} in {time.monotonic() - began:.1f} s: {task.uri}")
    return manifest


def follow_task(task: Task, *, ranks: Ranks) -> None:
    """What a rank other than the first does: the step's work, if the first says that there is some, and no reports."""
    has_work: bool = ranks.from_first(None)
    if not has_work:
        return
    output = task.workspace.site.scratch_folder / "steps" / task.address.prefix / f"rank-{ranks.rank}"
    context = _context(task, output=output, tracker=_tracker(task), progress=Progress(f"rank {ranks.rank}"), ranks=ranks)
    _work(context, task)
    context.checkpoints.clear()


def _claim_and_work(task: Task, *, tracker: Tracker, progress: Progress, ranks: Ranks) -> Manifest:
    """The manifest of the step, done here or, while this process waited for its claim, elsewhere."""
    workspace, address = task.workspace, task.address
    claim = acquire(
        workspace.storage,
        f"{address.prefix}/{CLAIM}",
        finished=lambda: workspace.find(address) is not None,
        on_lost=lambda: _stop_without_claim(task.label),
        say=progress.say,
    )
    ranks.from_first(claim is not None)
    if claim is None:
        found = workspace.find(address)
        assert found is not None, "acquire returns None only when the manifest exists"
        return found
    with claim, workspace.attempt(address, claim.attempt) as folder:
        context = _context(task, output=folder, tracker=tracker, progress=progress, ranks=ranks)
        result = StepResult(stats=_work(context, task), code=code_version(), mlflow=TrackedRun(run_id=tracker.run_id()))
        manifest = workspace.commit(
            address, folder, spec=task.spec, recipe=task.recipe, inputs=task.inputs, result=result, confirm=claim.confirm
        )
        context.checkpoints.clear()
        shutil.rmtree(context.scratch)
    return manifest


def _work(context: StepContext, task: Task) -> dict[str, Any]:
    """The step's own module at work; returns its statistics."""
    stats: dict[str, Any] = importlib.import_module(f"model_core.steps.{task.spec.name}").run(context)
    return stats


def _context(task: Task, *, output: Path, tracker: Tracker, progress: Progress, ranks: Ranks) -> StepContext:
    """What this process is given to work with."""
    workspace, address, site = task.workspace, task.address, task.workspace.site
    scratch = site.scratch_folder / "steps" / address.prefix
    scratch.mkdir(parents=True, exist_ok=True)
    return StepContext(
        recipe=task.recipe,
        site=site,
        stage=address.stage,
        run=task.run,
        key=address.key,
        inputs={name: InputFolder(parent, site=site) for name, parent in task.inputs.items()},
        output=output,
        scratch=scratch,
        checkpoints=CheckpointStore(
            workspace.storage,
            f"{address.prefix}/{CHECKPOINTS}",
            say=progress.say,
            scratch=scratch,
            ranks=ranks,
            keep_every_steps=task.recipe.mmdit.keep_every_steps if address.step == "train_mmdit" else None,
        ),
        tracker=tracker,
        progress=progress,
        ranks=ranks,
        loader_workers=site.launch.profile(address.step).loader_workers,
    )


def _tracker(task: Task) -> Tracker:
    site, address = task.workspace.site, task.address
    return open_tracker(
        site.spool_folder, run=task.run, step=address.step, stage=address.stage, key=address.key, experiment=site.tracking.experiment
    )


def _report(tracker: Tracker, manifest: Manifest, *, inputs: dict[str, Manifest], reused: bool) -> None:
    """Tells tracking what the step took and left: edges of the lineage graph, and its numbers."""
    tracker.tags(
        {
            "stage_key": manifest.key,
            "reused": str(reused).lower(),
            "recipe.sha256": manifest.recipe_digest,
            "git.sha": manifest.code.git_sha or "",
        }
    )
    for name, parent in inputs.items():
        tracker.tags({f"input/{name}": f"{parent.uri}#{parent.digest}"})
        if parent.kind == "model":
            tracker.model_input(parent.label, uri=parent.uri, digest=parent.digest)
        else:
            tracker.dataset(parent.label, digest=parent.digest, uri=parent.uri, context="input", rows=parent.stats.get("rows"))
    if manifest.kind == "model":
        tracker.model_output(manifest.label, uri=manifest.uri, digest=manifest.digest, params={})
    else:
        tracker.dataset(manifest.label, digest=manifest.digest, uri=manifest.uri, context="output", rows=manifest.stats.get("rows"))
    numbers = {f"final/{name}": float(value) for name, value in manifest.stats.items() if isinstance(value, int | float)}
    tracker.metrics(numbers, step=0)


def _stop_without_claim(label: str) -> NoReturn:
    print(f"{label}: another process has taken this step over; stopping before two write one result", file=sys.stderr, flush=True)
    os._exit(LOST_CLAIM)
