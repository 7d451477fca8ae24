"""People's votes on pairs: JSON Lines, a vote a line. A later line of the same person, pair and dimension replaces an earlier one."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from model_core.data.preferences import RUBRIC_VERSION
from model_core.documents import UserError
from model_core.recipe import DIMENSIONS, Dimension

VoteLabel = Literal["a", "b", "tie", "invalid"]
SCALE = (1, 5)


@dataclass(frozen=True, kw_only=True)
class Vote:
    """One person's answer: the better of a pair, and where given a score from 1 to 5 of each ({"a": 4, "b": 2}).

    `reason` says why a pair is invalid, and is None for other labels. `time` is ISO 8601 in UTC.
    """

    pair_id: str
    dimension: Dimension
    label: VoteLabel
    annotator: str
    scores: dict[str, int] | None
    rubric_version: str
    reason: str | None
    time: str


def vote_line(vote: Vote) -> bytes:
    """The vote as a line of its file, newline included."""
    return json.dumps(asdict(vote), ensure_ascii=False).encode() + b"\n"


def parse_vote(line: bytes, where: str) -> Vote:
    """The vote of a line; raises UserError, in a sentence that opens with `where`, when it is none or of another rubric version."""
    try:
        document: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    names = Vote.__dataclass_fields__
    if not isinstance(document, dict) or set(document) != set(names):
        found = ", ".join(map(repr, document)) if isinstance(document, dict) else type(document).__name__
        raise UserError(f"{where}: found {found}; allowed are a vote's fields {', '.join(names)}")
    for name in ("pair_id", "annotator", "time"):
        if not isinstance(document[name], str) or not document[name]:
            raise UserError(f"{where}: {name}: found {document[name]!r}; allowed is a text")
    if not isinstance(document["reason"], str | None):
        raise UserError(f"{where}: reason: found {document['reason']!r}; allowed is a text or null")
    for name, allowed in (("dimension", DIMENSIONS), ("label", get_args(VoteLabel)), ("rubric_version", (RUBRIC_VERSION,))):
        if document[name] not in allowed:
            raise UserError(f"{where}: {name}: found {document[name]!r}; allowed are {', '.join(allowed)}")
    scores, (least, most) = document["scores"], SCALE
    if scores is not None:
        whole = isinstance(scores, dict) and set(scores) == {"a", "b"} and all(type(score) is int for score in scores.values())
        if not whole or not all(least <= score <= most for score in scores.values()):
            raise UserError(f"{where}: scores: found {scores!r}; allowed are whole numbers a and b from {least} to {most}, or null")
    return Vote(**document)


def parse_votes(data: bytes, where: str) -> list[Vote]:
    """The votes of a file; empty lines are passed over. Raises UserError that names the line."""
    return [parse_vote(line, f"{where}: line {number}") for number, line in enumerate(data.splitlines(), 1) if line.strip()]
