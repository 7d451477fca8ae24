"""Runs one step: `python -m model_core STEP --recipe R --site S --run NAME --input NAME=MANIFEST --output MANIFEST`.

Exit codes: 0 done, 10 configuration (do not retry), 20 infrastructure (retry), 30 the step itself failed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import NoReturn

from model_core.claim import FILE_NAME as CLAIM
from model_core.claim import ClaimLostError, acquire
from model_core.context import StepContext
from model_core.manifest import Code, Manifest, TrackedRun, parse_manifest
from model_core.progress import Progress
from model_core.publication import CHECKPOINTS
from model_core.recipe import Recipe, UserError, load_recipe, section
from model_core.run_record import StepRecord, check_run_name, write_step
from model_core.site import Site, load_site
from model_core.steps.registry import STEPS, StepSpec, step_spec
from model_core.storage import StorageError, open_storage
from model_core.tracking.spool import Tracker, open_tracker
from model_core.training.checkpoint import CheckpointStore
from model_core.training.distributed import Ranks, die_with_launcher, join_ranks
from model_core.training.stopping import Stopped
from model_core.workspace import Address, InputFolder, StepResult, Workspace, check_inputs, step_key

DONE, CONFIGURATION, INFRASTRUCTURE, FAILED = 0, 10, 20, 30


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, runs the step and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m model_core", description="Runs one step of the pipeline.")
    parser.add_argument("step", choices=list(STEPS), metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--recipe", type=Path, required=True, help="recipe YAML: what to train")
    parser.add_argument("--site", type=Path, required=True, help="site YAML: where to run")
    parser.add_argument("--run", required=True, help="name of the run that this step belongs to")
    parser.add_argument("--stage", help="stage of the curriculum, for steps that have one")
    parser.add_argument("--input", action="append", default=[], metavar="NAME=MANIFEST", help="manifest of an input; may be repeated")
    parser.add_argument("--output", type=Path, required=True, help="where to put the manifest of the result")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _stop)
    die_with_launcher()
    try:
        site = load_site(options.site)
        recipe = load_recipe(options.recipe)
        inputs = dict(_input(text, site) for text in options.input)
        spec, run = step_spec(options.step), check_run_name(options.run)
        check_inputs(spec, stage=options.stage, recipe=recipe, inputs=inputs)
        _check_processes(spec)
        _set_threads(site.launch.profile(spec.name).threads)
        with join_ranks() as ranks:
            if ranks.is_first:
                run_step(spec, recipe, site, run=run, stage=options.stage, inputs=inputs, output=options.output, ranks=ranks)
            else:
                follow_step(spec, recipe, site, run=run, stage=options.stage, inputs=inputs, ranks=ranks)
    except UserError as error:
        print(f"{options.step}: {error}", file=sys.stderr, flush=True)
        return CONFIGURATION
    except (StorageError, Stopped) as error:
        print(f"{options.step}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return INFRASTRUCTURE
    except Exception:  # noqa: BLE001 - whatever a step raises is told and becomes an exit code
        traceback.print_exc()
        return FAILED
    return DONE


def run_step(
    spec: StepSpec, recipe: Recipe, site: Site, *, run: str, stage: str | None, inputs: dict[str, Manifest], output: Path, ranks: Ranks
) -> Manifest:
    """Does one step, or finds it done, and copies its manifest to `output`. Keeps the run's record up to date.

    Of several ranks the first calls this: it claims, reports and commits. The others call `follow_step`.
    """
    began, started_at = time.monotonic(), datetime.now(UTC).isoformat()
    workspace = Workspace(site)
    sources = None
    if spec.sources:
        from model_core.data.sources import source_fingerprint

        sources = source_fingerprint(recipe, site)
    address = Address(spec.name, stage, step_key(spec, recipe, stage=stage, inputs=inputs, sources=sources))
    uri = f"{workspace.uri}/{address.prefix}"
    label = spec.name if stage is None else f"{spec.name}-{stage}"
    progress = Progress(label)

    def record(status: str, *, reused: bool = False, error: str | None = None) -> None:
        seconds = round(time.monotonic() - began, 3)
        entry = StepRecord(spec.name, stage, address.key, status, seconds, reused, uri, started_at, error)  # type: ignore[arg-type]
        write_step(workspace.storage, run, entry)

    tracker = open_tracker(site.spool_folder, run=run, step=spec.name, stage=stage, key=address.key, experiment=site.tracking.experiment)
    record("running")
    try:
        manifest = workspace.find(address)
        reused = manifest is not None
        if manifest is None:
            claim = acquire(
                workspace.storage,
                f"{address.prefix}/{CLAIM}",
                finished=lambda: workspace.find(address) is not None,
                on_lost=lambda: _lost_claim(label),
                say=progress.say,
            )
            if claim is not None:
                with claim, workspace.attempt(address, claim.attempt) as output_folder:
                    ranks.from_first(True)
                    context = _context(
                        workspace,
                        address,
                        recipe=recipe,
                        run=run,
                        inputs=inputs,
                        output=output_folder,
                        tracker=tracker,
                        progress=progress,
                        ranks=ranks,
                    )
                    stats = importlib.import_module(f"model_core.steps.{spec.name}").run(context)
                    result = StepResult(stats=stats, code=code_version(), mlflow=TrackedRun(run_id=tracker.run_id()))
                    manifest = workspace.commit(
                        address, output_folder, spec=spec, recipe=recipe, inputs=inputs, result=result, confirm=claim.confirm
                    )
                    context.checkpoints.clear()
                    shutil.rmtree(context.scratch)
            else:
                ranks.from_first(False)
            manifest = manifest or workspace.find(address)
        else:
            ranks.from_first(False)
        assert manifest is not None, "acquire returns None only when the manifest exists"
        tracker.params({path: section(recipe, path) for path in (part.format(stage=stage) for part in spec.sections)})
        _report(tracker, manifest, inputs=inputs, reused=reused)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(manifest.to_bytes())
    except ClaimLostError:
        _lost_claim(label)  # without a word in the run's record, where the new owner writes
    except BaseException as error:
        record("failed", error=f"{type(error).__name__}: {error}" if not isinstance(error, UserError) else str(error))
        tracker.end("KILLED" if isinstance(error, Stopped) else "FAILED")
        raise
    record("done", reused=reused)
    tracker.end("FINISHED")
    progress.say(f"{'reused' if reused else 'done'} in {time.monotonic() - began:.1f} s: {uri}")
    return manifest


def follow_step(
    spec: StepSpec, recipe: Recipe, site: Site, *, run: str, stage: str | None, inputs: dict[str, Manifest], ranks: Ranks
) -> None:
    """What a rank other than the first does: the step's work, if the first says that there is some, and no reports."""
    has_work: bool = ranks.from_first(None)
    if not has_work:
        return
    workspace = Workspace(site)
    address = Address(spec.name, stage, step_key(spec, recipe, stage=stage, inputs=inputs))
    tracker = open_tracker(site.spool_folder, run=run, step=spec.name, stage=stage, key=address.key, experiment=site.tracking.experiment)
    context = _context(
        workspace,
        address,
        recipe=recipe,
        run=run,
        inputs=inputs,
        output=site.scratch_folder / "steps" / address.prefix / f"rank-{ranks.rank}",
        tracker=tracker,
        progress=Progress(f"rank {ranks.rank}"),
        ranks=ranks,
    )
    importlib.import_module(f"model_core.steps.{spec.name}").run(context)
    context.checkpoints.clear()


