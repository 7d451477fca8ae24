"""How much of the text that a prompt asks for is read in the picture, by optical character recognition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import numpy as np
from PIL import Image

from model_core.data.captions import QUOTED
from model_core.data.synthetic import asked_in, scene_in
from model_core.documents import UserError
from model_core.rewards.verdict import Invalid, Score, ScoreRequest, Value

Reader = Callable[[Image.Image], str]  # all the text in a picture, in reading order
NAME = "text_accuracy"
NO_TEXT = Invalid("no text asked for")


class TextAccuracy:
    """Scores pictures by 1 - CER of what `read` finds in them."""

    names = (NAME,)

    def __init__(self, read: Reader) -> None:
        self._read = read

    def score(self, requests: Sequence[ScoreRequest]) -> list[dict[str, Score]]:
        """One value a request, Invalid where the prompt asks for no text."""
        return [{NAME: self._score(request)} for request in requests]

    def _score(self, request: ScoreRequest) -> Score:
        asked = asked_text(request)
        return Value(1 - symmetric_cer(self._read(request.image), asked)) if asked else NO_TEXT


def asked_text(request: ScoreRequest) -> str:
    """The text that the prompt asks for: the scene's if the prompt or the edit says it, else all that stands in quotes; may be empty."""
    change = request.notes.get("change")
    if change is not None and change["attribute"] == "text":
        return str(change["to"])
    scene = scene_in(request.notes)
    named = asked_in(scene, request.prompt).get("text") if scene is not None else None
    return named or " ".join(QUOTED.findall(request.prompt))


def symmetric_cer(read: str, asked: str) -> float:
    """Levenshtein distance over the longer length, 0 to 1, after taking out white space and case; 0 for two empty texts.

    Over the longer one, so that text that is repeated or added costs as much as text that is missing.
    """
    first, second = ("".join(text.casefold().split()) for text in (read, asked))
    longest = max(len(first), len(second))
    return levenshtein(first, second) / longest if longest else 0.0


def levenshtein(first: str, second: str) -> int:
    """The least number of signs to insert, delete or replace that makes one text the other (Wagner and Fischer 1974)."""
    row = list(range(len(second) + 1))
    for num, sign in enumerate(first, start=1):
        diagonal, row[0] = row[0], num
        for column, other in enumerate(second, start=1):
            diagonal, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, diagonal + (sign != other))
    return row[-1]


def reader_is_installed() -> bool:
    """Whether rapidocr-onnxruntime, of the extra `caption`, is there."""
    return find_spec("rapidocr_onnxruntime") is not None


def check_reader() -> None:
    """Raises UserError when rapidocr-onnxruntime is not installed."""
    if not reader_is_installed():
        raise UserError(
            f"rewards: found {NAME}, but the text reader rapidocr-onnxruntime is not installed; "
            "install it with `uv pip install rapidocr-onnxruntime`, or leave the reward out"
        )


def open_reader() -> Reader:
    """The text that rapidocr reads, line by line from the top. Raises UserError when it is not installed."""
    check_reader()
    from rapidocr_onnxruntime import RapidOCR

    engine = RapidOCR()

    def read(picture: Image.Image) -> str:
        lines, _ = engine(np.ascontiguousarray(np.asarray(picture.convert("RGB"))[:, :, ::-1]))  # it reads BGR
        return " ".join(str(text) for _, text, _ in lines or ())

    return read
