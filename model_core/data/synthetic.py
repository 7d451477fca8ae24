"""Plain scenes: one coloured shape at a place and, opposite it, a letter with a digit. What a newcomer's model learns to draw.

Some (colour, shape, position) combinations and some texts are held out by a keyed hash: no training picture, and no source
or target of an edit, ever shows them, so that drawing them proves more than memory.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from model_core.data.keys import keyed_generator, keyed_uniform
from model_core.documents import UserError
from model_core.recipe import Scenes

COLORS = {
    "red": (222, 45, 45),
    "green": (40, 165, 75),
    "blue": (45, 85, 225),
    "yellow": (242, 205, 35),
    "purple": (145, 60, 190),
    "orange": (245, 135, 30),
}
BACKGROUNDS = {"white": (252, 252, 252), "gray": (165, 165, 170), "black": (22, 22, 26), "pink": (250, 208, 216)}
PHOTO = "photo"  # the background of a scene that is drawn over a photograph
SHAPES = ("circle", "square", "triangle", "star")
POSITIONS = ("left", "right", "top", "bottom")
NUM_WORDINGS = 4

# Places as shares of the side: the shape's centre, and the centres of the two characters, each in a cell of 1/4 of the side.
SHAPE_CENTER = {"left": (0.25, 0.5), "right": (0.75, 0.5), "top": (0.5, 0.25), "bottom": (0.5, 0.75)}
TEXT_CENTERS = {
    "left": ((0.625, 0.625), (0.875, 0.625)),
    "right": ((0.125, 0.625), (0.375, 0.625)),
    "top": ((0.375, 0.875), (0.625, 0.875)),
    "bottom": ((0.375, 0.125), (0.625, 0.125)),
}
SHAPE_RADIUS = 0.2  # of the side
GLYPH_HEIGHT = 0.22  # of the side: 14 px of 64
JITTER = 1 / 64  # of the side, each way
OVERSAMPLING = 4
CAP_HEIGHT = 0.729  # of the font's size, DejaVu Sans Bold
DARK, LIGHT = (12, 12, 12), (250, 250, 250)
DARK_INKED = ("white", "gray", "pink")  # backgrounds that carry dark text
MAX_DRAWS = 10_000

MaskOf = Callable[[str, int, int, int], Image.Image]


@dataclass(frozen=True)
class Scene:
    """What a plain scene shows; `text` is a letter and a digit, or empty."""

    color: str
    shape: str
    position: str
    background: str
    text: str

    def to_dict(self) -> dict[str, str]:
        """The scene as a JSON-able mapping."""
        return asdict(self)

    def to_json(self) -> str:
        """The scene as one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)


def scene_from_dict(document: Mapping[str, Any]) -> Scene:
    """The scene that `to_dict` gave."""
    return Scene(**{name: str(document[name]) for name in ("color", "shape", "position", "background", "text")})


def scene_in(notes: Mapping[str, Any]) -> Scene | None:
    """The scene in the notes of a plain picture, or that of an edit's target."""
    found = notes if "shape" in notes else notes.get("target")
    return scene_from_dict(found) if found else None


def is_held_out(scene: Scene, held_out_share: float) -> bool:
    """Whether the scene shows a held-out combination or a held-out text."""
    return triple_is_held_out(scene, held_out_share) or text_is_held_out(scene.text, held_out_share)


def triple_is_held_out(scene: Scene, held_out_share: float) -> bool:
    """Whether (colour, shape, position) is held out."""
    return keyed_uniform("held out", scene.color, scene.shape, scene.position) < held_out_share


def text_is_held_out(text: str, held_out_share: float) -> bool:
    """Whether the text is held out; no text never is."""
    return bool(text) and keyed_uniform("held out", text) < held_out_share


def random_scene(generator: np.random.Generator, config: Scenes) -> Scene:
    """Any scene, held out or not; carries a text with probability `config.text_share`."""

    def one_of(values: Sequence[str]) -> str:
        return values[int(generator.integers(len(values)))]

    text = one_of(config.letters) + one_of(config.digits) if generator.random() < config.text_share else ""
    return Scene(one_of(tuple(COLORS)), one_of(SHAPES), one_of(POSITIONS), one_of(tuple(BACKGROUNDS)), text)


