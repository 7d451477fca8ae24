"""What a reward says of a picture: a value, or invalid and why. A number never stands for something that could not be scored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image


@dataclass(frozen=True)
class Value:
    """A finite score; greater is better. `uncertainty` is a standard deviation in the same unit, 0 where it is not estimated."""

    value: float
    uncertainty: float = 0.0


@dataclass(frozen=True)
class Invalid:
    """The reward does not apply to the picture, or could not be computed; it is left out of all sums."""

    reason: str


Score = Value | Invalid


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """One picture to score.

    `key` is the same whenever the same picture is asked about, so that an answer may be given twice. `category` is that of the
    prompt (portrait, scene, text, edit, ..); `sources` are an edit's condition images; `notes` are what is known of the prompt
    (the shards' annotation: scene, operation, change, target).
    """

    key: str
    prompt: str
    image: Image.Image
    category: str = ""
    sources: Sequence[Image.Image] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)


class Scorer(Protocol):
    """Scores pictures by one or more rewards."""

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards that it gives."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[dict[str, Score]]:
        """One mapping a request, in order, with every one of `names` in it.

        Raises RewardUnavailable where no scores can be had now: never a score in their place.
        """


class RewardUnavailable(RuntimeError):
    """The rewards cannot be had: a service that is down or too slow, after all retries."""


def settled(answers: Sequence[Mapping[str, Score]], names: Sequence[str], num: int, *, who: str) -> list[dict[str, Score]]:
    """The answers of the scorer `who` to `num` requests: a value that is not finite has become Invalid.

    Raises RewardUnavailable for another number of answers, or when one has not exactly `names`.
    """
    if len(answers) != num:
        raise RewardUnavailable(f"{who}: found {len(answers)} answers to {num} requests")
    result = []
    for answer in answers:
        if set(answer) != set(names):
            raise RewardUnavailable(f"{who}: found the rewards {', '.join(answer) or 'none'}; allowed are {', '.join(names)}")
        result.append({name: finite(answer[name]) for name in names})
    return result


def finite(score: Score) -> Score:
    """The score, or Invalid for a value that is not finite."""
    if isinstance(score, Value) and not (math.isfinite(score.value) and math.isfinite(score.uncertainty)):
        return Invalid("not finite")
    return score
