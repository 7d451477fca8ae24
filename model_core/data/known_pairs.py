"""A pair of pictures whose order is known because of how they were made, before it is a row of preferences.parquet."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from model_core.data.keys import key_bytes, keyed_uniform
from model_core.data.preferences import Preference, Split
from model_core.data.shards import encode_image
from model_core.data.synthetic import Scene
from model_core.recipe import Dimension, Preferences

ID_LENGTH = 16  # hex digits


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One picture of a pair, its pointwise score from 1 to 5, and what is wrong with it."""

    picture: Image.Image
    score: float
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class KnownPair:
    """Two pictures, the better one first; of equal ones `is_tie` says so. `notes` are what is known of the prompt."""

    prompt: str
    category: str
    split: Split
    better: Shown
    worse: Shown
    reason: str
    is_tie: bool = False
    sources: Sequence[Image.Image] = ()
    notes: dict[str, Any] = field(default_factory=dict)


def split_of(config: Preferences, *subject: object) -> Split:
    """The split of a prompt or a source picture: the same wherever it comes up, so that none is in two of them."""
    place = keyed_uniform("preference split", *subject)
    if place < config.test_share:
        return "test"
    return "validation" if place < config.test_share + config.validation_share else "train"


def scene_split(config: Preferences, scene: Scene) -> Split:
    """The split of a plain scene and of all captions of it, some of which leave the background open."""
    return split_of(config, "scene", scene.color, scene.shape, scene.position, scene.text)


def caption_split(config: Preferences, caption: str) -> Split:
    """The split of a photograph by its caption."""
    return split_of(config, "caption", " ".join(caption.lower().split()))


def instruction_split(config: Preferences, instruction: str) -> Split:
    """The split of an instruction; an edit is used where its sources are of the same."""
    return split_of(config, "instruction", instruction)


def prompt_id(prompt: str, sources: Sequence[bytes]) -> str:
    """The same for one prompt with the same encoded sources."""
    return key_bytes("prompt", prompt, *sources).hex()[:ID_LENGTH]


def preference_of(pair: KnownPair, *, dimension: Dimension, seed: int) -> Preference:
    """The row of a pair; which picture is a and which is b is drawn by what they show."""
    sources = [encode_image(source) for source in pair.sources]
    better, worse = encode_image(pair.better.picture), encode_image(pair.worse.picture)
    digests = sorted(hashlib.sha256(data).hexdigest() for data in (better, worse))
    pair_id = key_bytes("known pair", pair.prompt, *sources, *digests).hex()[:ID_LENGTH]
    better_is_a = keyed_uniform(seed, "side", dimension, pair_id) < 0.5
    first, second = (pair.better, pair.worse) if better_is_a else (pair.worse, pair.better)
    return Preference(
        pair_id=pair_id,
        dimension=dimension,
        prompt_id=prompt_id(pair.prompt, sources),
        prompt=pair.prompt,
        category=pair.category,
        image_a=better if better_is_a else worse,
        image_b=worse if better_is_a else better,
        label="tie" if pair.is_tie else "a" if better_is_a else "b",
        reason=pair.reason,
        split=pair.split,
        sources=sources,
        score_a=first.score,
        score_b=second.score,
        notes=pair.notes | {"a": first.notes, "b": second.notes},
    )
