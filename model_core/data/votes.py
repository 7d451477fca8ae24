"""People's votes on pairs: JSON Lines, a vote a line. A later line of the same person, pair and dimension replaces an earlier one."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args
from urllib.parse import unquote

from model_core.data.preferences import RUBRIC_VERSION, Preference
from model_core.documents import UserError
from model_core.recipe import DIMENSIONS, Dimension, Recipe
from model_core.site import Site
from model_core.storage import StorageError, open_storage

VoteLabel = Literal["a", "b", "tie", "invalid"]
SCALE = (1, 5)
WHERE = "preferences.votes"


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


@dataclass(frozen=True, kw_only=True)
class Consensus:
    """What several people say of a pair: `counts` of labels, a person one; mean scores of those who gave some."""

    label: VoteLabel
    counts: dict[str, int]
    num_annotators: int
    score_a: float | None
    score_b: float | None


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


def load_votes(recipe: Recipe, site: Site) -> list[Vote]:
    """The votes of all of the recipe's files, in their order; raises UserError for the first file or line that is wrong."""
    return [vote for uri in recipe.preferences.votes for vote in parse_votes(_read(uri, site), f"{WHERE}: {uri}")]


def votes_fingerprint(recipe: Recipe, site: Site) -> list[str]:
    """sha256 of each of the recipe's files as they are now. Raises UserError for one that cannot be read."""
    return [hashlib.sha256(_read(uri, site)).hexdigest() for uri in recipe.preferences.votes]


def merge_votes(votes: Iterable[Vote]) -> dict[tuple[str, Dimension], Consensus]:
    """What people say of each (pair, dimension), the last vote of each person counting.

    invalid where more than half say so; else, of the other votes, the label that most say, and a tie where two share that place.
    """
    last: dict[tuple[str, Dimension], dict[str, Vote]] = defaultdict(dict)
    for vote in votes:
        last[vote.pair_id, vote.dimension][vote.annotator] = vote
    return {pair: _consensus(list(by_person.values())) for pair, by_person in last.items()}


def with_votes(preference: Preference, votes: Mapping[tuple[str, Dimension], Consensus]) -> Preference:
    """The pair labelled as people say, where they say anything; scores that nobody gave stay as they are."""
    consensus = votes.get((preference.pair_id, preference.dimension))
    if consensus is None:
        return preference
    return replace(
        preference,
        label=consensus.label,
        reason="votes",
        votes=consensus.counts,
        num_annotators=consensus.num_annotators,
        score_a=preference.score_a if consensus.score_a is None else consensus.score_a,
        score_b=preference.score_b if consensus.score_b is None else consensus.score_b,
    )


def _consensus(votes: Sequence[Vote]) -> Consensus:
    counts = Counter(vote.label for vote in votes)
    valid = sorted((num, label) for label, num in counts.items() if label != "invalid")
    label: VoteLabel
    if 2 * counts["invalid"] > len(votes) or not valid:
        label = "invalid"
    else:
        shared = len(valid) > 1 and valid[-1][0] == valid[-2][0]
        label = "tie" if shared else cast(VoteLabel, valid[-1][1])
    scores = [vote.scores for vote in votes if vote.scores is not None and vote.label != "invalid"]
    mean_a, mean_b = (sum(score[side] for score in scores) / len(scores) if scores else None for side in ("a", "b"))
    return Consensus(label=label, counts=dict(sorted(counts.items())), num_annotators=len(votes), score_a=mean_a, score_b=mean_b)


def _read(uri: str, site: Site) -> bytes:
    path = Path(unquote(uri.removeprefix("file://")) if uri.startswith("file://") else uri)
    try:
        if uri.startswith("s3://"):
            folder, _, name = uri.rpartition("/")
            return open_storage(folder, site.s3).get(name)
        if not path.is_absolute():
            raise UserError(f"{WHERE}: found {uri!r}; allowed are an absolute path, as in /my/votes.jsonl, and s3://BUCKET/votes.jsonl")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{WHERE}: {uri}: no such file") from error
    except (StorageError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise UserError(f"{WHERE}: {uri}: cannot be read ({reason})") from error
