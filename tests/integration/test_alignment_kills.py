"""Reinforcement learning killed during the rollout, between rollout and update, and during the update, on one and two ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.alignment_parts import write_alignment_inputs

ROOT = Path(__file__).parents[2]
# Kills itself, and so the whole step, when a function is called for the Nth time: a moment that no timer would hit. The scorer is
# the tests' own, as nothing here is about rewards.
PROGRAM = """
import importlib, os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from model_core.steps import align_grpo
from model_core.training.distributed import join_ranks
from tests.alignment_parts import Scores, context_of
from tests.encoded_inputs import Input

align_grpo.open_scorer = lambda *_args, **_kwargs: Scores()
module, owner, name, fatal = {fatal!r}
if fatal:
    target = getattr(importlib.import_module(module), owner)
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
    context = context_of(Path({here!r}), inputs, ranks=ranks, updates_per_rollout=2, kl_weight=0.1)
    align_grpo.run(context)
    context.checkpoints.wait()
"""
MOMENTS = {
    "during the rollout": ("tests.alignment_parts", "Scores", "score", 4),
    "between rollout and update": ("model_core.training.policy_update", "PolicyUpdate", "_learn", 2),
    "during the update": ("model_core.training.policy", "Learner", "backward", 4),
}
QUIET = ("", "", "", 0)

pytestmark = pytest.mark.xdist_group("alignment kills")


def step(here: Path, inputs: Path, *, ranks: int, fatal: tuple[str, str, str, int] = QUIET) -> int:
    """Runs the step; its exit code."""
    here.mkdir(exist_ok=True)
    program = here / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT), fatal=fatal, inputs=str(inputs), here=str(here)))
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


def result(here: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    output = here / "output-0"
    return load_file(output / "mmdit/model.safetensors"), json.loads((output / "alignment.json").read_text())["points"]


def check_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, tolerance: float) -> None:
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= tolerance * value.abs().max(), name


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The inputs, and the undisturbed run on one rank."""
    root = tmp_path_factory.mktemp("alignment")
    (root / "inputs").mkdir()
    write_alignment_inputs(root / "inputs")
    step(root / "quiet", root / "inputs", ranks=1)
    return root / "inputs", root / "quiet"


def kill_in_turn(here: Path, inputs: Path, *, ranks: int) -> None:
    """Kills a run at each of the moments, and lets it end."""
    for moment, (module, owner, name, fatal) in MOMENTS.items():
        # Two ranks share out the chunks, and what is scored.
        ended = step(here, inputs, ranks=ranks, fatal=(module, owner, name, max(2, fatal // ranks)))
        assert ended == -signal.SIGKILL if ranks == 1 else ended != 0, moment
    step(here, inputs, ranks=ranks)


def test_on_one_rank_a_killed_run_ends_with_the_same_bytes(tmp_path: Path, quiet: tuple[Path, Path]) -> None:
    inputs, undisturbed = quiet
    kill_in_turn(tmp_path / "run", inputs, ranks=1)
    (found, points), (expected, expected_points) = result(tmp_path / "run"), result(undisturbed)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert points == expected_points


def test_on_two_ranks_a_killed_run_is_the_undisturbed_one_of_one_rank(tmp_path: Path, quiet: tuple[Path, Path]) -> None:
    inputs, undisturbed = quiet
    kill_in_turn(tmp_path / "run", inputs, ranks=2)
    (found, points), (expected, expected_points) = result(tmp_path / "run"), result(undisturbed)
    check_close(found, expected, tolerance=1e-5)
    for point, other in zip(points, expected_points, strict=True):
        assert point.keys() == other.keys()
        assert point["reward"] == pytest.approx(other["reward"], rel=1e-5)
        assert point["loss"] == pytest.approx(other["loss"], abs=1e-5)
