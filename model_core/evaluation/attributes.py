"""What a prompt asks of a picture, and whether a reading of the picture has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model_core.data.synthetic import NUM_WORDINGS, Scene, asked_in, describe, held_out_scenes
from model_core.recipe import Scenes

SCORED = ("color", "shape", "position", "text")  # what judge/mean is the mean of


@dataclass(frozen=True)
class Prompt:
    """A prompt, the seed it is drawn with, and what it asks for, by attribute."""

    text: str
    seed: int
    asked: dict[str, str]


def plain_prompts(num: int, config: Scenes, *, seed: int) -> list[Prompt]:
    """Prompts of held-out scenes, the wordings in turn; the seed of each picture is its place in the list."""
    scenes = held_out_scenes(num, config, seed=seed)
    wordings = [index % NUM_WORDINGS for index in range(num)]
    return [
        Prompt(describe(scene, wording), index, asked_by(scene, wording))
        for index, (scene, wording) in enumerate(zip(scenes, wordings, strict=True))
    ]


def asked_by(scene: Scene, wording: int) -> dict[str, str]:
    """What the description of a scene in that wording names; a background that is left open, or no text, is not asked for."""
    return asked_in(scene, describe(scene, wording))


def shares(verdicts: Sequence[dict[str, bool]]) -> dict[str, float]:
    """Share of right verdicts by attribute, over those that were asked for it; `mean` is that of the scored ones.

    `all` is the share of pictures with nothing wrong. An attribute that nothing asked for is absent.
    """
    names = [name for name in (*SCORED, "background") if any(name in verdict for verdict in verdicts)]
    result = {name: float(np.mean([verdict[name] for verdict in verdicts if name in verdict])) for name in names}
    result["mean"] = float(np.mean([result[name] for name in names if name in SCORED]))
    result["all"] = float(np.mean([all(verdict.values()) for verdict in verdicts]))
    return result
