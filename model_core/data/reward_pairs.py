"""Labelled pairs as a reward model is trained on them: read by split, put in a keyed order, and made tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_core.data.keys import keyed_permutation
from model_core.data.preferences import Split, read_preferences
from model_core.documents import UserError
from model_core.objectives.preference import SCORES, TIE, A, B
from model_core.recipe import EDIT_DIMENSIONS, Dimension

LABELS = {"a": A, "b": B, "tie": TIE}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two pictures of one request, and which is the better: A, B or TIE. A score that nobody gave is NaN; pictures are files."""

    pair_id: str
    prompt_id: str
    prompt: str
    category: str
    reason: str
    label: int
    image_a: bytes
    image_b: bytes
    sources: tuple[bytes, ...] = ()
    scores: tuple[float, float] = (math.nan, math.nan)
    notes: Mapping[str, Any]

    @property
    def fits(self) -> tuple[bool, bool]:
        """Whether a, and b, is all that was asked for: of the highest score or, without scores, the better one."""
        if math.isnan(self.scores[0]) and math.isnan(self.scores[1]):
            return self.label == A, self.label == B
        return self.scores[0] >= SCORES[-1], self.scores[1] >= SCORES[-1]


@dataclass(frozen=True)
class LabelledPairs:
    """The pairs of one dimension by split, and how many of other labels were left out."""

    by_split: dict[Split, list[Pair]]
    skipped: dict[str, int]


def read_pairs(path: Path, *, dimension: Dimension) -> LabelledPairs:
    """The pairs of `dimension` in a preferences.parquet that say which is better, or that neither is.

    Raises UserError where the training, validation or test split has none with a better one, or an edit lacks its sources.
    """
    by_split: dict[Split, list[Pair]] = {"train": [], "validation": [], "test": []}
    skipped: Counter[str] = Counter()
    for row in read_preferences(path, dimension=dimension):
        if row.label not in LABELS:
            skipped[row.label] += 1
            continue
        if dimension in EDIT_DIMENSIONS and not row.sources:
            raise UserError(
                f"preferences: pair {row.pair_id} of {dimension} in {path.name} has no sources; allowed is an edit's, one or more"
            )
        pair = Pair(
            pair_id=row.pair_id,
            prompt_id=row.prompt_id,
            prompt=row.prompt,
            category=row.category,
            reason=row.reason,
            label=LABELS[row.label],
            image_a=row.image_a,
            image_b=row.image_b,
            sources=tuple(row.sources) if dimension in EDIT_DIMENSIONS else (),
            scores=tuple(math.nan if score is None else score for score in (row.score_a, row.score_b)),  # type: ignore[arg-type]
            notes=row.notes,
        )
        by_split[row.split].append(pair)
    for split, pairs in by_split.items():
        if all(pair.label == TIE for pair in pairs):
            told = "; ".join(f"{num} are {label}" for label, num in sorted(skipped.items()))
            found = f"found no pair with a better picture for {dimension} in the {split} split of {path.name}"
            raise UserError(f"preferences: {found}{f' ({told})' if told else ''}; allowed is at least one")
    return LabelledPairs(by_split, dict(skipped))


def batch_places(num_pairs: int, batch_size: int, *, step: int, key: Sequence[object]) -> list[int]:
    """Which pairs make up optimizer step `step`'s batch: a new keyed order each epoch, one after the other."""
    places = []
    orders: dict[int, list[int]] = {}
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, num_pairs)
        if epoch not in orders:
            orders[epoch] = keyed_permutation(num_pairs, *key, epoch).tolist()
        places.append(orders[epoch][place])
    return places
