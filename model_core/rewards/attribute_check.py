"""How far a picture agrees with each thing that its prompt asks of a plain scene: rewards from first principles, nothing learned.

Each is the soft share of what is asked among all that could be seen in its place, "nothing" included:
softmax(fit / temperature), in [0, 1]. It rises with every improvement of the picture, however small, as a reward must that a
group of similar pictures is compared by. The judge that evaluates models works by other rules and is never asked here.

| reward | what is compared | alternatives |
|---|---|---|
| check_color | distance of the pixels inside the asked shape, at its place, from each colour | all colours and backgrounds |
| check_shape | correlation of the window at the asked place with each shape's mask | all shapes, nothing |
| check_position | contrast of each place against the picture's corners | all places, nowhere |
| check_text | correlation of each character's cell, opposite the shape, with each character's mask | all letters or digits, nothing |
| check_background | distance of the pixels away from shape and text from each background | all backgrounds and colours |
| check_mean | the mean of those that are asked for | |
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from model_core.data.synthetic import (
    BACKGROUNDS,
    COLORS,
    POSITIONS,
    SHAPE_CENTER,
    SHAPES,
    TEXT_CENTERS,
    MaskOf,
    Scene,
    asked_in,
    coverage,
    glyph_mask,
    scene_in,
    shape_mask,
)
from model_core.recipe import Scenes
from model_core.rewards.verdict import Invalid, Score, ScoreRequest, Value

SIDE = 64  # pictures are compared at this size, px
ATTRIBUTES = ("color", "shape", "position", "text", "background")
MEAN = "check_mean"
NO_SCENE = Invalid("no plain scene")
NOT_ASKED = Invalid("not asked for")
NO_TEMPLATE = Invalid("no template for it")  # a photograph as background, a word, a sign that the recipe's scenes do not have

# Temperatures (ours): a clean render scores about 0.9 in each. Lower ones score it higher, and have less to gain at both ends.
COLOR_TEMPERATURE = 32.0  # RGB distance, 0 to 441; the nearest two colours are 94 apart
CONTRAST_TEMPERATURE = 30.0  # RGB distance
FIT_TEMPERATURE = 0.06  # correlation
NOWHERE_CONTRAST = 50.0  # RGB distance that a place must exceed to be more likely than none
NOTHING_FIT = 0.6  # correlation that a mask must exceed to be more likely than none
NOISE_LEVELS = 3.0  # standard deviation (of 255) that counts as flat: it damps the correlations of faint patterns

SHAPE_SHIFTS = (-3, -2, -1, 0, 1, 2, 3)  # px, each way
GLYPH_SHIFTS = tuple(step / 2 for step in range(-6, 7))  # px, each way
REACH = 15  # half a shape's window, px
CELL = (20, 16)  # height and width of a character's cell, px
PLACE_RADIUS = 9.5  # of the disc that a place's contrast is taken over, px
CORNER = 6  # side of the squares at the corners, px: neither shapes nor texts reach there
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # Rec. 601
PALETTE = np.array([*COLORS.values(), *BACKGROUNDS.values()], dtype=np.float32)
PALETTE_NAMES = (*COLORS, *BACKGROUNDS)


class AttributeCheck:
    """Scores pictures of plain scenes whose texts are one of `config.letters` and one of `config.digits`."""

    names = (*(f"check_{name}" for name in ATTRIBUTES), MEAN)

    def __init__(self, config: Scenes) -> None:
        self._signs = (config.letters, config.digits)

    def score(self, requests: Sequence[ScoreRequest]) -> list[dict[str, Score]]:
        """A value for each attribute that the prompt asks for; Invalid for the others, and where there is no plain scene."""
        return [self._score(request) for request in requests]

    def _score(self, request: ScoreRequest) -> dict[str, Score]:
        scene = scene_in(request.notes)
        if scene is None:
            return dict.fromkeys(self.names, NO_SCENE)
        asked = asked_of(request, scene)
        pixels = _pixels(request.image) if asked else None
        scores: dict[str, Score] = {}
        for name in ATTRIBUTES:
            share = None if pixels is None or name not in asked else self._share(name, pixels, scene)
            scores[f"check_{name}"] = Value(share) if share is not None else NO_TEMPLATE if name in asked else NOT_ASKED
        found = [score.value for score in scores.values() if isinstance(score, Value)]
        return scores | {MEAN: Value(float(np.mean(found))) if found else NOT_ASKED}

    def _share(self, name: str, pixels: np.ndarray, scene: Scene) -> float | None:
        if name == "color":
            return palette_share(pixels[shape_core(scene.shape, scene.position)], scene.color)
        if name == "shape":
            return shape_share(pixels, scene.shape, scene.position)
        if name == "position":
            return position_share(pixels, scene.position)
        if name == "text":
            return text_share(pixels, scene.text, scene.position, self._signs)
        return palette_share(pixels[surroundings(scene.position)], scene.background) if scene.background in BACKGROUNDS else None


def asked_of(request: ScoreRequest, scene: Scene) -> dict[str, str]:
    """What is asked of the picture, by attribute: of an edit its one change, else what the prompt names."""
    change = request.notes.get("change")
    if change is None:
        return asked_in(scene, request.prompt)
    return {change["attribute"]: change["to"]} if change["attribute"] in ATTRIBUTES else {}


def palette_share(pixels: np.ndarray, asked: str) -> float:
    """Mean over pixels (N, 3) of the asked colour's share among the palette, softmax(-distance / temperature).

    Along a straight way to the asked colour its distance falls as fast as any distance can, so the share of each pixel
    rises: it is monotone for all blends with the right picture.
    """
    distances = np.sqrt(((pixels[:, None] - PALETTE) ** 2).sum(axis=2))
    index = PALETTE_NAMES.index(asked)
    odds = np.exp((distances[:, index : index + 1] - distances) / COLOR_TEMPERATURE).sum(axis=1)
    return float((1 / odds).mean())


def shape_share(pixels: np.ndarray, asked: str, position: str) -> float:
    """The asked shape's share: each shape's best correlation with the window, over shifts, in whatever colours."""
    window = pixels[_window(position)].reshape(-1, 3)
    window = window - window.mean(axis=0)
    norm = np.linalg.norm(window) + NOISE_LEVELS * np.sqrt(window.size)
    fits = np.linalg.norm(_shape_units(position) @ window, axis=1) / norm
    return _fit_share(fits.reshape(len(SHAPES), -1).max(axis=1), SHAPES.index(asked))


def position_share(pixels: np.ndarray, asked: str) -> float:
    """The asked place's share by contrast: how far its mean colour is from that of the corners."""
    corners = np.concatenate([pixels[rows, columns].reshape(-1, 3) for rows in _ENDS for columns in _ENDS]).mean(axis=0)
    contrasts = np.linalg.norm(_place_weights() @ pixels.reshape(-1, 3) - corners, axis=1)
    contrasts = np.append(contrasts, NOWHERE_CONTRAST)
    index = POSITIONS.index(asked)
    return float(1 / np.exp((contrasts - contrasts[index]) / CONTRAST_TEMPERATURE).sum())


