"""The judge: reads what a picture of a plain scene shows, by least squares with templates. It is never a training signal.

It learns nothing: for each place, shape and shift, the window there is explained by "one colour inside the shape, another
outside", and the best explanation wins if it is good enough; glyphs are read the same way from their lightness. That leaves
soft pictures readable, and lets a picture of nothing be read as nothing. `validate` tells how often it reads held-out renders
right; who uses its scores must check that first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from model_core.data.synthetic import (
    BACKGROUNDS,
    COLORS,
    POSITIONS,
    SHAPE_CENTER,
    SHAPES,
    TEXT_CENTERS,
    Scene,
    coverage,
    glyph_mask,
    held_out_scenes,
    render,
    shape_mask,
)
from model_core.recipe import Scenes

SIDE = 64  # pictures are read at this size, px
SHAPE_SHIFTS = tuple(range(-3, 4))  # px, each way
SHAPE_REACH = 16  # half a shape's window, px
GLYPH_SHIFTS = tuple(step / 2 for step in range(-6, 7))  # px, each way
CELL = (20, 16)  # height and width of a glyph's window, px
CORE = 0.98  # coverage from which a pixel is inside a shape

MIN_SHAPE_FIT = 0.5  # share of a window's variance that the shape must explain
MIN_GLYPH_FIT = 0.5  # least correlation of a glyph with its cell
MIN_INK = 18.0  # standard deviation of lightness (0 to 255) below which a cell is empty
MAX_COLOR_DISTANCE = 90.0  # RGB distance (0 to 441) to the nearest colour that still counts as it
MAX_BACKGROUND_DISTANCE = 60.0
UNREADABLE = "?"

ATTRIBUTES = ("color", "shape", "position", "text", "background")
LIGHTNESS = np.array([0.299, 0.587, 0.114])  # Rec. 601 luma of RGB


@dataclass(frozen=True)
class Reading:
    """What a picture shows. An attribute that cannot be told is `?`; `text` is empty when there is none.

    `shape_fit` is the share of variance that the shape explains, `text_fit` the glyphs' correlation: 0 to 1.
    """

    color: str
    shape: str
    position: str
    text: str
    background: str
    shape_fit: float
    text_fit: float


@dataclass(frozen=True)
class _Window:
    """Shape templates of one place: `box` is (rows, columns); `masks` (T, P), `units` the same centred, of unit norm."""

    box: tuple[slice, slice]
    names: tuple[str, ...]
    masks: np.ndarray
    units: np.ndarray


class Judge:
    """Reads scenes whose texts are one of `config.letters` and one of `config.digits`."""

    def __init__(self, config: Scenes) -> None:
        self._config = config
        self._windows = {position: _window(position) for position in POSITIONS}
        self._signs = (config.letters, config.digits)
        self._glyphs = tuple(_glyphs(signs) for signs in self._signs)

    def read(self, picture: Image.Image) -> Reading:
        """The picture's clearest shape, and the text opposite it."""
        pixels = _pixels(picture)
        places = self._read_places(pixels)
        clearest = max(places.values(), key=lambda reading: reading.shape_fit)
        if clearest.shape == UNREADABLE:
            return replace(clearest, position=UNREADABLE, text=UNREADABLE)
        text, fit = self._read_text(pixels, clearest.position)
        return replace(clearest, text=text, text_fit=fit)

    def read_places(self, picture: Image.Image) -> dict[str, Reading]:
        """What is at each of the four positions, whatever is at the others; texts are not read."""
        return self._read_places(_pixels(picture))

    def validate(self, num: int, *, seed: int) -> dict[str, float]:
        """Share read right, by attribute, of `num` clean renders of held-out scenes, every eighth of them without a text."""
        scenes = [
            replace(scene, text=scene.text if index % 8 else "")
            for index, scene in enumerate(held_out_scenes(num, self._config, seed=seed))
        ]
        readings = [self.read(render(scene, self._config.size_px, seed, "judge", index)) for index, scene in enumerate(scenes)]
        return accuracy(scenes, readings)

    def _read_places(self, pixels: np.ndarray) -> dict[str, Reading]:
        background = _nearest(_border(pixels), BACKGROUNDS, MAX_BACKGROUND_DISTANCE)
        readings = {}
        for position, window in self._windows.items():
            shape, color, fit = _fit_shape(pixels, window)
            readings[position] = Reading(color, shape, position, "", background, fit, 0.0)
        return readings

    def _read_text(self, pixels: np.ndarray, position: str) -> tuple[str, float]:
        """The text opposite a shape, and the lesser of its glyphs' correlations; both glyphs are shifted alike."""
        lightness = pixels @ LIGHTNESS
        fits = []
        for center, templates in zip(TEXT_CENTERS[position], self._glyphs, strict=True):
            cell = lightness[_cell(center)].ravel()
            cell = cell - cell.mean()
            if cell.std() >= MIN_INK:
                fits.append(np.abs(templates @ cell) / np.linalg.norm(cell))  # (shifts, signs); ink may be dark or light
        if len(fits) < 2:
            return (UNREADABLE if fits else ""), 0.0
        first, second = fits
        shift = int(np.argmax(first.max(axis=1) + second.max(axis=1)))
        fit = float(min(first[shift].max(), second[shift].max()))
        text = self._signs[0][int(first[shift].argmax())] + self._signs[1][int(second[shift].argmax())]
        return (text if fit >= MIN_GLYPH_FIT else UNREADABLE), fit


