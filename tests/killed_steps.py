"""Runs a step in processes of its own that kill themselves at a given call: a moment that no timer would hit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.alignment_parts import write_alignment_inputs

ROOT = Path(__file__).parents[1]
PROGRAM = """
import importlib, os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from model_core.training.distributed import join_ranks
from tests.alignment_parts import Scores, context_of
from tests.encoded_inputs import Input

step = importlib.import_module("model_core.steps." + {step!r})
if hasattr(step, "open_scorer"):  # the tests' own: nothing here is about rewards
    step.open_scorer = lambda *_args, **_kwargs: Scores()
module, owner, name, fatal = {fatal!r}
if fatal:
    target = importlib.import_module(module)
    target = getattr(target, owner) if owner else target
    real, calls = getattr(target, name), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(target, name, dying)
inputs = {{name: Input(Path({inputs!r}) / name) for name in ("vae", "captions", "images", "edits", "model")}}
inputs["encoder"] = Input(Path({inputs!r}) / "encoder-False")
with join_ranks() as ranks:
    context = context_of(Path({here!r}), inputs, ranks=ranks, **{settings!r})
    step.run(context)
    context.checkpoints.wait()
"""
Moment = tuple[str, str, str, int]  # module, class in it or "", function, and the call of it that is fatal
QUIET: Moment = ("", "", "", 0)
Result = tuple[dict[str, torch.Tensor], list[dict[str, Any]]]  # weights, and points of the record


@dataclass(frozen=True)
class KilledStep:
    """A step over the tiny inputs in `inputs`, with settings for `context_of`; `record` is the file that holds its points."""

    name: str
    record: str
    inputs: Path
    settings: dict[str, Any]

    def run(self, here: Path, *, ranks: int, fatal: Moment = QUIET) -> int:
        """Runs the step in `here`; its exit code."""
        here.mkdir(exist_ok=True)
        program = here / "program.py"
        program.write_text(
            PROGRAM.format(root=str(ROOT), step=self.name, fatal=fatal, inputs=str(self.inputs), here=str(here), settings=self.settings)
        )
        launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        done = subprocess.run(
            [sys.executable, *launcher, str(program)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0 or fatal != QUIET, done.stdout + done.stderr
        return done.returncode

    def kill_in_turn(self, here: Path, moments: Mapping[str, Moment], *, ranks: int) -> Result:
        """Kills a run in `here` at each of the moments, lets it end, and returns what it has left."""
        for moment, fatal in moments.items():
            ended = self.run(here, ranks=ranks, fatal=fatal)
            assert ended == -signal.SIGKILL if ranks == 1 else ended != 0, moment
        self.run(here, ranks=ranks)
        return self.result(here)

    def result(self, here: Path) -> Result:
        """The weights and the points that a finished run has left in `here`."""
        output = here / "output-0"
        return load_file(output / "mmdit/model.safetensors"), json.loads((output / self.record).read_text())["points"]


def undisturbed_run(root: Path, name: str, *, record: str, settings: dict[str, Any]) -> tuple[KilledStep, Result]:
    """Step `name` over inputs written below `root`, and what a run of it on one rank leaves that nothing has killed."""
    (root / "inputs").mkdir()
    write_alignment_inputs(root / "inputs")
    step = KilledStep(name, record, root / "inputs", settings)
    step.run(root / "quiet", ranks=1)
    return step, step.result(root / "quiet")


def check_same(found: Result, expected: Result) -> None:
    """Asserts that weights and points are equal in every byte."""
    assert all(torch.equal(value, expected[0][name]) for name, value in found[0].items())
    assert found[1] == expected[1]


def check_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, tolerance: float) -> None:
    """Asserts that no weight differs by more than `tolerance` of the tensor's largest."""
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= tolerance * value.abs().max(), name
