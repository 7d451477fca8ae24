"""Reinforcement learning killed during the rollout, between rollout and update, and during the update, on one and two ranks."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from tests.alignment_parts import write_alignment_inputs
from tests.killed_steps import KilledStep, Moment, check_close

MOMENTS: dict[str, Moment] = {
    "during the rollout": ("tests.alignment_parts", "Scores", "score", 4),
    "between rollout and update": ("model_core.training.policy_update", "PolicyUpdate", "_learn", 2),
    "during the update": ("model_core.training.policy", "Learner", "backward", 4),
}

pytestmark = pytest.mark.xdist_group("alignment kills")


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> tuple[KilledStep, Path]:
    """The step, and the undisturbed run of it on one rank."""
    root = tmp_path_factory.mktemp("alignment")
    (root / "inputs").mkdir()
    write_alignment_inputs(root / "inputs")
    step = KilledStep("align_grpo", "alignment.json", root / "inputs", {"updates_per_rollout": 2, "kl_weight": 0.1})
    step.run(root / "quiet", ranks=1)
    return step, root / "quiet"


def kill_in_turn(here: Path, step: KilledStep, *, ranks: int) -> None:
    """Kills a run at each of the moments, and lets it end."""
    for moment, (module, owner, name, fatal) in MOMENTS.items():
        # Two ranks share out the chunks, and what is scored.
        ended = step.run(here, ranks=ranks, fatal=(module, owner, name, max(2, fatal // ranks)))
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
    check_close(found, expected, tolerance=1e-5)
    for point, other in zip(points, expected_points, strict=True):
        assert point.keys() == other.keys()
        assert point["reward"] == pytest.approx(other["reward"], rel=1e-5)
        assert point["loss"] == pytest.approx(other["loss"], abs=1e-5)
