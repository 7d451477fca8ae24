"""Distillation killed in the fake score's phase, in the student's, and between them, on one and two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.killed_steps import KilledStep, Moment, Result, check_close, check_same, undisturbed_run

# Every second iteration ends with the student's phase; a checkpoint follows each iteration.
MOMENTS: dict[str, Moment] = {
    "in the fake score's phase": ("model_core.training.distillation", "", "flow_loss", 3),
    "in the student's phase": ("model_core.training.distillation", "", "matching_gradient", 2),
    "between the phases": ("model_core.steps.distill_dmd", "", "student_backward", 1),
    "after the student's step": ("model_core.training.distillation_state", "", "take_up", 2),
}

pytestmark = pytest.mark.xdist_group("distillation kills")


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> tuple[KilledStep, Result]:
    """The step, and what the undisturbed run of it leaves on one rank."""
    return undisturbed_run(tmp_path_factory.mktemp("distillation"), "distill_dmd", record="distillation.json", settings={"dmd": {}})


def test_on_one_rank_a_killed_run_ends_with_the_same_bytes(tmp_path: Path, quiet: tuple[KilledStep, Result]) -> None:
    step, expected = quiet
    check_same(step.kill_in_turn(tmp_path / "run", MOMENTS, ranks=1), expected)


def test_on_two_ranks_a_killed_run_is_the_undisturbed_one_of_one_rank(tmp_path: Path, quiet: tuple[KilledStep, Result]) -> None:
    step, (expected, expected_points) = quiet
    found, points = step.kill_in_turn(tmp_path / "run", MOMENTS, ranks=2)
    check_close(found, expected, tolerance=1e-4)
    for point, other in zip(points, expected_points, strict=True):
        assert point.keys() == other.keys()
        assert point["critic_loss"] == pytest.approx(other["critic_loss"], rel=1e-4)
