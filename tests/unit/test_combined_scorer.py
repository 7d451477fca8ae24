"""Several scorers as one: names, errors, and numbers that are none."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from model_core.documents import UserError
from model_core.rewards.combined import CombinedScorer
from model_core.rewards.verdict import Invalid, RewardUnavailable, Score, ScoreRequest, Value
from tests.scoring import Fixed, Raising, request


def test_several_scorers_are_one() -> None:
    scorer = CombinedScorer([Fixed(a=Value(1.0), b=Invalid("x")), Fixed(c=Value(3.0))])
    assert scorer.names == ("a", "b", "c")
    assert scorer.score([request(), request()]) == [{"a": Value(1.0), "b": Invalid("x"), "c": Value(3.0)}] * 2


def test_a_scorer_of_no_wanted_reward_is_not_asked() -> None:
    unwanted = Fixed(a=Value(1.0))
    scorer = CombinedScorer([unwanted, Fixed(c=Value(3.0), d=Value(4.0))], rewards=["d"])
    assert scorer.score([request()]) == [{"d": Value(4.0)}]
    assert unwanted.num_asked == 0


def test_one_reward_from_two_scorers_is_refused() -> None:
    with pytest.raises(UserError, match="found a more than once"):
        CombinedScorer([Fixed(a=Value(1.0), b=Value(1.0)), Fixed(a=Value(2.0))])


def test_a_reward_that_nobody_gives_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match="found taste; allowed are a, b"):
        CombinedScorer([Fixed(a=Value(1.0), b=Value(1.0))], rewards=["a", "taste"])


def test_an_exception_of_one_scorer_is_told_and_no_score_stands_for_it() -> None:
    with pytest.raises(RewardUnavailable, match="broken: ZeroDivisionError: by zero"):
        CombinedScorer([Fixed(a=Value(1.0)), Raising()]).score([request()])


def test_a_number_that_is_none_becomes_invalid() -> None:
    scorer = CombinedScorer([Fixed(a=Value(float("nan")), b=Value(1.0, float("inf")), c=Value(1.0))])
    assert scorer.score([request()]) == [{"a": Invalid("not finite"), "b": Invalid("not finite"), "c": Value(1.0)}]


def test_another_number_of_answers_is_no_answer() -> None:
    class Short(Fixed):
        def score(self, requests: Sequence[ScoreRequest]) -> list[dict[str, Score]]:
            return super().score(requests)[1:]

    with pytest.raises(RewardUnavailable, match="found 1 answers to 2 requests"):
        CombinedScorer([Short(a=Value(1.0))]).score([request(), request()])


@pytest.mark.parametrize("scores", [{}, {"b": Value(1.0)}, {"a": Value(1.0), "b": Value(1.0)}])
def test_other_rewards_than_promised_are_no_answer(scores: dict[str, Score]) -> None:
    class Other(Fixed):
        def score(self, requests: Sequence[ScoreRequest]) -> list[dict[str, Score]]:
            return [scores for _ in requests]

    with pytest.raises(RewardUnavailable, match="a: found the rewards .*; allowed are a"):
        CombinedScorer([Other(a=Value(1.0))]).score([request()])
