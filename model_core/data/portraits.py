"""Plain drawn portraits, and faults of anatomy in them whose severity is known.

They stand for people in data that hold none: head, hair, two eyes, nose and mouth on 64 px, as plain as the scenes. A reward
model that learned from them has seen no human face.

| fault | severities | what is wrong |
|---|---|---|
| missing_eye | 3 | one eye is not there |
| third_eye | 3 | there is one more, on the forehead |
| uneven_eyes | 1 to 4 | one eye hangs lower |
| missing_mouth | 2 | there is no mouth |
| displaced_mouth | 1 to 4 | the mouth has wandered off to one side |
| lopsided_head | 1 to 4 | one half of the head is wider and hangs lower |
| melted_features | 1 to 4 | the face runs down in waves |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

from model_core.data.keys import keyed_generator

SKINS = {"light": (246, 214, 186), "tan": (214, 164, 122), "brown": (150, 100, 68), "dark": (92, 60, 44)}
HAIRS = {"black": (28, 24, 26), "brown": (96, 58, 32), "blond": (226, 190, 104), "red": (176, 66, 28), "gray": (150, 150, 156)}
STYLES = ("short", "long", "curly")
SHIRTS = {"red": (206, 50, 50), "green": (50, 150, 84), "blue": (56, 92, 210), "yellow": (236, 200, 60), "white": (240, 240, 240)}
BACKGROUNDS = {"gray": (172, 172, 178), "teal": (96, 178, 178), "pink": (246, 202, 212), "cream": (250, 240, 214)}
IRISES = ((60, 110, 60), (50, 90, 170), (90, 58, 32))
WHITE, INK, LIPS = (250, 250, 250), (30, 26, 26), (184, 64, 72)
NUM_WORDINGS = 3
OVERSAMPLING = 4

# fault: (the feature that it is of, severities that it comes in); one feature has one fault at a time
FAULTS: dict[str, tuple[str, tuple[int, ...]]] = {
    "missing_eye": ("eyes", (3,)),
    "third_eye": ("eyes", (3,)),
    "uneven_eyes": ("eyes", (1, 2, 3, 4)),
    "missing_mouth": ("mouth", (2,)),
    "displaced_mouth": ("mouth", (1, 2, 3, 4)),
    "lopsided_head": ("head", (1, 2, 3, 4)),
    "melted_features": ("face", (1, 2, 3, 4)),
}
MAX_TOTAL = 4  # of severities in one picture: its score is 5 less their sum


@dataclass(frozen=True)
class Portrait:
    """Who is drawn; every field but `skin` is named by the captions."""

    hair: str
    style: str
    shirt: str
    background: str
    skin: str

    def to_dict(self) -> dict[str, str]:
        """The portrait as a JSON-able mapping."""
        return asdict(self)


def random_portrait(*key: object) -> Portrait:
    """The portrait keyed by `key`."""
    generator = keyed_generator(*key, "portrait")

    def one_of(values: Sequence[str]) -> str:
        return values[int(generator.integers(len(values)))]

    return Portrait(one_of(tuple(HAIRS)), one_of(STYLES), one_of(tuple(SHIRTS)), one_of(tuple(BACKGROUNDS)), one_of(tuple(SKINS)))


def describe_portrait(portrait: Portrait, wording: int) -> str:
    """The portrait in words, in one of NUM_WORDINGS ways."""
    hair, shirt, background = f"{portrait.style} {portrait.hair} hair", f"a {portrait.shirt} shirt", f"a {portrait.background} background"
    match wording % NUM_WORDINGS:
        case 0:
            return f"a portrait of a person with {hair} and {shirt} on {background}"
        case 1:
            return f"a person with {hair} who wears {shirt}, {background}"
        case _:
            return f"the face of a person, {hair}, {shirt}, {background}"


@lru_cache(maxsize=1)
def fault_pairs() -> tuple[tuple[dict[str, int], dict[str, int]], ...]:
    """All (lesser, worse) sets of faults: the worse has every fault of the lesser, one of them graver, or one more."""
    single = [{name: severity} for name, (_, severities) in FAULTS.items() for severity in severities]
    pairs: list[tuple[dict[str, int], dict[str, int]]] = [({}, worse) for worse in single]
    for lesser, other in product(single, single):
        ((name, severity),), ((added, more),) = lesser.items(), other.items()
        if name == added and more > severity:
            pairs.append((lesser, other))
        elif FAULTS[name][0] != FAULTS[added][0] and severity + more <= MAX_TOTAL:
            pairs.append((lesser, {**lesser, **other}))
    return tuple(pairs)


def render_portrait(portrait: Portrait, size_px: int, faults: Mapping[str, int], *jitter_key: object) -> Image.Image:
    """The portrait as an RGB picture, anti-aliased; place and proportions vary with `jitter_key`, and with nothing else.

    Raises ValueError for a fault or severity that FAULTS does not list.
    """
    for name, severity in faults.items():
        if name not in FAULTS or severity not in FAULTS[name][1]:
            allowed = ", ".join(f"{fault} {list(severities)}" for fault, (_, severities) in FAULTS.items())
            raise ValueError(f"found fault {name} of severity {severity}; allowed are {allowed}")
    generator = keyed_generator(*jitter_key, "face")
    side = size_px * OVERSAMPLING
    face = _Face(portrait, side, generator.uniform(-1, 1, size=6), IRISES[int(generator.integers(len(IRISES)))])
    picture = Image.new("RGB", (side, side), BACKGROUNDS[portrait.background])
    face.draw(ImageDraw.Draw(picture), faults)
    if melted := faults.get("melted_features", 0):
        picture = _melted(picture, melted, phase=float(generator.uniform(0, 2 * math.pi)))
    return picture.resize((size_px, size_px), Image.Resampling.BOX)


class _Face:
    """A face's measures, as shares of the side, and how it is drawn."""

    def __init__(self, portrait: Portrait, side: int, jitter: np.ndarray, iris: tuple[int, int, int]) -> None:
        self.portrait, self.side, self.iris = portrait, side, iris
        self.x, self.y = 0.5 + 0.02 * jitter[0], 0.47 + 0.015 * jitter[1]
        self.half_width, self.half_height = 0.2 + 0.012 * jitter[2], 0.26 + 0.012 * jitter[3]
        self.eye_gap = 0.085 + 0.006 * jitter[4]
        self.smile = 0.02 + 0.012 * jitter[5]

    def draw(self, draw: ImageDraw.ImageDraw, faults: Mapping[str, int]) -> None:
        skin, hair = SKINS[self.portrait.skin], HAIRS[self.portrait.hair]
        self._hair_behind(draw, hair)
        self._ellipse(draw, (self.x, 1.06), (0.36, 0.24), SHIRTS[self.portrait.shirt])
        self._ellipse(draw, (self.x, 0.8), (0.085, 0.13), _darker(skin))
        head = faults.get("lopsided_head", 0)
        draw.polygon(self._outline(head, 1.0), fill=skin)
        fringe = [point for point in self._outline(head, 1.03) if point[1] < (self.y - 0.13) * self.side]
        draw.polygon(fringe, fill=hair)
        self._eyes(draw, faults, skin, hair)
        nose = [(self.x, self.y - 0.01), (self.x - 0.025, self.y + 0.07), (self.x + 0.025, self.y + 0.07)]
        draw.polygon([(x * self.side, y * self.side) for x, y in nose], fill=_darker(skin))
        self._mouth(draw, faults)

    def _hair_behind(self, draw: ImageDraw.ImageDraw, hair: tuple[int, int, int]) -> None:
        width, height = self.half_width, self.half_height
        if self.portrait.style == "short":
            self._ellipse(draw, (self.x, self.y - 0.05), (width + 0.025, height), hair)
        elif self.portrait.style == "long":
            self._ellipse(draw, (self.x, self.y - 0.02), (width + 0.05, height + 0.035), hair)
            corners = (self.x - width - 0.05, self.y, self.x + width + 0.05, self.y + 0.36)
            draw.rectangle([share * self.side for share in corners], fill=hair)
        else:
            for step in range(9):
                angle = math.pi * (1 + step / 8)
                self._ellipse(draw, (self.x + width * math.cos(angle), self.y - 0.02 + height * math.sin(angle)), (0.075, 0.075), hair)

    def _outline(self, lopsided: int, scale: float) -> list[tuple[float, float]]:
        """The head's outline in pixels; lopsided, its right half is wider and hangs."""
        points = []
        for step in range(48):
            cos, sin = math.cos(step * math.pi / 24), math.sin(step * math.pi / 24)
            stretch = 1 + (0.13 if cos > 0 else -0.05) * lopsided * abs(cos) ** 0.5
            x = self.x + scale * self.half_width * stretch * cos
            y = self.y + scale * self.half_height * sin + 0.03 * lopsided * cos
            points.append((x * self.side, y * self.side))
        return points

    def _eyes(self, draw: ImageDraw.ImageDraw, faults: Mapping[str, int], skin: tuple[int, int, int], hair: tuple[int, int, int]) -> None:
        height = self.y - 0.03
        places = [(self.x - self.eye_gap, height), (self.x + self.eye_gap, height + 0.035 * faults.get("uneven_eyes", 0))]
        if "missing_eye" in faults:
            places = places[:1]
        if "third_eye" in faults:
            places.append((self.x, height - 0.085))
        for x, y in places:
            self._ellipse(draw, (x, y), (0.05, 0.033), WHITE)
            self._ellipse(draw, (x, y), (0.026, 0.03), self.iris)
            self._ellipse(draw, (x, y), (0.013, 0.015), INK)
        for x, y in places[:2]:
            brow = _darker(hair) if hair != HAIRS["black"] or self.portrait.skin != "dark" else _darker(skin)
            draw.line([((x - 0.05) * self.side, (y - 0.06) * self.side), ((x + 0.05) * self.side, (y - 0.06) * self.side)], brow, 6)

    def _mouth(self, draw: ImageDraw.ImageDraw, faults: Mapping[str, int]) -> None:
        if "missing_mouth" in faults:
            return
        moved = faults.get("displaced_mouth", 0)
        x, y = self.x + 0.04 * moved, self.y + 0.135 - 0.015 * moved
        lower = [(x + 0.08 * step / 8, y + (0.018 + self.smile) * (1 - (step / 8) ** 2)) for step in range(8, -9, -1)]
        upper = [(x + 0.08 * step / 8, y - 0.006 * (1 - (step / 8) ** 2)) for step in range(-8, 9)]
        draw.polygon([(px * self.side, py * self.side) for px, py in (*upper, *lower)], fill=LIPS)

    def _ellipse(
        self, draw: ImageDraw.ImageDraw, center: tuple[float, float], radii: tuple[float, float], ink: tuple[int, int, int]
    ) -> None:
        (x, y), (across, down) = center, radii
        draw.ellipse([share * self.side for share in (x - across, y - down, x + across, y + down)], fill=ink)


def _melted(picture: Image.Image, severity: int, *, phase: float) -> Image.Image:
    """The middle of the picture drawn down, column by column, by waves whose height grows with severity."""
    pixels = np.asarray(picture)
    side = len(pixels)
    place = np.arange(side) / side
    window = np.clip(1 - ((place - 0.5) / 0.3) ** 2, 0, 1)  # of columns: the face alone
    fall = 0.035 * severity * (1 + np.sin(2 * np.pi * place / 0.16 + phase)) / 2 * window
    depth = np.clip((place - 0.3) / 0.15, 0, 1) * np.clip((0.85 - place) / 0.1, 0, 1)  # of rows: from the brows to the neck
    rows = np.arange(side)[:, None] - np.round(fall[None] * depth[:, None] * side).astype(int)
    return Image.fromarray(pixels[rows.clip(0, side - 1), np.arange(side)[None]])


def _darker(color: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (round(0.82 * value) for value in color)
    return red, green, blue
