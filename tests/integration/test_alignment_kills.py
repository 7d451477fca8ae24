"""Reinforcement learning killed during the rollout, between rollout and update, and during the update, on one and two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.killed_steps import KilledStep, Moment, Result, check_close, check_same, undisturbed_run

MOMENTS: dict[str, Moment] = {
    "during the rollout": ("tests.alignment_parts", "Scores", "score", 4),
    "between rollout and update": ("model_core.training.policy_update", "PolicyUpdate", "_learn", 2),
    "during the update": ("model_core.training.policy", "Learner", "backward", 4),
}
# Two ranks share out the chunks, and what is scored.
SHARED_MOMENTS: dict[str, Moment] = {
    moment: (module, owner, name, max(2, fatal // 2)) for moment, (module, owner, name, fatal) in MOMENTS.items()
}

pytestmark = pytest.mark.xdist_group("alignment kills")


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> tuple[KilledStep, Result]:
    """The step, and what the undisturbed run of it leaves on one rank."""
    return undisturbed_run(
        tmp_path_factory.mktemp("alignment"), "align_grpo", record="alignment.json", settings={"updates_per_rollout": 2, "kl_weight": 0.1}
    )


def test_on_one_rank_a_killed_run_ends_with_the_same_bytes(tmp_path: Path, quiet: tuple[KilledStep, Result]) -> None:
    step, expected = quiet
    check_same(step.kill_in_turn(tmp_path / "run", MOMENTS, ranks=1), expected)


def test_on_two_ranks_a_killed_run_is_the_undisturbed_one_of_one_rank(tmp_path: Path, quiet: tuple[KilledStep, Result]) -> None:
    step, (expected, expected_points) = quiet
    found, points = step.kill_in_turn(tmp_path / "run", SHARED_MOMENTS, ranks=2)
    check_close(found, expected, tolerance=1e-5)
    for point, other in zip(points, expected_points, strict=True):
        assert point.keys() == other.keys()
        assert point["reward"] == pytest.approx(other["reward"], rel=1e-5)
        assert point["loss"] == pytest.approx(other["loss"], abs=1e-5)
