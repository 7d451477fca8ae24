"""Distillation killed in the fake score's phase, in the student's, and between them, on one and two ranks."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from tests.alignment_parts import write_alignment_inputs
from tests.killed_steps import KilledStep, Moment, check_close

# Every second iteration ends with the student's phase; a checkpoint follows each iteration.
MOMENTS: dict[str, Moment] = {
    "in the fake score's phase": ("model_core.training.distillation", "", "flow_loss", 3),
    "in the student's phase": ("model_core.training.distillation", "", "matching_gradient", 2),
    "between the phases": ("model_core.steps.distill_dmd", "", "student_backward", 1),
    "after the student's step": ("model_core.training.distillation_state", "", "take_up", 2),
}

pytestmark = pytest.mark.xdist_group("distillation kills")


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> tuple[KilledStep, Path]:
    """The step, and the undisturbed run of it on one rank."""
    root = tmp_path_factory.mktemp("distillation")
    (root / "inputs").mkdir()
    write_alignment_inputs(root / "inputs")
    step = KilledStep("distill_dmd", "distillation.json", root / "inputs", {"dmd": {}})
    step.run(root / "quiet", ranks=1)
    return step, root / "quiet"


def kill_in_turn(here: Path, step: KilledStep, *, ranks: int) -> None:
    """Kills a run at each of the moments, and lets it end."""
    for moment, fatal in MOMENTS.items():
        ended = step.run(here, ranks=ranks, fatal=fatal)
        assert ended == -signal.SIGKILL if ranks == 1 else ended != 0, moment
    step.run(here, ranks=ranks)


def test_on_one_rank_a_killed_run_ends_with_the_same_bytes(tmp_path: Path, quiet: tuple[KilledStep, Path]) -> None:
    step, undisturbed = quiet
    kill_in_turn(tmp_path / "run", step, ranks=1)
    (found, points), (expected, expected_points) = step.result(tmp_path / "run"), step.result(undisturbed)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert points == expected_points


def test_on_two_ranks_a_killed_run_is_the_undisturbed_one_of_one_rank(tmp_path: Path, quiet: tuple[KilledStep, Path]) -> None:
    step, undisturbed = quiet
    kill_in_turn(tmp_path / "run", step, ranks=2)
    (found, points), (expected, expected_points) = step.result(tmp_path / "run"), step.result(undisturbed)
    check_close(found, expected, tolerance=1e-4)
    for point, other in zip(points, expected_points, strict=True):
        assert point.keys() == other.keys()
        assert point["critic_loss"] == pytest.approx(other["critic_loss"], rel=1e-4)