def accuracy(scenes: Sequence[Scene], readings: Sequence[Reading]) -> dict[str, float]:
    """Share of readings that agree with the scenes, by attribute."""
    return {
        name: float(np.mean([getattr(scene, name) == getattr(reading, name) for scene, reading in zip(scenes, readings, strict=True)]))
        for name in ATTRIBUTES
    }


def _pixels(picture: Image.Image) -> np.ndarray:
    """(SIDE, SIDE, 3) float64, 0 to 255."""
    if picture.size != (SIDE, SIDE):
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BOX if min(picture.size) > SIDE else Image.Resampling.BICUBIC)
    return np.asarray(picture.convert("RGB"), dtype=np.float64)


def _border(pixels: np.ndarray) -> np.ndarray:
    """The median colour of the outermost two pixels, where a scene has hardly anything but its background."""
    outer = np.ones((SIDE, SIDE), dtype=bool)
    outer[2:-2, 2:-2] = False
    border: np.ndarray = np.median(pixels[outer], axis=0)
    return border


def _nearest(color: np.ndarray, palette: dict[str, tuple[int, int, int]], limit: float) -> str:
    """The palette's name for an RGB colour, `?` when none is within `limit`."""
    distances = {name: float(np.linalg.norm(color - np.array(value))) for name, value in palette.items()}
    name = min(distances, key=lambda key: distances[key])
    return name if distances[name] <= limit else UNREADABLE


def _fit_shape(pixels: np.ndarray, window: _Window) -> tuple[str, str, float]:
    """(shape, colour, share of the window's variance explained) of the best template; `?` where nothing is good enough."""
    patch = pixels[window.box].reshape(-1, 3)
    centred = patch - patch.mean(axis=0)
    total = float(np.sum(centred**2))
    if total < len(patch):  # flat: less than one level of deviation
        return UNREADABLE, UNREADABLE, 0.0
    explained = np.sum((window.units @ centred) ** 2, axis=1) / total
    best = int(np.argmax(explained))
    if explained[best] < MIN_SHAPE_FIT:
        return UNREADABLE, UNREADABLE, float(explained[best])
    color = np.median(patch[window.masks[best] >= CORE], axis=0)
    return window.names[best], _nearest(color, COLORS, MAX_COLOR_DISTANCE), float(explained[best])


def _window(position: str) -> _Window:
    x, y = (share * SIDE for share in SHAPE_CENTER[position])
    box = tuple(slice(max(0, round(place) - SHAPE_REACH), round(place) + SHAPE_REACH) for place in (y, x))
    names, masks = [], []
    for shape in SHAPES:
        for dy in SHAPE_SHIFTS:
            for dx in SHAPE_SHIFTS:
                names.append(shape)
                masks.append(coverage(shape_mask, shape, x + dx, y + dy, size_px=SIDE)[box].ravel())
    stacked = np.stack(masks)
    return _Window((box[0], box[1]), tuple(names), stacked, _unit(stacked))


def _glyphs(signs: str) -> np.ndarray:
    """(shifts, signs, pixels of a cell): glyph templates, centred, of unit norm. A cell looks the same at every place."""
    center = TEXT_CENTERS["left"][0]
    shifts = [(dx, dy) for dx in GLYPH_SHIFTS for dy in GLYPH_SHIFTS]
    rows = [
        coverage(glyph_mask, sign, center[0] * SIDE + dx, center[1] * SIDE + dy, size_px=SIDE)[_cell(center)].ravel()
        for dx, dy in shifts
        for sign in signs
    ]
    return _unit(np.stack(rows)).reshape(len(shifts), len(signs), -1)


def _cell(center: tuple[float, float]) -> tuple[slice, slice]:
    """The pixels of a glyph's cell: rows, columns."""
    x, y = (round(share * SIDE) for share in center)
    height, width = CELL
    top = min(max(0, y - height // 2), SIDE - height)
    return slice(top, top + height), slice(x - width // 2, x + width // 2)


def _unit(rows: np.ndarray) -> np.ndarray:
    centred = rows - rows.mean(axis=1, keepdims=True)
    unit: np.ndarray = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    return unit
