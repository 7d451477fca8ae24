"""Small scorers and requests for tests of rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from model_core.rewards.verdict import Score, ScoreRequest, Value

BLANK = Image.new("RGB", (64, 64))


class Fixed:
    """Gives each request the same scores, and counts what it was asked."""

    def __init__(self, **scores: Score) -> None:
        self.names = tuple(scores)
        self._scores = scores
        self.num_asked = 0

    def score(self, requests: Sequence[ScoreRequest]) -> list[dict[str, Score]]:
        self.num_asked += len(requests)
        return [dict(self._scores) for _ in requests]


class Raising:
    names = ("broken",)

    def score(self, requests: Sequence[ScoreRequest]) -> list[dict[str, Score]]:
        raise ZeroDivisionError("by zero")


def request(image: Image.Image = BLANK, prompt: str = "", **parts: Any) -> ScoreRequest:
    return ScoreRequest(key="k", prompt=prompt, image=image, **parts)


def value(score: Score) -> float:
    assert isinstance(score, Value), score
    return score.value
