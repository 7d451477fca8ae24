"""The step train_reward on squares of which the brighter is the better: it learns them, resumes bitwise, and reports honestly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model_core.context import StepContext
from model_core.data.folders import LocalFolder
from model_core.data.preferences import FILE_NAME, Preference, write_preferences
from model_core.data.reward_pairs import Pair, batch_places, read_pairs
from model_core.data.synthetic_preferences import synthetic_preferences
from model_core.documents import UserError
from model_core.evaluation.pair_judgements import PairJudgements, fit_calibration
from model_core.evaluation.perturbations import PERTURBATIONS, perturbed
from model_core.evaluation.reward_card import fit_tie_margin, is_right, share_with_interval, three_way, warnings_of
from model_core.models.reward import load_reward
from model_core.models.reward_scorer import RewardScorer
from model_core.objectives.preference import TIE, A, B
from model_core.progress import Progress
from model_core.recipe import Dimension, Preferences, Reward, Scenes, parse_recipe
from model_core.rewards.verdict import ScoreRequest, Value
from model_core.site import Site
from model_core.steps.train_reward import losses, run
from model_core.storage import open_storage
from model_core.tracking.spool import open_tracker
from model_core.training.checkpoint import CheckpointStore
from model_core.training.optim import decay_share
from model_core.training.stopping import Stopped
from tests.interruptions import contents, tell_to_stop
from tests.reward_parts import TRUNK, model, preferences, square

REWARD = {"trunk": TRUNK, "steps": 8, "batch_size": 4, "lr": 1e-2, "warmup_steps": 2, "checkpoint_every_steps": 3, "log_every_steps": 2}


@pytest.fixture
def context_of(tmp_path: Path) -> Callable[..., StepContext]:
    """Makes contexts; those of one name share their checkpoints."""

    def context(name: str, pairs: Iterable[Preference], *, stage: str = "aesthetics", **reward: object) -> StepContext:
        folder = tmp_path / name
        (folder / "output").mkdir(parents=True, exist_ok=True)
        write_preferences(folder / FILE_NAME, pairs)
        return StepContext(
            recipe=parse_recipe({"name": "tiny", "reward": REWARD | reward, "mmdit": {"stages": {"S1": {}}}}, "recipe"),
            site=Site(workspace=str(tmp_path)),
            stage=stage,
            run="test",
            key="0" * 16,
            inputs={"preferences": LocalFolder(folder)},  # type: ignore[dict-item]
            output=folder / "output",
            scratch=folder / "scratch",
            checkpoints=CheckpointStore(open_storage(folder.as_uri()), "checkpoints", say=print, scratch=folder / "scratch"),
            tracker=open_tracker(folder / "spool", run="test", step="train_reward", stage=stage, key="0" * 16, experiment="test"),
            progress=Progress("train_reward"),
        )

    return context


def test_it_learns_which_squares_are_better_and_reports_it(context_of: Callable[..., StepContext]) -> None:
    context = context_of("run", preferences(64), steps=25, batch_size=8, checkpoint_every_steps=100)
    stats = run(context)
    assert stats["accuracy"] >= 0.9
    assert stats["swap_consistency"] == 1.0
    assert not any("accuracy" in line for line in stats["warnings"])
    assert (stats["train_pairs"], stats["validation_pairs"], stats["test_pairs"]) == (40, 16, 8)
    card = json.loads((context.output / "report_card.json").read_text())
    assert card["accuracy"]["low"] <= card["accuracy"]["value"] <= card["accuracy"]["high"]
    assert card["accuracy_by_reason"]["darker"] == {"value": card["accuracy"]["value"], "num": 8}
    assert card["repeats"]["deviation"] < 1e-3 < card["repeats"]["difference_in_a_pair"]
    assert set(card["perturbations"]) == {"blur", "saturation", "high_frequency"}

    scorer = RewardScorer(load_reward(context.output / "reward"))
    requests = [ScoreRequest(key=str(level), prompt="a plain square", image=square(level, "new")) for level in (30, 220)]
    darker, brighter = (row["aesthetics"] for row in scorer.score(requests))
    assert isinstance(darker, Value)
    assert isinstance(brighter, Value)
    assert brighter.value - darker.value > 0.5  # of the 0.875 that their scores are apart


def test_a_run_that_is_interrupted_ends_with_the_same_bytes(context_of: Callable[..., StepContext]) -> None:
    whole, broken = context_of("whole", preferences(32)), context_of("broken", preferences(32))
    run(whole)
    tell_to_stop(broken, when_done=4)
    with pytest.raises(Stopped, match="after step 5, which is saved"):
        run(broken)
    assert contents(broken.output) == {}
    run(context_of("broken", preferences(32)))
    assert contents(whole.output) == contents(broken.output)
    assert {"reward/model.safetensors", "reward/heads.safetensors", "reward/reward.json", "report_card.json", "curves.json"} <= set(
        contents(whole.output)
    )


def test_pairs_without_an_answer_are_left_out_and_counted(context_of: Callable[..., StepContext]) -> None:
    unanswered = [
        replace(pair, pair_id=f"x{number}", label="invalid" if number < 2 else "unlabelled") for number, pair in enumerate(preferences(5))
    ]
    stats = run(context_of("run", [*preferences(16), *unanswered], steps=1))
    assert (stats["invalid_pairs"], stats["unlabelled_pairs"]) == (2, 3)
    assert stats["train_pairs"] + stats["validation_pairs"] + stats["test_pairs"] == 16


def test_pairs_that_people_only_compared_are_enough(context_of: Callable[..., StepContext]) -> None:
    context = context_of("run", preferences(32, score_a=None, score_b=None), steps=2)
    run(context)
    calibration = json.loads((context.output / "reward/reward.json").read_text())["calibration"]
    assert calibration["reads"] == "preference"
    assert json.loads((context.output / "report_card.json").read_text())["score_error"] is None


@pytest.mark.parametrize(
    ("pairs", "stage", "told"),
    [
        (preferences(16), "portrait", "no pair with a better picture for portrait in the train split of preferences.parquet"),
        (preferences(16, label="tie"), "aesthetics", "no pair with a better picture for aesthetics in the train split"),
        (preferences(16, label="unlabelled"), "aesthetics", r"in the train split of preferences.parquet \(16 are unlabelled\)"),
        (preferences(16, split="train"), "aesthetics", "in the validation split"),
        (
            preferences(16, dimension="visual_consistency", sources=[]),
            "visual_consistency",
            "pair 0 of visual_consistency .* has no sources",
        ),
    ],
)
def test_pairs_that_cannot_be_learned_from_are_refused(
    context_of: Callable[..., StepContext], pairs: Iterable[Preference], stage: str, told: str
) -> None:
    with pytest.raises(UserError, match=told):
        run(context_of("run", pairs, stage=stage))


def test_exchanging_sides_and_labels_leaves_the_loss_as_it_is(tmp_path: Path) -> None:
    write_preferences(tmp_path / FILE_NAME, preferences(16, dimension="instruction_following", score_b=None))
    pairs = read_pairs(tmp_path / FILE_NAME, dimension="instruction_following").by_split["train"]
    swapped = [
        replace(pair, image_a=pair.image_b, image_b=pair.image_a, label={A: B, B: A, TIE: TIE}[pair.label], scores=pair.scores[::-1])
        for pair in pairs
    ]
    made = model("instruction_following")
    with torch.no_grad():
        made.preference_head.weight.normal_(generator=torch.Generator().manual_seed(0))
        one, other = (losses(made, rows, Reward())[1] for rows in (pairs, swapped))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert one.min() > 0


def test_every_epoch_shows_each_pair_once_in_a_new_order() -> None:
    places = [place for step in range(6) for place in batch_places(9, 3, step=step, key=(0, "x"))]
    assert sorted(places[:9]) == sorted(places[9:]) == list(range(9))
    assert places[:9] != places[9:]
    assert batch_places(9, 6, step=1, key=(0, "x")) == places[6:12]


def test_the_rate_falls_in_a_line_over_the_last_steps() -> None:
    assert [decay_share(step, over=range(2, 6)) for step in range(6)] == pytest.approx([1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
    assert decay_share(7, over=range(0)) == 1.0


def judged(pairs: int) -> tuple[PairJudgements, list[Pair]]:
    """Judgements whose expected score is half the true one, and whose mean is twice it."""
    draw = np.random.default_rng(0)
    scores = draw.uniform(1, 5, (pairs, 2))
    rows = [
        Pair(
            pair_id=str(number),
            prompt_id=str(number),
            prompt="",
            category="",
            reason="",
            label=A if score[0] > score[1] else B,
            image_a=b"",
            image_b=b"",
            scores=(float(score[0]), float(score[1])),
            notes={},
        )
        for number, score in enumerate(scores)
    ]
    return PairJudgements(expected=scores / 2 + 1, mean=2 * scores, deviation=np.ones_like(scores)), rows


def test_calibration_brings_both_heads_onto_the_scale_of_the_scores() -> None:
    said, pairs = judged(200)
    by_score = fit_calibration(said, pairs, scored=True, compared=True)
    assert (by_score.scale, by_score.shift, by_score.uncertainty_scale) == pytest.approx((2.0, -2.0, 0.5))
    by_mean = fit_calibration(said, pairs, scored=False, compared=True)
    assert (by_mean.scale, by_mean.shift, by_mean.uncertainty_scale) == pytest.approx((0.5, 0.0, 0.5), abs=1e-9)
    assert fit_calibration(said, pairs, scored=True, compared=False).uncertainty_scale == 0.0
    unscored = [replace(pair, scores=(math.nan, math.nan)) for pair in pairs]
    assert fit_calibration(said, unscored, scored=False, compared=True).scale == 1.0


def test_ties_are_told_by_the_margin_that_is_right_most_often() -> None:
    _, pairs = judged(6)
    pairs = [replace(pair, label=TIE if number < 3 else A) for number, pair in enumerate(pairs)]
    values = np.array([[3.1, 3.0], [3.0, 3.2], [4.0, 4.0], [4.0, 3.0], [5.0, 3.5], [2.0, 1.0]])
    margin = fit_tie_margin(values, pairs)
    assert margin == pytest.approx(0.2)
    assert three_way(values, margin=margin).tolist() == [TIE, TIE, TIE, A, A, A]
    assert is_right(np.array([2.0, 2.0]), pairs[3]) == 0.5
    assert math.isnan(is_right(values[0], pairs[0]))


def test_the_interval_draws_whole_prompts() -> None:
    """Of two prompts, one all right and one all wrong, a draw has 0, 1 or 2 right; pairs alone would lie near one half."""
    right = np.array([1.0] * 50 + [0.0] * 50)
    found = share_with_interval(right, ["one"] * 50 + ["two"] * 50, 0)
    assert (found["value"], found["low"], found["high"]) == (0.5, 0.0, 1.0)
    apart = share_with_interval(right, [str(number) for number in range(100)], 0)
    assert 0.35 < apart["low"] < 0.45 < 0.55 < apart["high"] < 0.65


def test_a_poor_or_fooled_model_is_warned_of() -> None:
    card: dict[str, Any] = {
        "dimension": "aesthetics",
        "accuracy": {"value": 0.7, "num": 50},
        "swap": {"share": 1.0},
        "perturbations": {
            "blur": {"must_fall": True, "mean_change": 0.25},
            "saturation": {"must_fall": True, "mean_change": -0.25},
            "duplicated_text": {"must_fall": False, "mean_change": 0.25},
        },
    }
    assert warnings_of(card, at_least=0.8) == [
        "aesthetics: accuracy 0.700 on 50 test pairs is below 0.8",
        "aesthetics: blur raises the value by 0.250 on average; it must lower it",
    ]


@pytest.mark.parametrize("dimension", ["alignment", "instruction_following"])
def test_each_perturbation_changes_the_pictures_that_it_applies_to(tmp_path: Path, dimension: Dimension) -> None:
    made = synthetic_preferences(Preferences(num_pairs=24), Scenes(), seed=0, dimension=dimension)
    write_preferences(tmp_path / FILE_NAME, (replace(pair, split=("train", "validation", "test")[n % 3]) for n, pair in enumerate(made)))
    pairs = read_pairs(tmp_path / FILE_NAME, dimension=dimension).by_split["train"]
    applied = {name: [picture for pair in pairs if (picture := perturbed(pair, "a", name)) is not None] for name in PERTURBATIONS}
    assert all(applied[name] for name in ("blur", "saturation", "high_frequency"))
    assert bool(applied["copied_source"]) == (dimension == "instruction_following")
    assert applied["duplicated_text"]
    assert all(picture.size == (64, 64) for pictures in applied.values() for picture in pictures)


def test_a_dimension_has_its_own_number_of_steps_where_the_recipe_says_so() -> None:
    settings = Reward(steps=5, dimension_steps={"alignment": 9})
    assert (settings.of("alignment").steps, settings.of("portrait").steps) == (9, 5)
