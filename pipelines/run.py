"""`darkroom run`: the training DAG on this machine, by kfp.local, with tracking at its side."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from kfp import local

from components.launch import CONFIGURATION, FAILURE_FILE
from components.launch.local import ALIVE_FILE, RUN_FOLDER, RUN_FOLDER_PREFIX
from model_core.documents import UserError
from model_core.evaluation.report import write_report
from model_core.recipe import Recipe
from model_core.run_record import RunRecord, check_run_name, write_run
from model_core.site import Site
from model_core.storage import StorageError
from model_core.workspace import Workspace
from pipelines.errors import RunError, Stopped
from pipelines.output import StepLines
from pipelines.training import Sections, training_pipeline


def run_name(recipe: Recipe, now: datetime) -> str:
    """The name of a run that was given none: recipe and time, UTC."""
    return f"{recipe.name}-{now.astimezone(UTC):%Y%m%d-%H%M%S}"


def run_training(recipe: Recipe, site: Site, *, name: str | None = None, say: Callable[[str], None]) -> str:
    """Runs every step that is not done yet, and returns the run's name; `say` is given each line of a step.

    Raises UserError for a mistake in the recipe, the site or a source, before any work where that can be known, and
    RunError when a step fails. What has been done stays: the same call goes on from there.
    """
    started = datetime.now(UTC)
    run = check_run_name(name or run_name(recipe, started))
    check_inputs(recipe, site)
    check_workspace(site)
    workspace = Workspace(site)
    pipeline = training_pipeline(recipe.stages, Sections.of(recipe), image="python")
    num_steps = len(pipeline.pipeline_spec.root.dag.tasks)
    lines = StepLines(num_steps, say)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=RUN_FOLDER_PREFIX)))
        stack.enter_context(_alive(folder))
        write_run(workspace.storage, RunRecord(run, recipe.model_dump(mode="json"), recipe.digest(), started.isoformat()))
        stack.enter_context(_tracking(site))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # kfp.local warns of each setting that only a cluster has
        local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(folder / "kfp"))
        arguments = {"recipe": recipe.model_dump_json(), "site": site.model_dump_json(), "run": run}
        try:
            with redirect_stdout(lines):
                pipeline(**arguments)
        except Stopped:
            _report_failure(run, workspace, say)
            raise
        except RuntimeError as error:
            _report_failure(run, workspace, say)
            raise _failure(folder, lines, error) from None
        write_report(run, workspace)
    return run


def check_inputs(recipe: Recipe, site: Site) -> None:
    """Raises UserError when a source cannot be read or a folder or package that the recipe needs is missing; writes nothing."""
    from model_core.data.edits import check_edits
    from model_core.data.filters import check_filters
    from model_core.data.sources import check_sources
    from model_core.data.typefaces import check_typefaces
    from model_core.data.votes import load_votes
    from model_core.models.earlier_mmdit import check_earlier
    from model_core.rewards.opening import check_rewards

    folders = {
        "encoder.path": recipe.encoder.path,
        "vae.path": recipe.vae.path,
        "vae.teacher_path": recipe.vae.teacher_path,
        "mmdit.path": recipe.mmdit.path,
        "reward.trunk.path": recipe.reward.trunk.path,
        "enhancer.path": recipe.enhancer.path if recipe.enhancer else None,
    }
    for field, path in folders.items():
        if path is not None and not Path(path).expanduser().is_dir():
            raise UserError(f"recipe {recipe.name}: {field}: found {path!r}; allowed is a folder with weights")
    if recipe.mmdit.path is not None:
        check_earlier(recipe.mmdit.path, recipe.mmdit.model)
    lpips = recipe.vae.lpips_path
    if lpips is not None and not Path(lpips).expanduser().is_file():
        raise UserError(f"recipe {recipe.name}: vae.lpips_path: found {lpips!r}; allowed is a safetensors file")
    check_sources(recipe, site)
    check_edits(recipe)
    check_filters(recipe)
    check_typefaces(recipe.text_images)
    load_votes(recipe, site)
    check_rewards(recipe, site)


def check_workspace(site: Site) -> None:
    """Raises UserError when the workspace cannot be written to."""
    probe = f".probe-{os.getpid()}"
    try:
        storage = Workspace(site).storage
        storage.put(probe, b"")
        storage.delete(probe)
    except (OSError, StorageError, UserError) as error:
        raise UserError(f"site: workspace: {site.workspace} cannot be written to ({str(error).splitlines()[0]})") from error


@contextmanager
def _alive(folder: Path) -> Iterator[None]:
    """Holds the lock by which steps know that this process lives; the kernel drops it even after kill -9.

    SIGTERM and Ctrl-C drop it too, so that the step at work stops, and then leave by way of every context.
    """
    with (folder / ALIVE_FILE).open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)

        def stop(_signal: int, _frame: FrameType | None) -> NoReturn:
            fcntl.flock(stream, fcntl.LOCK_UN)
            raise Stopped

        previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        os.environ[RUN_FOLDER] = str(folder)
        try:
            yield
        finally:
            del os.environ[RUN_FOLDER]
            for number, handler in previous.items():
                signal.signal(number, handler)


@contextmanager
def _tracking(site: Site) -> Iterator[None]:
    """Tells MLflow what the steps spool for as long as the run lasts, and at its end waits for the rest to be told."""
    site.spool_folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "model_core.tracking.drain", "--spool", str(site.spool_folder), "--uri", site.tracking_uri]
    process = subprocess.Popen([*command, "--follow", str(os.getpid())], stdin=subprocess.DEVNULL, start_new_session=True)
    is_patient = True
    try:
        yield
    except Stopped:
        is_patient = False  # it ends by itself, some seconds later
        raise
    finally:
        process.terminate()  # to it, this means: send what is left, then end
        if is_patient:
            process.wait()


def _report_failure(run: str, workspace: Workspace, say: Callable[[str], None]) -> None:
    """Writes the report of a run that has failed; what hinders that is said, and never takes the place of why the run failed."""
    try:
        write_report(run, workspace)
    except (OSError, StorageError, UserError) as error:
        say(f"no report: {error}")


def _failure(folder: Path, lines: StepLines, error: RuntimeError) -> Exception:
    """What a user is told when the DAG failed: the step's own words, else the last lines of Kubeflow's executor."""
    try:
        told: dict[str, Any] = json.loads((folder / FAILURE_FILE).read_bytes())
    except FileNotFoundError:
        return RunError("\n".join([*lines.other, str(error)]))
    if told["code"] == CONFIGURATION:
        return UserError(told["reason"])
    return RunError(f"{told['what']}: {told['reason']} (what is done stays: the same command goes on from there)")