def text_share(pixels: np.ndarray, asked: str, position: str, signs: tuple[str, str]) -> float | None:
    """Mean share of the asked characters, each in its cell opposite the shape; no text asked for is "nothing" in both cells.

    None for a text that is not one of each `signs`.
    """
    if asked and not (len(asked) == 2 and asked[0] in signs[0] and asked[1] in signs[1]):
        return None
    lightness = pixels @ LUMA
    shares = []
    for place, center in enumerate(TEXT_CENTERS[position]):
        cell = lightness[_cell(center)].ravel()
        cell = cell - cell.mean()
        norm = np.linalg.norm(cell) + NOISE_LEVELS * np.sqrt(cell.size)
        fits = np.abs(_glyph_units(signs[place]) @ cell) / norm  # ink may be dark or light
        index = signs[place].index(asked[place]) if asked else len(signs[place])
        shares.append(_fit_share(fits.reshape(len(signs[place]), -1).max(axis=1), index))
    return float(np.mean(shares))


def _fit_share(fits: np.ndarray, index: int) -> float:
    """Share of the fit at `index`, by softmax; the last index is that of nothing."""
    fits = np.append(fits, NOTHING_FIT)
    return float(1 / np.exp((fits - fits[index]) / FIT_TEMPERATURE).sum())