def training_scene(config: Scenes, *key: object) -> Scene:
    """The scene keyed by `key`, of those that may be trained on. Raises UserError when the settings leave none."""
    generator = keyed_generator(*key)
    for _ in range(MAX_DRAWS):
        scene = random_scene(generator, config)
        if not is_held_out(scene, config.held_out_share):
            return scene
    raise UserError(
        f"data.scenes: letters {config.letters!r} and digits {config.digits!r} make held-out texts only; "
        "allowed are more letters or digits, or a text_share below 1"
    )


def training_scenes(config: Scenes, *, seed: int) -> Iterator[Scene]:
    """`config.num_images` scenes, none of them held out."""
    for index in range(config.num_images):
        yield training_scene(config, seed, "scene", index)


def held_out_scenes(num: int, config: Scenes, *, seed: int) -> list[Scene]:
    """`num` scenes with a text whose combination and text are both held out; they repeat when there are fewer such scenes."""
    triples = [
        Scene(color, shape, position, "white", "")
        for color in COLORS
        for shape in SHAPES
        for position in POSITIONS
        if triple_is_held_out(Scene(color, shape, position, "white", ""), config.held_out_share)
    ]
    texts = [letter + digit for letter in config.letters for digit in config.digits]
    texts = [text for text in texts if text_is_held_out(text, config.held_out_share)]
    generator = keyed_generator(seed, "held-out scenes")
    scenes = []
    for index in range(num):
        triple = triples[index % len(triples)] if triples else random_scene(generator, config)
        text = str(generator.choice(texts)) if texts else triple.text
        scenes.append(replace(triple, background=str(generator.choice(list(BACKGROUNDS))), text=text))
    return scenes


def describe(scene: Scene, wording: int) -> str:
    """The scene in words, in one of NUM_WORDINGS ways; the first and the last leave the background open."""
    text = f"the text {scene.text}" if scene.text else ""
    shape = f"{article(scene.color)} {scene.color} {scene.shape}"
    match wording % NUM_WORDINGS:
        case 0:
            return f"{shape} on the {scene.position}" + (f" with {text}" if text else "")
        case 1:
            return f"{shape} on the {scene.position} of a {scene.background} background" + (f" with {text}" if text else "")
        case 2:
            picture = "photo" if scene.background == PHOTO else f"{scene.background} picture"
            return f"a {picture} with {shape} on the {scene.position}" + (f" and {text}" if text else "")
        case _:
            return (f"{text} and " if text else "") + f"{shape} on the {scene.position}"


def asked_in(scene: Scene, prompt: str) -> dict[str, str]:
    """What the prompt asks of a picture of the scene: those attributes whose value is one of its words.

    A background that is left open, or no text, is not asked for.
    """
    words = re.findall(r"\w+", prompt)
    lowered = {word.lower() for word in words}
    asked = {name: getattr(scene, name) for name in ("color", "shape", "position") if getattr(scene, name) in lowered}
    if scene.text in words:
        asked["text"] = scene.text
    if scene.background in lowered:
        asked["background"] = scene.background
    return asked


def article(word: str) -> str:
    """The indefinite article that goes before `word`."""
    return "an" if word[0] in "aeiou" else "a"


def render(scene: Scene, size_px: int, *jitter_key: object) -> Image.Image:
    """The scene as an RGB picture, anti-aliased; shape and text are each moved by up to 1/64 of the side, keyed by `jitter_key`."""
    return compose(scene, Image.new("RGB", (size_px, size_px), BACKGROUNDS[scene.background]), *jitter_key)


def compose(scene: Scene, background: Image.Image, *jitter_key: object) -> Image.Image:
    """The scene's shape and text over a square picture."""
    picture = background.copy()
    steps = keyed_generator(*jitter_key, "jitter").integers(-4, 5, size=4) / 4 * JITTER
    center = SHAPE_CENTER[scene.position]
    _stamp(picture, COLORS[scene.color], shape_mask, scene.shape, center[0] + steps[0], center[1] + steps[1])
    for sign, (x, y) in zip(scene.text, TEXT_CENTERS[scene.position], strict=False):
        if scene.background == PHOTO:  # a rim keeps the text legible over anything
            _stamp(picture, DARK, rim_mask, sign, x + steps[2], y + steps[3])
        _stamp(picture, DARK if scene.background in DARK_INKED else LIGHT, glyph_mask, sign, x + steps[2], y + steps[3])
    return picture


