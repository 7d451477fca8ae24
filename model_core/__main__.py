"""Runs one step: `python -m model_core STEP --recipe R --site S --run NAME --input NAME=MANIFEST --output MANIFEST`.

Exit codes: 0 done, 10 configuration (do not retry), 20 infrastructure (retry), 30 the step itself failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from model_core.documents import UserError
from model_core.exit_codes import DONE, tell_error
from model_core.recipe import load_recipe
from model_core.run_record import check_run_name
from model_core.site import load_site
from model_core.steps.registry import STEPS, StepSpec, step_spec
from model_core.task import do_task, follow_task, make_task
from model_core.training.distributed import die_with_launcher, join_ranks
from model_core.training.stopping import Stopped
from model_core.workspace import check_inputs, read_input


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
        inputs = dict(read_input(text, site) for text in options.input)
        spec, run = step_spec(options.step), check_run_name(options.run)
        check_inputs(spec, stage=options.stage, recipe=recipe, inputs=inputs)
        _check_processes(spec)
        _set_threads(site.launch.profile(spec.name).threads)
        task = make_task(spec, recipe, site, run=run, stage=options.stage, inputs=inputs)
        with join_ranks() as ranks:
            if ranks.is_first:
                do_task(task, output=options.output, ranks=ranks)
            else:
                follow_task(task, ranks=ranks)
    except Exception as error:  # noqa: BLE001 - whatever a step raises is told and becomes an exit code
        return tell_error(error, who=options.step)
    return DONE


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


def _stop(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise Stopped("told to stop by SIGTERM; the same command goes on from the newest checkpoint")


if __name__ == "__main__":
    sys.exit(main())
