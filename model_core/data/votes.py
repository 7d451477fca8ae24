"""People's votes on pairs: JSON Lines, a vote a line. A later line of the same person, pair and dimension replaces an earlier one."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from model_core.data.preferences import RUBRIC_VERSION
from model_core.documents import UserError
from model_core.recipe import DIMENSIONS, Dimension

VoteLabel = Literal["a", "b", "tie", "invalid"]


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
    names = set(Vote.__dataclass_fields__)
    if not isinstance(document, dict) or set(document) != names:
        raise UserError(f"{where}: found other fields than a vote's, which are {', '.join(sorted(names))}")
    if document["rubric_version"] != RUBRIC_VERSION:
        raise UserError(f"{where}: found rubric version {document['rubric_version']!r}; allowed is {RUBRIC_VERSION!r}")
    if document["label"] not in get_args(VoteLabel) or document["dimension"] not in DIMENSIONS:
        raise UserError(f"{where}: found label {document['label']!r} of {document['dimension']!r}")
    return Vote(**document)