def _pixels(picture: Image.Image) -> np.ndarray:
    """(SIDE, SIDE, 3) float32, 0 to 255."""
    if picture.size != (SIDE, SIDE):
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BOX if min(picture.size) > SIDE else Image.Resampling.BICUBIC)
    return np.asarray(picture.convert("RGB"), dtype=np.float32)


@lru_cache(maxsize=64)
def shape_core(shape: str, position: str) -> np.ndarray:
    """(SIDE, SIDE) bool: what a shape covers wholly wherever it is moved by up to a pixel."""
    x, y = (share * SIDE for share in SHAPE_CENTER[position])
    masks = [coverage(shape_mask, shape, x + dx, y + dy, size_px=SIDE) for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
    core: np.ndarray = np.min(masks, axis=0) >= 0.98
    return core


@lru_cache(maxsize=8)
def surroundings(position: str) -> np.ndarray:
    """(SIDE, SIDE) bool: every other pixel of what neither a shape at that position nor its text can cover."""
    free = np.zeros((SIDE, SIDE), dtype=bool)
    free[::2, ::2] = True
    x, y = (share * SIDE for share in SHAPE_CENTER[position])
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    free &= np.hypot(columns - x, rows - y) > REACH
    for center in TEXT_CENTERS[position]:
        free[_cell(center)] = False
    return free


_ENDS = (slice(0, CORNER), slice(SIDE - CORNER, SIDE))


def _window(position: str) -> tuple[slice, slice]:
    x, y = (round(share * SIDE) for share in SHAPE_CENTER[position])
    return slice(y - REACH, y + REACH), slice(x - REACH, x + REACH)


def _cell(center: tuple[float, float]) -> tuple[slice, slice]:
    """The pixels of a character's cell: rows, columns."""
    x, y = (round(share * SIDE) for share in center)
    height, width = CELL
    top = min(max(0, y - height // 2), SIDE - height)
    return slice(top, top + height), slice(x - width // 2, x + width // 2)


@lru_cache(maxsize=8)
def _shape_units(position: str) -> np.ndarray:
    """(shapes x shifts, pixels of the window): masks, centred, of unit norm."""
    return _units(shape_mask, SHAPES, SHAPE_CENTER[position], _window(position), SHAPE_SHIFTS)


@lru_cache(maxsize=8)
def _glyph_units(signs: str) -> np.ndarray:
    """(signs x shifts, pixels of a cell): masks, centred, of unit norm. A cell looks the same at every place."""
    center = TEXT_CENTERS["left"][0]
    return _units(glyph_mask, signs, center, _cell(center), GLYPH_SHIFTS)


def _units(
    mask_of: MaskOf, names: Sequence[str], center: tuple[float, float], box: tuple[slice, slice], shifts: Sequence[float]
) -> np.ndarray:
    """(names x shifts, pixels of the box): coverage by each name at each shift (px) from a centre (shares of the side), of unit norm."""
    x, y = (share * SIDE for share in center)
    rows = [coverage(mask_of, name, x + dx, y + dy, size_px=SIDE)[box].ravel() for name in names for dx in shifts for dy in shifts]
    return _unit(np.stack(rows))


@lru_cache(maxsize=1)
def _place_weights() -> np.ndarray:
    """(positions, pixels): the mean over a disc at each place."""
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    discs = [np.hypot(columns - x * SIDE, rows - y * SIDE) <= PLACE_RADIUS for x, y in (SHAPE_CENTER[name] for name in POSITIONS)]
    weights: np.ndarray = np.stack([disc.ravel() / disc.sum() for disc in discs]).astype(np.float32)
    return weights


def _unit(rows: np.ndarray) -> np.ndarray:
    centred = rows - rows.mean(axis=1, keepdims=True)
    unit: np.ndarray = (centred / np.linalg.norm(centred, axis=1, keepdims=True)).astype(np.float32)
    return unit
