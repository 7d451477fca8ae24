"""How much of an edited picture stayed as it was where nothing was to change, times how well the instruction was followed.

What stays alone is best served by doing nothing; the product is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from model_core.data.synthetic import BACKGROUNDS, SHAPE_CENTER, TEXT_CENTERS, Scene, coverage, glyph_mask, scene_from_dict, shape_mask
from model_core.rewards.verdict import Invalid, Score, Scorer, ScoreRequest, Value

NAME = "edit_consistency"
INSTRUCTION = "instruction_following"
NO_REGION = Invalid("edited region unknown")
DIFFERENCE_SCALE = 16.0  # mean absolute difference (of 255) at which similarity has fallen to 1/e (ours)
SLACK_SHARE = 1 / 32  # of the side, about a region: jitter is half of it, anti-aliasing the rest


class EditConsistency:
    """A scorer of `instruction_following`, 0 to 1, with edit_consistency beside it."""

    def __init__(self, instruction: Scorer) -> None:
        if INSTRUCTION not in instruction.names:
            raise ValueError(f"{NAME}: found a scorer of {', '.join(instruction.names)}; allowed is one of {INSTRUCTION}")
        self._instruction = instruction

    @property
    def names(self) -> tuple[str, ...]:
        """Those of the scorer within, and edit_consistency."""
        return (*self._instruction.names, NAME)

    def score(self, requests: Sequence[ScoreRequest]) -> list[dict[str, Score]]:
        """The scores of the scorer within, and the product; Invalid where the region is unknown, or the instruction's score is."""
        return [
            scores | {NAME: self._consistency(request, scores[INSTRUCTION])}
            for request, scores in zip(requests, self._instruction.score(requests), strict=True)
        ]

    def _consistency(self, request: ScoreRequest, instruction: Score) -> Score:
        if isinstance(instruction, Invalid):
            return Invalid(f"{INSTRUCTION}: {instruction.reason}")
        outside = outside_region(request.notes, size=request.sources[0].size) if request.sources else None
        if outside is None:
            return NO_REGION
        followed = min(1.0, max(0.0, instruction.value))
        return Value(followed * similarity(request.image, request.sources[0], outside))


def similarity(result: Image.Image, source: Image.Image, outside: np.ndarray) -> float:
    """exp(-mean absolute difference / 16 levels) over the pixels `outside` (H, W) of the source: 1 where they are equal, above 0."""
    if result.size != source.size:
        result = result.resize(source.size, Image.Resampling.BICUBIC)
    after, before = (np.asarray(picture.convert("RGB"), dtype=np.float32)[outside] for picture in (result, source))
    return float(np.exp(-np.abs(after - before).mean() / DIFFERENCE_SCALE))


def outside_region(notes: Mapping[str, Any], *, size: tuple[int, int]) -> np.ndarray | None:
    """(H, W) bool: where an edit of a plain scene leaves a picture of `size` (width, height) as it is; None where the notes do not tell."""
    change, source, target = (notes.get(name) for name in ("change", "source", "target"))
    if not (change and source and target) or size[0] != size[1]:
        return None
    scenes = scene_from_dict(source), scene_from_dict(target)
    if change["region"] not in ("shape", "text", "background") or any(scene.background not in BACKGROUNDS for scene in scenes):
        return None
    return _outside(change["region"], *scenes, size[0])


@lru_cache(maxsize=1024)
def _outside(region: str, source: Scene, target: Scene, size_px: int) -> np.ndarray:
    shapes, texts = _union(source, target, size_px, part="shape"), _union(source, target, size_px, part="text")
    slack = max(1, round(size_px * SLACK_SHARE))
    if region == "background":  # the text's ink may change with it: what stays is the shape
        return ~_grown(~shapes, slack)
    return ~_grown(shapes if region == "shape" else texts, slack)


def _union(source: Scene, target: Scene, size_px: int, *, part: str) -> np.ndarray:
    """(size_px, size_px) bool: what either scene's shape or text covers, unmoved."""
    covered = np.zeros((size_px, size_px))
    for scene in (source, target):
        if part == "shape":
            x, y = SHAPE_CENTER[scene.position]
            covered += coverage(shape_mask, scene.shape, x * size_px, y * size_px, size_px=size_px)
            continue
        for sign, (x, y) in zip(scene.text, TEXT_CENTERS[scene.position], strict=False):
            covered += coverage(glyph_mask, sign, x * size_px, y * size_px, size_px=size_px)
    return covered > 0


def _grown(mask: np.ndarray, slack: int) -> np.ndarray:
    """The mask, wider by `slack` pixels each way."""
    padded = np.pad(mask, slack, mode="edge")
    side = 2 * slack + 1
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side))
    return np.asarray(windows.any(axis=(2, 3)))
