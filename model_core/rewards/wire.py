"""The form in which requests and scores travel: strict JSON, pictures as PNG in base64. docs/reference/reward-service.md."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from model_core.data.shards import BROKEN
from model_core.documents import canonical_digest
from model_core.rewards.verdict import Invalid, Score, ScoreRequest, Value

SCORE_PATH = "/v1/score"
MAX_BODY_BYTES = 64 << 20  # of a POST; beyond it the service answers 413
POST_BYTES = 8 << 20  # a client's POST is closed when it has reached this, so that one picture may be as large as the rest allows
POST_PICTURES = 64

Document = dict[str, Any]


class WireError(ValueError):
    """A message that is not of the agreed form; the text says what was found."""


def parse(data: bytes) -> Any:
    """JSON without NaN and infinities, which JSON does not have. Raises WireError."""
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except ValueError as error:
        raise WireError(f"found no JSON ({error})") from error


def request_document(request: ScoreRequest) -> Document:
    """A request as a JSON-able mapping."""
    return {
        "key": request.key,
        "prompt": request.prompt,
        "category": request.category,
        "image": _picture_text(request.image),
        "sources": [_picture_text(source) for source in request.sources],
        "notes": dict(request.notes),
    }


def read_request(document: Any) -> ScoreRequest:
    """The request that `request_document` gave. Raises WireError."""
    texts = {name: _field(document, name, str) for name in ("key", "prompt", "category")}
    sources = _field(document, "sources", list)
    return ScoreRequest(
        **texts,
        image=_picture(_field(document, "image", str), "image"),
        sources=[_picture(source, "sources") for source in sources],
        notes=_field(document, "notes", dict),
    )


def content_digest(document: Mapping[str, Any]) -> str:
    """sha256 of all of a request's mapping but its key: equal keys must have equal ones."""
    return canonical_digest({name: value for name, value in document.items() if name != "key"})


def score_document(score: Score) -> Document:
    """A score as a JSON-able mapping."""
    return {"invalid": score.reason} if isinstance(score, Invalid) else {"value": score.value, "uncertainty": score.uncertainty}


def read_scores(document: Any, names: Sequence[str], num: int) -> list[dict[str, Score]]:
    """The scores in an answer to `num` requests for the rewards `names`. Raises WireError for anything else than just those."""
    scores = _field(document, "scores", list)
    if len(scores) != num:
        raise WireError(f"found {len(scores)} answers to {num} requests")
    for answer in scores:
        if not isinstance(answer, dict) or set(answer) != set(names):
            found = ", ".join(answer) if isinstance(answer, dict) else type(answer).__name__
            raise WireError(f"found the rewards {found or 'none'}; asked for were {', '.join(names)}")
    return [{name: _score(answer[name], name) for name in names} for answer in scores]


def _score(document: Any, name: str) -> Score:
    if isinstance(document, dict) and set(document) == {"invalid"} and isinstance(document["invalid"], str):
        return Invalid(document["invalid"])
    if isinstance(document, dict) and set(document) == {"value", "uncertainty"} and all(_is_number(part) for part in document.values()):
        return Value(float(document["value"]), float(document["uncertainty"]))
    raise WireError(
        f"found {json.dumps(document)[:80]} for {name}; allowed are a finite value with its uncertainty, or invalid with a reason"
    )


def _is_number(value: Any) -> bool:
    """Whether a part of JSON is a finite number; 1e999 is read as infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _field(document: Any, name: str, kind: type) -> Any:
    if not isinstance(document, dict) or not isinstance(document.get(name), kind):
        found = type(document.get(name)).__name__ if isinstance(document, dict) else type(document).__name__
        raise WireError(f"found {found} for {name}; allowed is {kind.__name__}")
    return document[name]


def _picture_text(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG", compress_level=1)  # of the time that sending takes, compression is most
    return base64.b64encode(buffer.getvalue()).decode()


def _picture(text: Any, name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]).convert("RGB")
    except (*BROKEN, TypeError) as error:
        raise WireError(f"found no PNG in base64 for {name} ({type(error).__name__})") from error


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")
