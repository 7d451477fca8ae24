"""Filters (R1 2.3, Fig. 6): an operator scores every row, and thresholds decide on scores alone.

Scores are stored as columns, so that a later stage with other thresholds looks at no picture again. Order of operators, as
published: broken, resolution, duplicates, NSFW, entropy, sharpness, caption length; a keyed subset comes last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from model_core.data.keys import keyed_uniform
from model_core.data.phash import distance
from model_core.data.shards import BROKEN, RawRow
from model_core.documents import UserError
from model_core.recipe import Recipe, Thresholds

UNIQUE = 65.0  # duplicate bits of a row that looks like no earlier one: more than 64 bits can differ by
THUMBNAIL_PX = 16
THUMBNAIL_TOLERANCE = 24  # of 255, in any channel of any thumbnail pixel
LAPLACIAN_CENTER = 4.0
EXPLICIT = ("BUTTOCKS_EXPOSED", "FEMALE_BREAST_EXPOSED", "FEMALE_GENITALIA_EXPOSED", "MALE_GENITALIA_EXPOSED", "ANUS_EXPOSED")

Scores = dict[str, np.ndarray]


@dataclass(frozen=True)
class Look:
    """What deduplication compares: only rows of one group, and by more than the hash, since plain pictures share hashes.

    Of 8,000 plain scenes about a tenth has the hash of another that differs in its text or a colour; so two rows are
    duplicates when their hashes are near and their thumbnails (of the picture and its references) are alike everywhere.
    """

    group: tuple[str, str, int]  # kind, instruction, number of pictures
    phash: int
    thumbnails: np.ndarray  # uint8


@dataclass(frozen=True)
class Operator:
    """One filter: the score that it reads and which scores it keeps (True), given the stage's thresholds."""

    name: str
    score: str
    reason: str
    keep: Callable[[np.ndarray, Thresholds], np.ndarray]


OPERATORS = (
    Operator("broken", "decodes", "cannot be decoded", lambda score, limits: score > 0),
    Operator("resolution", "side_px", "short side below min_side_px", lambda score, limits: score >= limits.min_side_px),
    Operator(
        "duplicates",
        "duplicate_bits",
        "looks like an earlier one within dedup_distance",
        lambda score, limits: _above(score, limits.dedup_distance),
    ),
    Operator("nsfw", "nsfw", "score above max_nsfw", lambda score, limits: _at_most(score, limits.max_nsfw)),
    Operator(
        "entropy",
        "entropy_bits",
        "outside min_entropy_bits and max_entropy_bits",
        lambda score, limits: _at_least(score, limits.min_entropy_bits) & _at_most(score, limits.max_entropy_bits),
    ),
    Operator("sharpness", "sharpness", "below min_sharpness", lambda score, limits: _at_least(score, limits.min_sharpness)),
    Operator(
        "caption_words", "caption_words", "more than max_caption_words", lambda score, limits: _at_most(score, limits.max_caption_words)
    ),
    Operator("keep_share", "draw", "not drawn into keep_share", lambda score, limits: score < limits.keep_share),
)
COLUMNS = tuple(operator.score for operator in OPERATORS)


def score_row(row: RawRow, *, seed: int, nsfw: Callable[[Image.Image], float] | None) -> tuple[dict[str, float], Look | None]:
    """Every score of a row but that of duplicates, and its look; NaN for what cannot be known of a broken or unscored picture."""
    scores = dict.fromkeys(COLUMNS, float("nan")) | {
        "decodes": 0.0,
        "side_px": float(min(row.width, row.height)),
        "caption_words": float(len((row.instruction or row.caption).split())),
        "draw": keyed_uniform(seed, "keep share", row.sample_id),
    }
    try:
        pictures = [Image.open(BytesIO(data)).convert("RGB") for data in (row.image, *row.references)]
    except BROKEN:
        return scores, None
    scores |= {"decodes": 1.0, "entropy_bits": entropy_bits(pictures[0]), "sharpness": sharpness(pictures[0])}
    if nsfw is not None:
        scores["nsfw"] = max(nsfw(picture) for picture in pictures)
    thumbnails = np.stack([np.asarray(picture.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX)) for picture in pictures])
    return scores, Look((row.kind, row.instruction, len(pictures)), row.phash, thumbnails)