def _stamp(picture: Image.Image, ink: tuple[int, int, int], mask_of: MaskOf, name: str, x: float, y: float) -> None:
    """Paints `ink` through a mask centred at (x, y), as shares of the side, to a quarter of a pixel."""
    fine_x, fine_y = (round(share * picture.width * OVERSAMPLING) for share in (x, y))
    mask = mask_of(name, picture.width, fine_x % OVERSAMPLING, fine_y % OVERSAMPLING)
    picture.paste(ink, (fine_x // OVERSAMPLING - mask.width // 2, fine_y // OVERSAMPLING - mask.height // 2), mask)


@lru_cache(maxsize=4096)
def shape_mask(shape: str, size_px: int, right: int, down: int) -> Image.Image:
    """Coverage (0 to 255) of a shape in a tile, moved by `right` and `down` quarters of a pixel off its centre."""
    side = 2 * math.ceil(SHAPE_RADIUS * 1.1 * size_px) + 4
    mask = Image.new("L", (side * OVERSAMPLING, side * OVERSAMPLING))
    cx, cy, radius = side // 2 * OVERSAMPLING + right, side // 2 * OVERSAMPLING + down, SHAPE_RADIUS * size_px * OVERSAMPLING
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=255)
    elif shape == "square":
        half = radius * 0.88
        draw.rectangle((cx - half, cy - half, cx + half, cy + half), fill=255)
    elif shape == "triangle":
        draw.polygon([(cx, cy - radius), (cx + radius, cy + 0.8 * radius), (cx - radius, cy + 0.8 * radius)], fill=255)
    elif shape == "star":
        points = [(radius * (1.05 if index % 2 == 0 else 0.45), index * math.pi / 5) for index in range(10)]
        draw.polygon([(cx + r * math.sin(angle), cy - r * math.cos(angle)) for r, angle in points], fill=255)
    else:
        raise ValueError(f"found shape {shape!r}; allowed are {', '.join(SHAPES)}")
    return mask.resize((side, side), Image.Resampling.BOX)


@lru_cache(maxsize=16384)
def glyph_mask(sign: str, size_px: int, right: int, down: int) -> Image.Image:
    """Coverage (0 to 255) of one bold character in a tile, moved by `right` and `down` quarters of a pixel off its centre."""
    side = 2 * math.ceil(GLYPH_HEIGHT * size_px) + 4
    mask = Image.new("L", (side * OVERSAMPLING, side * OVERSAMPLING))
    baseline = side // 2 * OVERSAMPLING + down + GLYPH_HEIGHT / 2 * size_px * OVERSAMPLING
    font = _font(round(GLYPH_HEIGHT / CAP_HEIGHT * size_px * OVERSAMPLING))
    ImageDraw.Draw(mask).text((side // 2 * OVERSAMPLING + right, baseline), sign, font=font, fill=255, anchor="ms")
    return mask.resize((side, side), Image.Resampling.BOX)


def rim_mask(sign: str, size_px: int, right: int, down: int) -> Image.Image:
    """The glyph's mask, one pixel wider all round."""
    return glyph_mask(sign, size_px, right, down).filter(ImageFilter.MaxFilter(3))


def coverage(mask_of: MaskOf, name: str, x: float, y: float, *, size_px: int) -> np.ndarray:
    """(size_px, size_px) share of each pixel that a shape or character centred at (x, y) px covers, to a quarter of a pixel."""
    fine_x, fine_y = round(x * OVERSAMPLING), round(y * OVERSAMPLING)
    tile = mask_of(name, size_px, fine_x % OVERSAMPLING, fine_y % OVERSAMPLING)
    canvas = Image.new("L", (size_px, size_px))
    canvas.paste(tile, (fine_x // OVERSAMPLING - tile.width // 2, fine_y // OVERSAMPLING - tile.height // 2))
    return np.asarray(canvas, dtype=np.float64) / 255


@lru_cache(maxsize=8)
def _font(size_px: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans Bold, which matplotlib ships."""
    from importlib.resources import files

    return ImageFont.truetype(str(files("matplotlib") / "mpl-data" / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"), size_px)
