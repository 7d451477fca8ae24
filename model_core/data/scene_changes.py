"""Scenes with some attributes other than asked: the wrong pictures of preference pairs. None is a held-out scene."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from model_core.data.synthetic import BACKGROUNDS, COLORS, POSITIONS, SHAPES, Scene, is_held_out
from model_core.recipe import Scenes

NAMED_ALWAYS = ("color", "shape", "position")  # attributes that every caption of a scene names
SCORES_OF_WRONG = (5.0, 3.0, 2.0, 1.0)  # none wrong, one, two, three or more
MISSING_TEXT_SHARE = 0.3  # of wrong texts; the others are another text
MIN_DIFFERENCE = 1.5  # levels of 255, root mean square, by which two pictures of known order differ


def score_of_wrong(num: int) -> float:
    """The pointwise score of a picture in which `num` attributes are wrong."""
    return SCORES_OF_WRONG[min(num, len(SCORES_OF_WRONG) - 1)]


def changed(scene: Scene, names: Sequence[str], config: Scenes, generator: np.random.Generator) -> Scene | None:
    """The scene with each named attribute another one, drawn in order; None where that is a held-out scene.

    With the generator of the same key, a longer list of names keeps what a shorter one that it begins with changed.
    """
    result = scene
    for name in names:
        result = replace(result, **{name: other_value(scene, name, config, generator)})
    return None if is_held_out(result, config.held_out_share) else result


def other_value(scene: Scene, name: str, config: Scenes, generator: np.random.Generator) -> str:
    """A value that the attribute does not have; a text becomes another or none, no text becomes one."""
    if name == "text":
        missing = generator.random() < MISSING_TEXT_SHARE
        if scene.text and missing:
            return ""
        values: Sequence[str] = [letter + digit for letter in config.letters for digit in config.digits]
    else:
        values = {"color": tuple(COLORS), "shape": SHAPES, "position": POSITIONS, "background": tuple(BACKGROUNDS)}[name]
    values = [value for value in values if value != getattr(scene, name)]
    return values[int(generator.integers(len(values)))] if values else ""
