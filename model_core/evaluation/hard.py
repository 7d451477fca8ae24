"""Prompts harder than the plain scenes, reported apart: two shapes, whole words, scenes over photographs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from model_core.data.keys import keyed_generator
from model_core.data.synthetic import COLORS, PHOTO, POSITIONS, SHAPES, Scene, article, describe, held_out_scenes
from model_core.data.typefaces import TYPEFACES, font
from model_core.evaluation.attributes import Prompt
from model_core.evaluation.judge import LIGHTNESS, SIDE, UNREADABLE, Judge
from model_core.recipe import Scenes

OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
WORDS = ("BIRD", "BOAT", "CAKE", "DOOR", "FISH", "GOLD", "HAND", "LAMP", "MOON", "NEST", "RAIN", "SALT", "STAR", "TREE", "WIND", "WOLF")
WORD_HEIGHTS_PX = range(7, 15)  # heights of capitals at which words are looked for, on SIDE
MIN_WORD_FIT = 0.6  # least correlation of a word with its place
MIN_PHOTO_SPREAD = 12.0  # quartile distance of lightness (0 to 255) along a photograph's rim
BOLD = TYPEFACES["en"][1]


def two_shape_prompts(num: int, *, seed: int) -> list[Prompt]:
    """Two shapes of two colours at opposite places; asked for as `POSITION color` and `POSITION shape`."""
    prompts = []
    for index in range(num):
        generator = keyed_generator(seed, "two shapes", index)
        first = str(generator.choice(POSITIONS))
        colors = [str(name) for name in generator.choice(list(COLORS), size=2, replace=False)]
        shapes = [str(name) for name in generator.choice(SHAPES, size=2, replace=False)]
        asked: dict[str, str] = {}
        parts = []
        for position, color, shape in zip((first, OPPOSITE[first]), colors, shapes, strict=True):
            asked |= {f"{position} color": color, f"{position} shape": shape}
            parts.append(f"{article(color)} {color} {shape} on the {position}")
        prompts.append(Prompt(" and ".join(parts), index, asked))
    return prompts


def word_prompts(num: int, config: Scenes, *, seed: int) -> list[Prompt]:
    """Held-out scenes with a word in place of the letter and digit; only the word is asked for."""
    scenes = held_out_scenes(num, config, seed=seed)
    words = [str(keyed_generator(seed, "word", index).choice(WORDS)) for index in range(num)]
    return [
        Prompt(f"{article(scene.color)} {scene.color} {scene.shape} on the {scene.position} with the text {word}", index, {"word": word})
        for index, (scene, word) in enumerate(zip(scenes, words, strict=True))
    ]


def photo_scene_prompts(num: int, config: Scenes, *, seed: int) -> list[Prompt]:
    """Held-out scenes over a photograph; a plain background is wrong."""
    scenes = [Scene(scene.color, scene.shape, scene.position, PHOTO, scene.text) for scene in held_out_scenes(num, config, seed=seed)]
    return [Prompt(describe(scene, 2), index, scene.to_dict()) for index, scene in enumerate(scenes)]


def read_two_shapes(judge: Judge, picture: Image.Image, asked: dict[str, str]) -> dict[str, str]:
    """What the judge sees at the places that were asked about, under the same names."""
    places = judge.read_places(picture)
    return {name: getattr(places[name.split()[0]], name.split()[1]) for name in asked}


def read_photo_scene(judge: Judge, picture: Image.Image) -> dict[str, str]:
    """The judge's reading, its background `photo` where the rim of the picture is of many lightnesses."""
    seen = judge.read(picture)
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64) @ LIGHTNESS
    rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    low, high = np.quantile(rim, (0.25, 0.75))  # a text that touches the rim is no photograph
    background = PHOTO if high - low >= MIN_PHOTO_SPREAD else seen.background
    return {"color": seen.color, "shape": seen.shape, "position": seen.position, "text": seen.text, "background": background}


def read_word(picture: Image.Image, words: Sequence[str] = WORDS) -> tuple[str, float]:
    """Which of `words`, if any, is most clearly written anywhere in the picture, and its correlation there (0 to 1)."""
    lightness = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float64) @ LIGHTNESS
    best, best_fit = UNREADABLE, 0.0
    for word in words:
        for height in WORD_HEIGHTS_PX:
            template = _word_template(word, height)
            if max(template.shape) <= SIDE and (fit := _best_correlation(lightness, template)) > best_fit:
                best, best_fit = word, fit
    return (best if best_fit >= MIN_WORD_FIT else UNREADABLE), best_fit


def word_picture(word: str, height_px: int, *, ink: int, paper: int) -> Image.Image:
    """The word alone on plain paper, 64 px a side: what read_word is checked on."""
    picture = Image.new("RGB", (SIDE, SIDE), (paper, paper, paper))
    ImageDraw.Draw(picture).text((SIDE / 2, SIDE / 2), word, font=font(BOLD, height_px), fill=(ink, ink, ink), anchor="mm")
    return picture


def _word_template(word: str, height_px: int) -> np.ndarray:
    """Coverage of the word with a margin of one pixel, centred, of unit norm."""
    face = font(BOLD, height_px)
    left, top, right, bottom = (round(side) for side in face.getbbox(word))
    canvas = Image.new("L", (right - left + 2, bottom - top + 2))
    ImageDraw.Draw(canvas).text((1 - left, 1 - top), word, font=face, fill=255)
    mask = np.asarray(canvas, dtype=np.float64)
    mask = mask - mask.mean()
    unit: np.ndarray = mask / np.linalg.norm(mask)
    return unit


def _best_correlation(lightness: np.ndarray, template: np.ndarray) -> float:
    """The greatest absolute correlation of the template with any window of the picture; flat windows have none."""
    windows = np.lib.stride_tricks.sliding_window_view(lightness, template.shape)
    products = np.abs(np.einsum("abij,ij->ab", windows, template))  # the template is centred, so the window need not be
    sums, squares = (
        np.lib.stride_tricks.sliding_window_view(np.pad(values.cumsum(0).cumsum(1), ((1, 0), (1, 0))), np.add(template.shape, 1))[
            :, :, :: template.shape[0], :: template.shape[1]
        ]
        for values in (lightness, lightness**2)
    )
    signs = np.array([[1, -1], [-1, 1]])  # of the corners of a window in the integral image
    norms = np.sqrt(np.maximum((squares * signs).sum((2, 3)) - (sums * signs).sum((2, 3)) ** 2 / template.size, template.size))
    return float((products / norms).max())
