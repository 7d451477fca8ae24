"""A portrait is scored only where there is a face: elsewhere the score is invalid, never low."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import numpy as np
from PIL import Image

from model_core.documents import UserError
from model_core.rewards.verdict import Invalid, Score, Scorer, ScoreRequest, Value

FaceFinder = Callable[[Image.Image], bool]
PORTRAIT = "portrait"
DRAWN_FACE = "drawn_face"  # true in the notes of a prompt whose faces are drawn, which no detector of photographed ones finds
FACES = ("FACE_FEMALE", "FACE_MALE")
MIN_FACE_SCORE = 0.4  # of nudenet's detector, which gives boxes from 0.2 on (ours)
NO_FACE = Invalid("no face")


def face_gate(score: Score, *, has_face: bool) -> Score:
    """The score where there is a face; a value where there is none becomes Invalid, an invalid one keeps its reason."""
    return NO_FACE if isinstance(score, Value) and not has_face else score


class FaceGated:
    """A scorer with a portrait reward, which is valid only where there is a face."""

    def __init__(self, scorer: Scorer, *, has_face: FaceFinder) -> None:
        self._scorer = scorer
        self._has_face = has_face

    @property
    def names(self) -> tuple[str, ...]:
        """Those of the scorer within."""
        return self._scorer.names

    def score(self, requests: Sequence[ScoreRequest]) -> list[dict[str, Score]]:
        """The scores of the scorer within, portraits gated. A face is looked for only where a portrait has a value."""
        return [
            scores | {PORTRAIT: self._gated(request, scores[PORTRAIT])}
            for request, scores in zip(requests, self._scorer.score(requests), strict=True)
        ]

    def _gated(self, request: ScoreRequest, score: Score) -> Score:
        if isinstance(score, Invalid) or request.notes.get(DRAWN_FACE) is True:
            return score
        return face_gate(score, has_face=self._has_face(request.image))


def check_face_finder() -> None:
    """Raises UserError when nudenet, of the extra `caption`, is not installed."""
    if find_spec("nudenet") is None:
        raise UserError(
            f"rewards: found {PORTRAIT}, but the face detector nudenet is not installed; "
            "install it with `uv pip install nudenet`, or leave the reward out"
        )


def open_face_finder() -> FaceFinder:
    """Whether nudenet's detector finds a face. Raises UserError when it is not installed."""
    check_face_finder()
    from nudenet import NudeDetector

    detector = NudeDetector()

    def has_face(picture: Image.Image) -> bool:
        found = detector.detect(np.ascontiguousarray(np.asarray(picture.convert("RGB"))[:, :, ::-1]))  # it reads BGR
        return any(part["class"] in FACES and part["score"] >= MIN_FACE_SCORE for part in found)

    return has_face
