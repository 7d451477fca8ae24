"""What one person is shown and answers: pairs with a side for each picture, and votes mapped back to a and b."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Literal

from model_core.data.keys import keyed_uniform
from model_core.data.preferences import RUBRIC_VERSION, Preference
from model_core.data.rubrics import INVALID_REASONS, RUBRICS, SCALE
from model_core.data.votes import Vote, VoteLabel
from model_core.documents import UserError
from model_core.recipe import Dimension
from pipelines.labelling.votes_file import VotesFile

Side = Literal["a", "b"]
LABELS = ("left", "right", "tie", "invalid")


class LabellingSession:
    """The pairs of one dimension before one person. Which picture of a pair is left is keyed by pair and person."""

    def __init__(self, pairs: Sequence[Preference], *, dimension: Dimension, annotator: str, votes: VotesFile) -> None:
        self._pairs = {pair.pair_id: pair for pair in pairs}
        self._order = list(self._pairs.values())
        self._dimension: Dimension = dimension
        self._annotator = annotator
        self._file = votes
        self._num_before = len(votes.votes)

    @property
    def num_pairs(self) -> int:
        """Pairs that are shown."""
        return len(self._order)

    @property
    def num_written(self) -> int:
        """Votes that this session has added to the file."""
        return len(self._file.votes) - self._num_before

    def latest(self) -> dict[str, Vote]:
        """This person's last vote on each of the pairs, by pair_id."""
        mine = (self._annotator, self._dimension)
        votes = list(self._file.votes)
        return {vote.pair_id: vote for vote in votes if (vote.annotator, vote.dimension) == mine and vote.pair_id in self._pairs}

    def left(self, pair_id: str) -> Side:
        """Which picture this person sees on the left."""
        return "a" if keyed_uniform("left side", pair_id, self._annotator) < 0.5 else "b"

    def state(self) -> dict[str, Any]:
        """All that the page needs, beside the pictures; it never learns which picture is a."""
        latest = self.latest()
        return {
            "dimension": self._dimension,
            "annotator": self._annotator,
            "file": str(self._file.path),
            "rubric": asdict(RUBRICS[self._dimension]),
            "scale": SCALE,
            "reasons": INVALID_REASONS,
            "pairs": [
                {
                    "pair_id": pair.pair_id,
                    "prompt": pair.prompt,
                    "num_sources": len(pair.sources),
                    "vote": self._seen(latest[pair.pair_id]) if pair.pair_id in latest else None,
                }
                for pair in self._order
            ],
        }

    def picture(self, number: int, name: str) -> bytes | None:
        """The file of a picture of pair `number`: `left`, `right`, or `source-0` and on. None where there is none."""
        if not 0 <= number < len(self._order):
            return None
        pair = self._order[number]
        if name in ("left", "right"):
            return pair.image_a if (name == "left") == (self.left(pair.pair_id) == "a") else pair.image_b
        return {f"source-{index}": source for index, source in enumerate(pair.sources)}.get(name)

    def cast(self, document: Any) -> int:
        """Writes the vote that the page sent; returns on how many pairs this person has voted.

        Raises UserError for anything but a vote on one of the pairs, and OSError when it cannot be written.
        """
        names = {"pair_id", "label", "scores", "reason"}
        if not isinstance(document, dict) or set(document) != names:
            found = ", ".join(map(repr, document)) if isinstance(document, dict) else type(document).__name__
            raise UserError(f"vote: found {found}; allowed are exactly {', '.join(sorted(names))}")
        pair_id, label, scores, reason = (document[name] for name in ("pair_id", "label", "scores", "reason"))
        if not isinstance(pair_id, str) or pair_id not in self._pairs:
            raise UserError(f"vote: found pair {pair_id!r}; allowed are the pairs that are shown")
        if label not in LABELS:
            raise UserError(f"vote: found label {label!r}; allowed are {', '.join(LABELS)}")
        if (reason not in tuple(INVALID_REASONS)) if label == "invalid" else (reason is not None):
            raise UserError(f"vote: found reason {reason!r}; allowed is, of an invalid pair alone, one of {', '.join(INVALID_REASONS)}")
        if scores is not None and not is_scores(scores):
            raise UserError(f"vote: found scores {scores!r}; allowed are left and right from 1 to {len(SCALE)}, or none")
        if scores is not None and label == "invalid":
            raise UserError("vote: found scores of an invalid pair; allowed are none")
        left = self.left(pair_id)
        right: Side = "b" if left == "a" else "a"
        mapped: dict[str, VoteLabel] = {"left": left, "right": right, "tie": "tie", "invalid": "invalid"}
        vote = Vote(
            pair_id=pair_id,
            dimension=self._dimension,
            label=mapped[label],
            annotator=self._annotator,
            scores=None if scores is None else dict(sorted({left: scores["left"], right: scores["right"]}.items())),
            rubric_version=RUBRIC_VERSION,
            reason=reason,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self._file.append(vote)
        return len(self.latest())

    def _seen(self, vote: Vote) -> dict[str, Any]:
        left = self.left(vote.pair_id)
        right = "b" if left == "a" else "a"
        scores = None if vote.scores is None else {"left": vote.scores[left], "right": vote.scores[right]}
        return {"label": {left: "left", right: "right"}.get(vote.label, vote.label), "scores": scores, "reason": vote.reason}


def is_scores(value: Any) -> bool:
    """Whether it is {"left": n, "right": n} with whole numbers of the scale."""
    if not isinstance(value, dict) or set(value) != {"left", "right"}:
        return False
    return all(type(score) is int and 1 <= score <= len(SCALE) for score in value.values())