def _context(
    workspace: Workspace,
    address: Address,
    *,
    recipe: Recipe,
    run: str,
    inputs: dict[str, Manifest],
    output: Path,
    tracker: Tracker,
    progress: Progress,
    ranks: Ranks,
) -> StepContext:
    """What this process is given to work with."""
    site = workspace.site
    scratch = _folder(site.scratch_folder / "steps" / address.prefix)
    return StepContext(
        recipe=recipe,
        site=site,
        stage=address.stage,
        run=run,
        key=address.key,
        inputs={name: InputFolder(parent, site=site) for name, parent in inputs.items()},
        output=output,
        scratch=scratch,
        checkpoints=CheckpointStore(
            workspace.storage,
            f"{address.prefix}/{CHECKPOINTS}",
            say=progress.say,
            scratch=scratch,
            ranks=ranks,
            keep_every_steps=recipe.mmdit.keep_every_steps if address.step == "train_mmdit" else None,
        ),
        tracker=tracker,
        progress=progress,
        ranks=ranks,
        loader_workers=site.launch.profile(address.step).loader_workers,
    )


def code_version() -> Code:
    """The code that runs: package version, git commit of the checkout, image digest as the site's platform tells it."""
    sha = os.environ.get("DARKROOM_GIT_SHA") or _git_sha()
    return Code(version=version("darkroom"), git_sha=sha, image_digest=os.environ.get("DARKROOM_IMAGE_DIGEST"))


def _git_sha() -> str | None:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None  # no git on this machine
    return found.stdout.strip() if found.returncode == 0 else None


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


def _input(text: str, site: Site) -> tuple[str, Manifest]:
    """NAME=PATH or NAME=URI of a manifest."""
    name, equals, place = text.partition("=")
    if not equals or not name or not place:
        raise UserError(f"--input {text!r}: found no NAME=MANIFEST; an example is --input captions=/tmp/captions.json")
    if "://" in place:
        folder, _, file = place.rpartition("/")
        return name, parse_manifest(open_storage(folder, site.s3).get(file), place)
    try:
        return name, parse_manifest(Path(place).read_bytes(), place)
    except OSError as error:
        raise UserError(f"--input {name}: {place} cannot be read ({error.strerror})") from error


def _check_processes(spec: StepSpec) -> None:
    num = int(os.environ.get("WORLD_SIZE", "1"))
    if num > 1 and not spec.parallel:
        parallel = ", ".join(name for name, other in STEPS.items() if other.parallel)
        raise UserError(f"launch profile of {spec.name}: found {num} processes; allowed is 1, only {parallel} take more")


def _set_threads(threads: int | None) -> None:
    """Before torch is imported: as many threads as the launch profile says, else the environment, else as there are cores."""
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    else:
        os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))


def _lost_claim(label: str) -> NoReturn:
    print(f"{label}: another process has taken this step over; stopping before two write one result", file=sys.stderr, flush=True)
    os._exit(INFRASTRUCTURE)


def _stop(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise Stopped("told to stop by SIGTERM; the same command goes on from the newest checkpoint")


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


if __name__ == "__main__":
    sys.exit(main())
