"""Several scorers as one."""

from __future__ import annotations

from collections.abc import Sequence

from model_core.documents import UserError
from model_core.rewards.verdict import RewardUnavailable, Score, Scorer, ScoreRequest, settled


class CombinedScorer:
    """Scores pictures by all of `scorers`, and gives `rewards` of theirs: all where None."""

    def __init__(self, scorers: Sequence[Scorer], *, rewards: Sequence[str] | None = None) -> None:
        given = [name for scorer in scorers for name in scorer.names]
        twice = sorted({name for name in given if given.count(name) > 1})
        if twice:
            raise UserError(f"rewards: found {', '.join(twice)} more than once; allowed is one scorer for each")
        wanted = given if rewards is None else list(rewards)
        missing = [name for name in wanted if name not in given]
        if missing:
            raise UserError(f"rewards: found {', '.join(missing)}; allowed are {', '.join(given) or 'none'}")
        self._names = tuple(wanted)
        self._scorers = [scorer for scorer in scorers if set(scorer.names) & set(wanted)]

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards that it gives."""
        return self._names

    def score(self, requests: Sequence[ScoreRequest]) -> list[dict[str, Score]]:
        """The scores of all. Raises RewardUnavailable when one of them raises anything, or answers what it must not."""
        together: list[dict[str, Score]] = [{} for _ in requests]
        for scorer in self._scorers:
            who = ", ".join(scorer.names)
            try:
                answers = scorer.score(requests)
            except RewardUnavailable:
                raise
            except Exception as error:
                raise RewardUnavailable(f"{who}: {type(error).__name__}: {error}") from error
            for scores, answer in zip(together, settled(answers, scorer.names, len(requests), who=who), strict=True):
                scores.update(answer)
        return [{name: scores[name] for name in self._names} for scores in together]