def apply(scores: Scores, thresholds: Thresholds, looks: Sequence[Look | None] | None) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """(which rows are kept, funnel): operators in order, each on what the ones before have left.

    With `looks`, duplicates are searched for among the rows that are left then, and their score is written into `scores`.
    """
    kept = np.ones(len(scores["decodes"]), dtype=bool)
    funnel = []
    for operator in OPERATORS:
        if operator.name == "duplicates" and looks is not None:
            scores[operator.score] = duplicate_bits(looks, kept, radius=thresholds.dedup_distance)
        before = int(kept.sum())
        kept &= operator.keep(scores[operator.score], thresholds)
        funnel.append({"operator": operator.name, "in": before, "out": int(kept.sum()), "reason": operator.reason})
    return kept, funnel


def duplicate_bits(looks: Sequence[Look | None], candidates: np.ndarray, *, radius: int | None) -> np.ndarray:
    """For each row the least number of hash bits between it and an earlier unique candidate that it looks like; UNIQUE if there is none.

    Hashes within `radius` bits share one of radius + 1 bands of bits (the pigeonhole principle), so only rows that share one are compared.
    """
    bits = np.full(len(looks), UNIQUE)
    if radius is None:
        return bits
    edges = [64 * band // (radius + 1) for band in range(radius + 2)]
    seen: dict[tuple[Any, int, int], list[int]] = defaultdict(list)
    for index, look in enumerate(looks):
        if look is None or not candidates[index]:
            continue
        bands = [(look.group, band, look.phash >> low & (1 << high - low) - 1) for band, (low, high) in enumerate(pairwise(edges))]
        for other in sorted({earlier for band in bands for earlier in seen[band]}):
            earlier_look = looks[other]
            assert earlier_look is not None
            apart = distance(look.phash, earlier_look.phash)
            if apart <= min(radius, bits[index] - 1) and alike(look.thumbnails, earlier_look.thumbnails):
                bits[index] = apart
        if bits[index] == UNIQUE:
            for band in bands:
                seen[band].append(index)
    return bits


def alike(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether thumbnails (pictures, H, W, 3) differ by at most THUMBNAIL_TOLERANCE everywhere."""
    return bool(np.abs(first.astype(np.int16) - second).max() <= THUMBNAIL_TOLERANCE)


def entropy_bits(image: Image.Image) -> float:
    """Entropy of the histogram of 8-bit luma, 0 to 8 bits."""
    counts = np.array(image.convert("L").histogram(), dtype=np.float64)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def sharpness(image: Image.Image) -> float:
    """Variance of the 4-neighbour Laplacian of 0..255 luma (Pech-Pacheco 2000); 0 for pictures under 3 px."""
    luma = np.asarray(image.convert("L"), dtype=np.float32)
    if min(luma.shape) < 3:
        return 0.0
    neighbours = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    return float((neighbours - LAPLACIAN_CENTER * luma[1:-1, 1:-1]).var())


def check_filters(recipe: Recipe) -> None:
    """Raises UserError when a stage asks for a score whose detector is not installed."""
    for name, stage in recipe.mmdit.stages.items():
        if stage.filter.max_nsfw is not None and find_spec("nudenet") is None:
            raise UserError(
                f"mmdit.stages.{name}.filter.max_nsfw: found {stage.filter.max_nsfw}, but the detector nudenet is not installed; "
                "install it with `uv pip install nudenet`, or leave max_nsfw out"
            )


def open_nsfw_detector() -> Callable[[Image.Image], float]:
    """A function from a picture to the score of its most explicit part, 0 to 1."""
    from nudenet import NudeDetector

    detector = NudeDetector()

    def score(image: Image.Image) -> float:
        found = detector.detect(np.ascontiguousarray(np.asarray(image)[:, :, ::-1]))  # it reads BGR
        return max((float(part["score"]) for part in found if part["class"] in EXPLICIT), default=0.0)

    return score


def _above(score: np.ndarray, limit: float | None) -> np.ndarray:
    return np.ones(len(score), dtype=bool) if limit is None else score > limit


def _at_least(score: np.ndarray, limit: float | None) -> np.ndarray:
    return np.ones(len(score), dtype=bool) if limit is None else score >= limit


def _at_most(score: np.ndarray, limit: float | None) -> np.ndarray:
    return np.ones(len(score), dtype=bool) if limit is None else score <= limit
