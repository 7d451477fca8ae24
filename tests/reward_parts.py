"""Small reward models and preference pairs for tests: squares of one colour, where brighter is better."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from model_core.data.keys import keyed_generator
from model_core.data.preferences import Preference, png
from model_core.models.reward import RewardModel, tiny_reward
from model_core.recipe import EDIT_DIMENSIONS, Dimension, RewardTrunk

TRUNK = {
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 1,
    "vision_hidden_size": 16,
    "vocab_size": 300,
    "image_px": 32,
}
PROMPTS = [f"a {word} square" for word in ("plain", "large", "small", "soft")]


def square(level: int, *key: object) -> Image.Image:
    """A picture of 32 px, about as bright as `level`, with a little noise keyed by `key`."""
    noise = keyed_generator("square", *key).integers(-8, 9, size=(32, 32, 3))
    return Image.fromarray((level + noise).clip(0, 255).astype(np.uint8))


def model(dimension: Dimension = "aesthetics", *, seed: int = 0) -> RewardModel:
    """A reward model with fresh weights, the same each time."""
    return tiny_reward(RewardTrunk(**TRUNK), PROMPTS, dimension=dimension, num_sources=2, seed=seed)  # type: ignore[arg-type]


def preferences(num: int, *, dimension: Dimension = "aesthetics", **given: Any) -> Iterator[Preference]:
    """Pairs whose brighter picture is the better, on a side that is drawn, every eighth a tie; scores are by brightness."""
    for number in range(num):
        draw = keyed_generator("pair", number)
        level_a, level_b = (int(level) for level in draw.choice([30, 90, 150, 220], size=2, replace=False))
        if number % 8 == 7:
            level_b = level_a
        row: dict[str, Any] = {
            "pair_id": str(number),
            "dimension": dimension,
            "prompt_id": f"prompt {number}",
            "prompt": PROMPTS[number % len(PROMPTS)],
            "category": "scene",
            "image_a": png(square(level_a, number, "a")),
            "image_b": png(square(level_b, number, "b")),
            "label": "tie" if level_a == level_b else "a" if level_a > level_b else "b",
            "reason": "darker",
            "split": ("train", "train", "validation", "test")[number % 4] if number % 8 != 7 else "train",
            "score_a": 1 + level_a / 55,
            "score_b": 1 + level_b / 55,
            "sources": [png(square(120, number))] if dimension in EDIT_DIMENSIONS else [],
        }
        yield Preference(**row | given)
