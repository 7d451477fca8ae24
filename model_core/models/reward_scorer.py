"""Scores by a trained reward model: a calibrated value with its uncertainty, or Invalid and why."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from model_core.documents import UserError
from model_core.models.reward import RewardModel, calibrated, request_pictures
from model_core.objectives.preference import SCORES
from model_core.recipe import EDIT_DIMENSIONS
from model_core.rewards.verdict import Invalid, Score, ScoreRequest, Value

SCORED_AT_ONCE = 32
WIDTH = SCORES[-1] - SCORES[0]  # of the scale that people scored with


class RewardScorer:
    """The reward of one dimension, named as it is: 0 for what people would score 1, 1 for a 5, so that all rewards have one scale."""

    def __init__(self, model: RewardModel) -> None:
        self._model = model.eval()

    @property
    def names(self) -> tuple[str, ...]:
        """The dimension."""
        return (self._model.dimension,)

    def score(self, requests: Sequence[ScoreRequest]) -> list[dict[str, Score]]:
        """One value a request, in order. Invalid where prompt or sources are missing, or a value is not finite."""
        scores: list[Score] = [Invalid(reason) if (reason := self._refusal(request)) else Value(math.nan) for request in requests]
        asked = [place for place, score in enumerate(scores) if isinstance(score, Value)]
        for begin in range(0, len(asked), SCORED_AT_ONCE):
            places = asked[begin : begin + SCORED_AT_ONCE]
            for place, score in zip(places, self._judge([requests[place] for place in places]), strict=True):
                scores[place] = score
        return [{self._model.dimension: score} for score in scores]

    def _refusal(self, request: ScoreRequest) -> str:
        """Why the request cannot be scored; empty where it can."""
        if self._model.dimension in EDIT_DIMENSIONS and not request.sources:
            return "an edit without its sources"
        if not request.prompt.strip():
            return "no prompt"
        try:
            self._model.chat(request.prompt, num_sources=0)
        except UserError as error:
            return str(error)
        return ""

    @torch.inference_mode()
    def _judge(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        model = self._model
        sources = [request.sources if model.dimension in EDIT_DIMENSIONS else () for request in requests]
        rows = zip(requests, sources, strict=True)
        pictures = [request_pictures(given, request.image, image_px=model.image_px) for request, given in rows]
        chats = [model.chat(request.prompt, num_sources=len(given)) for request, given in zip(requests, sources, strict=True)]
        values, deviations = calibrated(model(chats, torch.cat(pictures).to(model.score_head.weight.device)), model.calibration)
        values, deviations = (values - SCORES[0]) / WIDTH, deviations / WIDTH
        return [
            Value(value, deviation) if math.isfinite(value) and math.isfinite(deviation) else Invalid(f"the model's value is {value}")
            for value, deviation in zip(values.tolist(), deviations.tolist(), strict=True)
        ]
